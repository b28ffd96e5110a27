"""The report of `rlbroker report`: one self-contained HTML page without scripts.

Text from workers is not trusted: the template and the plots escape it, and the page forbids the browser to load or run
anything.
"""

from __future__ import annotations

import importlib.util

from rlbroker.errors import UsageError


def require_extras() -> None:
    """Check that the packages for the report are installed, without importing them.

    Raises:
        UsageError: a package is missing; the message says how to install it.
    """
    missing = [name for name in ("matplotlib", "jinja2") if importlib.util.find_spec(name) is None]
    if missing:
        raise UsageError(f"the report needs {', '.join(missing)}: run `pip install 'rlbroker[report]'`")
