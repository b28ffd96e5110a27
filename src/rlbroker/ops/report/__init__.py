"""The page that `rlbroker report` writes: one HTML file with everything in it, without scripts.

Whatever workers wrote is hostile: templates escape it, plots take it as text, and the page forbids the browser to load
or run anything.
"""

from __future__ import annotations

import importlib.util

from rlbroker.errors import UsageError


def require_extras() -> None:
    """Check that what the page needs beyond rlbroker itself is installed, without importing it.

    Raises:
        UsageError: something is missing; the message says how to install it.
    """
    missing = [name for name in ("matplotlib", "jinja2") if importlib.util.find_spec(name) is None]
    if missing:
        raise UsageError(f"the report needs {', '.join(missing)}: run `pip install 'rlbroker[report]'`")
