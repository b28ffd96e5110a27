"""The exit codes of commands, and the exit code for each kind of error."""

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

#: The run exists, but the requested part of it does not.
EXIT_NOT_FOUND = 1

#: Any error that a user can cause or repair.
EXIT_ERROR = 2

#: A bug in rlbroker.
EXIT_BUG = 70

#: Ctrl-C.
EXIT_INTERRUPTED = 130

#: The reader of stdout has closed it.
EXIT_PIPE = 141

#: The states of `check` and `doctor`, with the exit codes of monitoring plugins.
OK, WARNING, CRITICAL, UNKNOWN = range(4)


@contextmanager
def exit_on_errors(session: Session) -> Iterator[None]:
    """Turn an exception of the block into one line on stderr and an exit code; with -vv print the traceback too."""
    try:
        yield
    except RlbrokerError as error:
        session.print_traceback()
        session.fail(sanitize(str(error)), EXIT_ERROR)
    except KeyboardInterrupt:
        raise typer.Exit(EXIT_INTERRUPTED) from None
    except BrokenPipeError:
        # Python flushes stdout again when it ends; that must not fail too.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise typer.Exit(EXIT_PIPE) from None
    except (typer.Exit, typer.Abort, typer.BadParameter):
        raise
    except Exception as error:  # noqa: BLE001 - a bug in rlbroker
        session.print_traceback()
        message = f"unexpected {type(error).__name__}: {error}; -vv shows where"
        session.fail(sanitize(message), EXIT_BUG)
