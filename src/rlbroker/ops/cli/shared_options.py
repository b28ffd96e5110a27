"""The options that commands share, `with_session`, which adds them to a command, and the parser of time spans."""

from __future__ import annotations

import inspect
import re
import signal
import sys
from collections.abc import Callable, Collection
from typing import Annotated, Any, get_type_hints

import typer

from rlbroker.ops.cli.exit_codes import exit_on_errors
from rlbroker.ops.cli.session import Session

_PANEL = "Shared options"

#: The server. The help of every command lists it among the command's own options.
Url = Annotated[
    str | None,
    typer.Option(
        help="Server: redis://, rediss:// (TLS) or unix://; several servers: redis+sentinel://, redis+cluster://. "
        "By default RLBROKER_REDIS_URL, then REDIS_URL, then localhost."
    ),
]
_Run = Annotated[
    str | None,
    typer.Option(
        help="Name of the run; by default RLBROKER_RUN, then the only run on the server.",
        rich_help_panel=_PANEL,
    ),
]
_Json = Annotated[bool, typer.Option("--json", help="Print JSON, for programs.", rich_help_panel=_PANEL)]
_NoColor = Annotated[
    bool, typer.Option("--no-color", help="Print no colours; so does NO_COLOR=1.", rich_help_panel=_PANEL)
]
_Quiet = Annotated[
    bool, typer.Option("--quiet", "-q", help="Print data and errors only.", rich_help_panel=_PANEL)
]
_Verbose = Annotated[
    int,
    typer.Option(
        "--verbose",
        "-v",
        count=True,
        help="Log more; -vv also prints the traceback of an error.",
        rich_help_panel=_PANEL,
    ),
]
_Timeout = Annotated[
    float, typer.Option(min=0.1, help="Seconds to wait for the server.", rich_help_panel=_PANEL)
]

#: Type and default of each shared option, by the parameter of `Session` that it sets.
SHARED_OPTIONS: dict[str, tuple[Any, Any]] = {
    "url": (Url, None),
    "run": (_Run, None),
    "as_json": (_Json, False),
    "no_color": (_NoColor, False),
    "quiet": (_Quiet, False),
    "verbose": (_Verbose, 0),
    "timeout": (_Timeout, 5.0),
}


def with_session(
    body: Callable[..., None] | None = None, *, without: Collection[str] = ()
) -> Callable[..., Any]:
    """Add the shared options to a command, and pass it a `Session` with their values as its first argument.

    Errors become one line on stderr and an exit code: see `exit_on_errors`.

    Args:
        body: the command: a function of a `Session` and its own options.
        without: the shared options that the command does not have.
    """
    if body is None:
        return lambda body: with_session(body, without=without)

    def command(**options: Any) -> None:
        session = Session(**{name: options.pop(name) for name in shared})
        # Like Ctrl-C: unwind the stack, so that half-written files are deleted.
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        with exit_on_errors(session), session:
            body(session, **options)
            sys.stdout.flush()

    hints = get_type_hints(body, include_extras=True)
    own = [
        parameter.replace(annotation=hints[name], kind=inspect.Parameter.KEYWORD_ONLY)
        for name, parameter in list(inspect.signature(body).parameters.items())[1:]
    ]
    shared = {
        name: inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)
        for name, (annotation, default) in SHARED_OPTIONS.items()
        if name not in without
    }
    parameters = [*own, *shared.values()]
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined] # typer reads it
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    command.__name__, command.__doc__ = body.__name__, unwrap(body.__doc__ or "")
    return command


def unwrap(text: str) -> str:
    """Join the lines of each paragraph: the help is wrapped to the width of the terminal.

    >>> unwrap("One\\ntwo.\\n\\nThree.")
    'One two.\\n\\nThree.'
    """
    return re.sub(r"(?<!\n)\n(?!\n)", " ", inspect.cleandoc(text))


def parse_span(text: str) -> float:
    """Return the seconds of a time span such as `90`, `30s`, `15m`, `1h` or `2d`.

    >>> [parse_span(text) for text in ("90", "30s", "1.5h", "2d")]
    [90.0, 30.0, 5400.0, 172800.0]
    """
    found = re.fullmatch(r"(\d+|\d*\.\d+)([smhd]?)", text.strip().lower())
    if found is None:
        raise typer.BadParameter(f"{text!r} is not a time span; write it as 90s, 15m, 1h or 2d")
    return float(found[1]) * {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86_400}[found[2]]
