"""The showcase: PPO on a Gymnasium environment, with learner and workers as separate processes.

Nothing heavy is imported here: the parent process of `rlbroker demo` never pays for torch.
"""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

from rlbroker.backend.url import redis_url
from rlbroker.config import check_run_name, redacted_url, run_from_environment
from rlbroker.errors import InvalidArgument, UsageError


def require_extras() -> None:
    """Check that what the demo needs beyond rlbroker itself is installed, without importing it.

    Raises:
        UsageError: something is missing; the message says how to install it.
    """
    needed = ("torch", "gymnasium", "matplotlib")
    missing = [name for name in needed if importlib.util.find_spec(name) is None]
    if missing:
        raise UsageError(f"the demo needs {', '.join(missing)}: run `pip install 'rlbroker[demo]'`")


def check_output(output: Path | None) -> None:
    """Check, before any training, that a picture can be written there.

    Raises:
        InvalidArgument: its directory does not exist, or is not writable.
    """
    if output is not None and not os.access(output.absolute().parent, os.W_OK):
        raise InvalidArgument(
            f"no picture can be written to {output}: {output.parent} is no writable directory"
        )


def training_run(run: str | None) -> str:
    """Give the name of the run: the argument, else RLBROKER_RUN, else demo.

    Raises:
        InvalidArgument: that cannot be the name of a run.
    """
    return check_run_name(run) if run is not None else run_from_environment() or "demo"


def place(url: str | None, run: str) -> str:
    """Return which run on which server is meant, without a password, to be shown to a person.

    >>> place("redis://me:secret@host:6379/0", "pong")
    'run pong on redis://host:6379/0'
    """
    return f"run {run} on {redacted_url(redis_url(url))}"
