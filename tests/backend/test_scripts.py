"""Scripts: their text with includes, and loading them into servers that lack them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from rlbroker.backend.resp import Argument
from rlbroker.backend.scripts import Script, ScriptLoader
from rlbroker.errors import AccessDenied, RunLost

pytestmark = pytest.mark.unit

ONE, TWO = Script("one", "return 1"), Script("two", "return 2")


def test_an_include_is_replaced_by_its_file() -> None:
    script = Script.load("weights/lua/commit.lua")
    assert script.name == "commit"
    assert "-- include:" not in script.text
    assert "FENCED" in script.text, "the check that only the leading learner publishes is included"


def test_scripts_are_loaded_only_if_one_is_missing() -> None:
    sent: list[str] = []
    known = [1, 1]

    def send(command: Sequence[Argument]) -> Any:
        sent.append(str(command[0]))
        return known

    loader = ScriptLoader("host:1")
    loader.load_missing(send, [ONE, TWO])
    assert sent == ["SCRIPT EXISTS"]
    known[1] = 0
    loader.load_missing(send, [ONE, TWO])
    assert sent == ["SCRIPT EXISTS", "SCRIPT EXISTS", "SCRIPT LOAD", "SCRIPT LOAD"]


def test_a_user_without_the_right_to_load_scripts_waits_for_the_learner() -> None:
    def refuse(command: Sequence[Argument]) -> Any:
        raise AccessDenied("may not run SCRIPT LOAD")

    loader = ScriptLoader("host:1")
    loader.remember(ONE)
    with pytest.raises(RunLost, match="host:1 does not have rlbroker's scripts"):
        loader.reload(refuse)
