"""The command line: `rlbroker`.

`app` registers the commands. Each has a file `…_command.py`, or `…_commands.py` for a group. The decorator
`shared_options.with_session` adds the shared options to a command, and passes it a `session.Session`: the connection,
the run and the output. `console` prints tables; `ops.formatting` has numbers and names as text.
"""

from __future__ import annotations

import codecs
import io
import os
import sys
from pathlib import Path

#: What stands for a sign on a terminal that cannot show it: ok and critical must differ.
_SIGNS = {"✓": "+", "✗": "x", "…": "~"}


def main() -> None:
    """Run the command line; print an `RlbrokerError` as one line, without a traceback."""
    hide_password()
    prepare_output()
    from rlbroker.errors import RlbrokerError
    from rlbroker.ops.cli.app import app
    from rlbroker.ops.cli.exit_codes import EXIT_ERROR

    try:
        app()
    except RlbrokerError as error:
        print(f"rlbroker: {error}", file=sys.stderr)
        sys.exit(EXIT_ERROR)


def prepare_output() -> None:
    """Print `?` or a sign for what a terminal or pipe cannot express, and nothing to a closed stream."""
    if sys.stdout is None or sys.stderr is None:
        nowhere = Path(os.devnull).open("w", encoding="utf-8")  # noqa: SIM115 - until the process ends
        sys.stdout, sys.stderr = sys.stdout or nowhere, sys.stderr or nowhere
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="rlbroker")


def _replace(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    return "".join(_SIGNS.get(one, "?") for one in error.object[error.start : error.end]), error.end


codecs.register_error("rlbroker", _replace)


def hide_password() -> None:
    """Restart this process without a password in its arguments, which every user of the machine can read."""
    kept, url, rest = sys.argv[:1], "", iter(sys.argv[1:])
    for argument in rest:
        name, equals, value = argument.partition("=")
        if name == "--url":
            url = value if equals else next(rest, "")
        else:
            kept.append(argument)
    if "@" in url or "password=" in url:
        os.environ["RLBROKER_REDIS_URL"] = url
        os.environ["RLBROKER_URL_TYPED"] = "1"  # as in config.py, which would take long to import
        interpreter = sys.orig_argv[: len(sys.orig_argv) - len(sys.argv) + 1]
        os.execv(sys.executable, [*interpreter, *kept[1:]])
