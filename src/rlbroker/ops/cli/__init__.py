"""The command line: `rlbroker`.

`app` registers the commands; each has a file `…_command.py`, or `…_commands.py` for a group. A command about a run is
decorated with `shared_options.with_session`, which adds the shared options and passes the command a `session.Session`:
the connection, the run and the output. `console` prints tables; `ops.formatting` has numbers and names as text.
"""

from __future__ import annotations

import os
import sys


def main() -> None:
    """Run the command line; print an `RlbrokerError` as one line instead of a traceback."""
    hide_password()
    from rlbroker.errors import RlbrokerError
    from rlbroker.ops.cli.app import app
    from rlbroker.ops.cli.exit_codes import EXIT_ERROR

    try:
        app()
    except RlbrokerError as error:
        print(f"rlbroker: {error}", file=sys.stderr)
        sys.exit(EXIT_ERROR)


def hide_password() -> None:
    """Restart this process without the password in its arguments, where every user of the machine can read it."""
    kept, url, rest = sys.argv[:1], "", iter(sys.argv[1:])
    for argument in rest:
        name, equals, value = argument.partition("=")
        if name == "--url":
            url = value if equals else next(rest, "")
        else:
            kept.append(argument)
    if "@" in url or "password=" in url:
        os.environ["RLBROKER_REDIS_URL"] = url
        os.environ["RLBROKER_URL_TYPED"] = "1"  # a literal: importing config.py would cost start-up time
        interpreter = sys.orig_argv[: len(sys.orig_argv) - len(sys.argv) + 1]
        os.execv(sys.executable, [*interpreter, *kept[1:]])
