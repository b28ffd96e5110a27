"""Hints are completed to what a person can type, and never hold a password."""

from __future__ import annotations

import pytest

from rlbroker.cli.session import Session
from rlbroker.config import URL_TYPED_VARIABLE

SET = "redis-cli CONFIG SET timeout 0"
URL = "redis://me:secret@host:7000/1"


@pytest.fixture(autouse=True)
def no_url(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RLBROKER_REDIS_URL", "REDIS_URL", URL_TYPED_VARIABLE):
        monkeypatch.delenv(name, raising=False)


def test_a_server_of_the_environment_is_found_there_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REDIS_URL", URL)
    assert Session().typed(SET) == 'redis-cli -u "$REDIS_URL" CONFIG SET timeout 0'
    assert Session().typed("rlbroker runs") == "rlbroker runs"


def test_a_password_that_was_typed_is_asked_for_and_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RLBROKER_REDIS_URL", URL)
    monkeypatch.setenv(URL_TYPED_VARIABLE, "1")
    typed = Session().typed(SET)
    assert typed == "redis-cli -u redis://host:7000/1 --user me --askpass CONFIG SET timeout 0"
    assert Session().typed("rlbroker runs") == "rlbroker runs --url 'redis://me:…@host:7000/1'"


def test_a_server_that_was_typed_is_typed_again() -> None:
    session = Session(url="redis://host:7000/1")
    assert session.typed(SET) == "redis-cli -u redis://host:7000/1 CONFIG SET timeout 0"
    assert session.typed("rlbroker bench") == "rlbroker bench --url redis://host:7000/1"
    assert session.typed("rlbroker doctor --url redis://other") == "rlbroker doctor --url redis://other"


def test_rights_are_given_by_somebody_else(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RLBROKER_REDIS_URL", URL)
    typed = Session().typed("redis-cli ACL SETUSER me +info")
    assert typed == "redis-cli -u redis://host:7000/1 ACL SETUSER me +info"


def test_a_hint_for_another_program_is_left_alone() -> None:
    assert Session().typed("timedatectl set-ntp true") == "timedatectl set-ntp true"
