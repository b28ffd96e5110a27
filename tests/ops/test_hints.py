"""Hints are completed to lines that can be typed, and never hold a password."""

from __future__ import annotations

import pytest

from rlbroker.config import URL_TYPED_VARIABLE
from rlbroker.ops.cli.session import Session

pytestmark = pytest.mark.unit

CONFIG_SET = "redis-cli CONFIG SET timeout 0"
URL = "redis://me:secret@host:7000/1"


@pytest.fixture(autouse=True)
def no_url(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RLBROKER_REDIS_URL", "REDIS_URL", URL_TYPED_VARIABLE, "RLBROKER_TLS_CA_FILE"):
        monkeypatch.delenv(name, raising=False)


def test_a_url_from_the_environment_is_read_from_there_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REDIS_URL", URL)
    assert Session().complete_hint(CONFIG_SET) == 'redis-cli -u "$REDIS_URL" CONFIG SET timeout 0'
    assert Session().complete_hint("rlbroker runs") == "rlbroker runs"


def test_a_typed_password_is_asked_for_and_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RLBROKER_REDIS_URL", URL)
    monkeypatch.setenv(URL_TYPED_VARIABLE, "1")
    line = Session().complete_hint(CONFIG_SET)
    assert line == "redis-cli -u redis://host:7000/1 --user me --askpass CONFIG SET timeout 0"
    assert Session().complete_hint("rlbroker runs") == "rlbroker runs --url 'redis://me:…@host:7000/1'"


def test_a_typed_url_is_part_of_the_hint() -> None:
    session = Session(url="redis://host:7000/1")
    assert session.complete_hint(CONFIG_SET) == "redis-cli -u redis://host:7000/1 CONFIG SET timeout 0"
    assert session.complete_hint("rlbroker server --directory DIR") == "rlbroker server --directory DIR"
    assert session.complete_hint("rlbroker bench") == "rlbroker bench --url redis://host:7000/1"
    assert (
        session.complete_hint("rlbroker doctor --url redis://other") == "rlbroker doctor --url redis://other"
    )


def test_redis_cli_gets_user_and_certificates_from_the_environment(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("RLBROKER_REDIS_URL", "rediss://host:7000/1?ssl_ca_certs=/a%20b/ca.crt")
    monkeypatch.setenv("RLBROKER_TLS_CERTIFICATE_FILE", "/client.crt")
    monkeypatch.setenv("RLBROKER_TLS_KEY_FILE", "/client.key")
    files = "--cacert '/a b/ca.crt' --cert /client.crt --key /client.key"
    assert (
        Session().complete_hint(CONFIG_SET)
        == f'redis-cli -u "$RLBROKER_REDIS_URL" {files} CONFIG SET timeout 0'
    )
    monkeypatch.setenv("RLBROKER_REDIS_PASSWORD", "secret")
    assert "--user default --askpass --cacert" in Session().complete_hint(CONFIG_SET)
    monkeypatch.setenv("RLBROKER_REDIS_USERNAME", "me")
    assert "--user me --askpass --cacert" in Session().complete_hint(CONFIG_SET)
    assert "--user" not in Session().complete_hint("redis-cli ACL SETUSER me +info")
    monkeypatch.setenv("RLBROKER_REDIS_URL", "rediss://you:secret@host?password=secret&ssl_ca_certs=/ca.crt")
    monkeypatch.setenv(URL_TYPED_VARIABLE, "1")
    assert (
        Session().complete_hint("rlbroker runs")
        == "rlbroker runs --url 'rediss://you:…@host?ssl_ca_certs=/ca.crt'"
    )


def test_a_hint_that_grants_rights_names_no_user(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RLBROKER_REDIS_URL", URL)
    line = Session().complete_hint("redis-cli ACL SETUSER me +info")
    assert line == "redis-cli -u redis://host:7000/1 ACL SETUSER me +info"


def test_a_hint_for_another_program_is_not_changed() -> None:
    assert Session().complete_hint("timedatectl set-ntp true") == "timedatectl set-ntp true"


def test_redis_cli_is_given_the_first_node_of_a_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(
        "RLBROKER_REDIS_URL", "rediss+cluster://me:secret@localhost:1,[::1]:2/0?ssl_ca_certs=/ca.crt"
    )
    login, every_node = "--user me --askpass --tls --cacert /ca.crt", "--cluster call localhost:1"
    session = Session(timeout=0.1)
    assert session.complete_hint(CONFIG_SET) == f"redis-cli {login} {every_node} CONFIG SET timeout 0"
    assert session.complete_hint("redis-cli TYPE x") == f"redis-cli {login} -c -h localhost -p 1 TYPE x"
    assert session.complete_hint("redis-cli -h b -p 2 INFO") == f"redis-cli {login} -h b -p 2 INFO"
    assert session.complete_hint("redis-cli BGSAVE") == f"redis-cli {login} {every_node} BGSAVE"
    assert session.complete_hint("redis-cli ACL SETUSER me +info") == (
        f"redis-cli --tls --cacert /ca.crt {every_node} ACL SETUSER me +info"
    )
    monkeypatch.setenv(URL_TYPED_VARIABLE, "1")
    assert session.complete_hint("rlbroker runs") == (
        "rlbroker runs --url 'rediss+cluster://me:…@localhost:1,[::1]:2/0?ssl_ca_certs=/ca.crt'"
    )


def test_a_hint_never_holds_the_password_of_the_sentinels(monkeypatch: pytest.MonkeyPatch) -> None:
    url = "redis+sentinel://me:secret@localhost:1,localhost:2/pong/3?sentinel_username=s&sentinel_password=secret"
    monkeypatch.setenv("RLBROKER_REDIS_URL", url)
    monkeypatch.setenv(URL_TYPED_VARIABLE, "1")
    session = Session(timeout=0.1)
    assert session.complete_hint("rlbroker runs") == (
        "rlbroker runs --url 'redis+sentinel://me:…@localhost:1,localhost:2/pong/3?sentinel_username=s'"
    )
    assert (
        session.complete_hint(CONFIG_SET)
        == "redis-cli --user me --askpass -h MASTER -p 6379 -n 3 CONFIG SET timeout 0"
    )


def test_a_hint_that_names_a_server_is_not_sent_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RLBROKER_REDIS_URL", "redis+sentinel://a:1,b:2/pong")
    assert (
        Session().complete_hint("redis-cli -h c -p 3 CONFIG SET timeout 0")
        == "redis-cli -h c -p 3 CONFIG SET timeout 0"
    )
    monkeypatch.setenv("RLBROKER_REDIS_URL", "redis+sentinel://me:secret@a:1,b:2/pong")
    hint = "redis-cli -h a -p 1 SENTINEL CKQUORUM pong"
    assert Session().complete_hint(hint) == hint
