"""A lock for whole calls is free after an interrupt at any point."""

from __future__ import annotations

import itertools
import sys
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

import pytest

from rlbroker.backend import locks
from rlbroker.backend.locks import CallLock

pytestmark = pytest.mark.unit

SECONDS = 5.0


class Interrupted(RuntimeError):
    """What a signal handler raises; a kind of error that a lock may raise, too."""


def refuse() -> None:
    raise ValueError("it cannot be done")


def interrupt_at(instruction: int, call: Callable[[], Any]) -> bool:
    """Call, and raise before one instruction of the lock's code; return whether there was such an instruction."""
    count = 0

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        nonlocal count
        if frame.f_code.co_filename != locks.__file__:
            return None
        frame.f_trace_opcodes = True
        if event == "opcode":
            count += 1
            if count == instruction:
                sys.settrace(None)
                raise Interrupted
        return trace

    previous = sys.gettrace()
    sys.settrace(trace)
    try:
        call()
    except (Interrupted, ValueError):
        pass
    finally:
        sys.settrace(previous)
    return count >= instruction


def is_free(lock: CallLock) -> bool:
    """Return whether another thread gets the lock."""
    found: list[Any] = []
    other = threading.Thread(target=lambda: found.append(lock.run_within(0, lambda: True)))
    other.start()
    other.join()
    return found == [True]


@pytest.mark.parametrize("call", [lambda: True, refuse], ids=["returns", "raises"])
@pytest.mark.parametrize("seconds", [-1, 0, SECONDS])
def test_a_lock_is_free_after_an_interrupt_at_any_instruction(
    call: Callable[[], Any], seconds: float
) -> None:
    lock = CallLock()
    for instruction in itertools.count(1):
        reached = interrupt_at(instruction, lambda: lock.run_within(seconds, call))
        assert is_free(lock), f"it is held after an interrupt at instruction {instruction}"
        if not reached:
            assert instruction > 20
            break


def test_a_call_has_the_lock_for_itself() -> None:
    lock = CallLock()
    assert lock.run(lambda: is_free(lock)) is False
    assert is_free(lock)


def test_a_call_gives_up_after_its_time() -> None:
    lock, called = CallLock(), list[int]()
    begun, done = threading.Event(), threading.Event()

    def hold() -> None:
        begun.set()
        done.wait(SECONDS)

    other = threading.Thread(target=lock.run, args=(hold,))
    other.start()
    assert begun.wait(SECONDS)
    assert lock.run_within(0, called.append, 1) is None
    assert lock.run_within(0.01, called.append, 2) is None
    done.set()
    assert lock.run(lambda: "got") == "got"
    other.join()
    assert not called
