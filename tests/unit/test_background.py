"""The background threads: what they log and when they end."""

from __future__ import annotations

import logging
from collections.abc import Callable

import pytest
from conftest import wait_until

from rlbroker.background import Background
from rlbroker.errors import ConnectionFailed


def steps(*results: bool | Exception | None) -> tuple[Callable[[], bool | None], list[object]]:
    left: list[bool | Exception | None] = list(results)
    done: list[object] = []

    def step() -> bool | None:
        result = left.pop(0) if left else False
        done.append(result)
        if isinstance(result, Exception):
            raise result
        return result

    return step, done


@pytest.mark.parametrize(("last", "recovered"), [(False, False), (True, True), (None, True)])
def test_only_a_step_that_asked_the_server_shows_that_it_works_again(
    caplog: pytest.LogCaptureFixture, last: bool | None, recovered: bool
) -> None:
    caplog.set_level(logging.INFO, "rlbroker")
    step, done = steps(ConnectionFailed("away"), False, last)
    thread = Background("test", step)
    thread.start()
    wait_until("the steps are done", lambda: len(done) > 3)
    assert thread.stop(5.0)
    assert caplog.text.count("trying again until it works") == 1
    assert ("it works again" in caplog.text) == recovered
