"""Child processes that end with their parent."""

from __future__ import annotations

import contextlib
import multiprocessing
import signal
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from typing import Any

#: A child process that does not answer for this long is stuck.
TIMEOUT_SECONDS = 300.0

#: How long a child process may take to end at the end of its block.
_END_SECONDS = 10.0

_spawn = multiprocessing.get_context("spawn")


@contextlib.contextmanager
def start_child(target: Callable[..., None], *arguments: Any) -> Iterator[Connection]:
    """Run `target(pipe, *arguments)` in a new process; yield the parent's end of the pipe.

    At the end of the block the process receives None, and is killed if it does not end in time. After an error it
    is killed at once.
    """
    parent_end, child_end = _spawn.Pipe()
    process = _spawn.Process(target=_run, args=(target, child_end, *arguments), daemon=True)
    process.start()
    child_end.close()
    try:
        yield parent_end
    except BaseException:  # including Ctrl-C: the child may wait for a message that will never arrive
        process.kill()
        raise
    finally:
        with contextlib.suppress(OSError):
            parent_end.send(None)
        parent_end.close()
        process.join(_END_SECONDS)
        if process.is_alive():
            process.kill()
            process.join()


def receive(pipe: Connection, expected: str) -> Any:
    """Wait until the child sends (expected, value); return the value.

    Raises:
        RuntimeError: the child failed, ended, or did not answer in time.
    """
    if not pipe.poll(TIMEOUT_SECONDS):
        raise RuntimeError(f"a process did not send {expected!r} within {TIMEOUT_SECONDS:g} s")
    try:
        kind, value = pipe.recv()
    except EOFError:
        raise RuntimeError(f"a process ended before it sent {expected!r}") from None
    if kind != expected:
        raise RuntimeError(f"a process failed before it sent {expected!r}: {value}")
    return value


def _run(target: Callable[..., None], pipe: Connection, *arguments: Any) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # after Ctrl-C the parent ends its children
    try:
        target(pipe, *arguments)
    except (EOFError, BrokenPipeError):  # the parent has ended
        return
    except Exception as error:
        with contextlib.suppress(OSError):
            pipe.send(("failed", f"{type(error).__name__}: {error}"))
        raise
