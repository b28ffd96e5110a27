"""The exit codes of commands, and which errors end with which of them."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import typer

from rlbroker.errors import RlbrokerError
from rlbroker.ops.formatting import sanitize

if TYPE_CHECKING:
    from rlbroker.ops.cli.session import Session

#: The run exists, but not what was asked for.
EXIT_NOT_FOUND = 1

#: An error that its message explains.
EXIT_ERROR = 2

#: An error that only a bug in rlbroker can cause.
EXIT_BUG = 70

#: Ctrl-C.
EXIT_INTERRUPTED = 130

#: The reader of stdout went away.
EXIT_PIPE = 141


@contextmanager
def exit_on_errors(session: Session) -> Iterator[None]:
    """End the command with one line on stderr and an exit code if the block raises; with -vv add the traceback."""
    try:
        yield
    except RlbrokerError as error:
        session.print_traceback()
        session.fail(sanitize(str(error)), EXIT_ERROR)
    except KeyboardInterrupt:
        raise typer.Exit(EXIT_INTERRUPTED) from None
    except BrokenPipeError:
        # Python flushes stdout once more at its end, which must not fail again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise typer.Exit(EXIT_PIPE) from None
    except (typer.Exit, typer.Abort, typer.BadParameter):
        raise
    except Exception as error:  # noqa: BLE001 - a bug in rlbroker: by default one line is enough
        session.print_traceback()
        message = f"unexpected {type(error).__name__}: {error}; -vv shows where"
        session.fail(sanitize(message), EXIT_BUG)
