"""The showcase: PPO on a Gymnasium environment, with learner and workers as separate processes.

Nothing heavy is imported here: the parent process of `rlbroker demo` never pays for torch.
"""

from __future__ import annotations

import importlib.util

from rlbroker.errors import UsageError


def require_extras() -> None:
    """Check that what the demo needs beyond rlbroker itself is installed, without importing it.

    Raises:
        UsageError: something is missing; the message says how to install it.
    """
    needed = ("torch", "gymnasium", "matplotlib")
    missing = [name for name in needed if importlib.util.find_spec(name) is None]
    if missing:
        raise UsageError(f"the demo needs {', '.join(missing)}: run `pip install 'rlbroker[demo]'`")
