"""The demo: PPO on a Gymnasium environment, with learner and workers as separate processes.

This module does not import torch, so the parent process of `rlbroker demo` starts quickly.
"""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

from rlbroker.backend.url import redis_url
from rlbroker.config import check_run_name, redacted_url, run_from_environment
from rlbroker.errors import InvalidArgument, UsageError


def require_extras() -> None:
    """Check that the demo's extra packages are installed, without importing them.

    Raises:
        UsageError: a package is missing; the message says how to install it.
    """
    packages = ("torch", "gymnasium", "matplotlib")
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise UsageError(f"the demo needs {', '.join(missing)}: run `pip install 'rlbroker[demo]'`")


def check_output(output: Path | None) -> None:
    """Check, before training starts, that the picture can be written.

    Raises:
        InvalidArgument: the picture's directory does not exist or is not writable.
    """
    if output is not None and not os.access(output.absolute().parent, os.W_OK):
        raise InvalidArgument(
            f"the picture cannot be written to {output}: {output.parent} is not a writable directory"
        )


def training_run(run: str | None) -> str:
    """Return the name of the run: the argument, else RLBROKER_RUN, else demo.

    Raises:
        InvalidArgument: the name is not a valid run name.
    """
    return check_run_name(run) if run is not None else run_from_environment() or "demo"


def describe_run(url: str | None, run: str) -> str:
    """Return run and server as text for the user, without the password.

    >>> describe_run("redis://me:secret@host:6379/0", "pong")
    'run pong on redis://host:6379/0'
    """
    return f"run {run} on {redacted_url(redis_url(url))}"
