"""Processes that end with what started them, whichever way that ends."""

from __future__ import annotations

import contextlib
import multiprocessing
import signal
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from typing import Any

#: After this many seconds a process is taken for stuck.
PATIENCE_SECONDS = 300.0

#: So long a process may take to end by itself once it was told to.
_END_SECONDS = 10.0

_spawn = multiprocessing.get_context("spawn")


@contextlib.contextmanager
def child(target: Callable[..., None], *arguments: Any) -> Iterator[Connection]:
    """Run `target(pipe, *arguments)` in a new process, and give our end of the pipe.

    At the end of the block it is sent None, and killed if it does not end within seconds; after an error at once.
    """
    ours, theirs = _spawn.Pipe()
    process = _spawn.Process(target=_run, args=(target, theirs, *arguments), daemon=True)
    process.start()
    theirs.close()
    try:
        yield ours
    except BaseException:  # Ctrl-C too: it may wait for what will never come
        process.kill()
        raise
    finally:
        with contextlib.suppress(OSError):
            ours.send(None)
        ours.close()
        process.join(_END_SECONDS)
        if process.is_alive():
            process.kill()
            process.join()


def answer(pipe: Connection, expected: str) -> Any:
    """Wait for the child to send (expected, value); give the value.

    Raises:
        RuntimeError: it failed, ended, or gave no answer.
    """
    if not pipe.poll(PATIENCE_SECONDS):
        raise RuntimeError(f"a process did not say {expected!r} within {PATIENCE_SECONDS:g} s")
    try:
        kind, value = pipe.recv()
    except EOFError:
        raise RuntimeError(f"a process ended before it said {expected!r}") from None
    if kind != expected:
        raise RuntimeError(f"a process failed before it said {expected!r}: {value}")
    return value


def _run(target: Callable[..., None], pipe: Connection, *arguments: Any) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # at Ctrl-C the parent says when to end
    try:
        target(pipe, *arguments)
    except (EOFError, BrokenPipeError):  # the parent is gone
        return
    except Exception as error:
        with contextlib.suppress(OSError):
            pipe.send(("failed", f"{type(error).__name__}: {error}"))
        raise
