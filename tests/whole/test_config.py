"""Settings: where their values come from, and which values are refused."""

from __future__ import annotations

import traceback
from pathlib import Path

import pytest

from rlbroker.backend.client import client_from_url
from rlbroker.backend.keys import Keys
from rlbroker.backend.url import parse_endpoint, redis_url
from rlbroker.config import DEFAULT_URL, RunSettings, check_run_name, redacted_url, signing_secret
from rlbroker.demo import training_run
from rlbroker.errors import InvalidArgument

pytestmark = pytest.mark.unit


def test_the_url_is_the_argument_then_the_environment_then_localhost(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RLBROKER_REDIS_URL", "REDIS_URL"):
        monkeypatch.delenv(name, raising=False)
    assert redis_url() == DEFAULT_URL
    monkeypatch.setenv("REDIS_URL", "redis://general")
    assert redis_url() == "redis://general"
    monkeypatch.setenv("RLBROKER_REDIS_URL", "unix:///ours.sock")
    assert redis_url() == "unix:///ours.sock"
    assert redis_url("rediss://mine") == "rediss://mine"


def test_the_run_of_learner_and_worker_is_the_argument_then_the_environment_then_demo(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("RLBROKER_RUN", raising=False)
    assert training_run(None) == "demo"
    monkeypatch.setenv("RLBROKER_RUN", "pong")
    assert (training_run(None), training_run("tetris")) == ("pong", "tetris")


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("redis://:secret@host:1/2", "redis://host:1/2"),
        ("rediss://user:p%40ss@[::1]:6379", "rediss://[::1]:6379"),
        ("unix://user:secret@/run/redis.sock?db=1&password=secret", "unix:///run/redis.sock"),
        ("redis://host?password=secret", "redis://host"),
        ("redis://:se/cr@et@host", "redis://host"),
        ("redis://:se?cret@host", "redis://…"),
        ("redis://host?password=sec@ret", "redis://…"),
    ],
)
def test_a_redacted_url_has_no_password(url: str, shown: str) -> None:
    assert redacted_url(url) == shown


def test_a_malformed_url_is_refused_without_showing_its_password() -> None:
    with pytest.raises(InvalidArgument, match=r"redis://\[bad/0 cannot be used"):
        redis_url("redis://:secret@[bad/0")


def test_a_database_that_is_not_a_number_is_refused() -> None:
    with pytest.raises(InvalidArgument, match="must be a number"):
        redis_url("redis://localhost:6379/main")
    assert redis_url("unix:///run/redis.sock")


def test_the_nodes_of_a_cluster_and_the_sentinels_are_read_from_a_url() -> None:
    cluster = parse_endpoint("rediss+cluster://me:p%40ss%2Cword@a:7000,[::1]:7001,c/0?ssl_check_hostname=no")
    assert cluster.kind == "cluster"
    assert cluster.hosts == (("a", 7000), ("::1", 7001), ("c", 6379))
    assert cluster.url == "rediss://me:p%40ss%2Cword@a:7000/0?ssl_check_hostname=no"
    trio = parse_endpoint(
        "redis+sentinel://[::1],b:1/pong.main/3?sentinel_username=you&sentinel_password=p%26w&protocol=3"
    )
    assert (trio.kind, trio.service, trio.hosts) == ("sentinel", "pong.main", (("::1", 26379), ("b", 1)))
    assert (trio.url, trio.login) == ("redis://[::1]/3?protocol=3", {"username": "you", "password": "p&w"})
    with pytest.raises(InvalidArgument, match=r"several hosts; write redis\+cluster://"):
        parse_endpoint("redis://a,b/1")


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("redis+cluster:///0", "a host that is empty; .* redis\\+cluster://host:6379,host:6379"),
        ("redis+cluster://me:secret@/0", "a host that is empty"),
        ("redis+cluster://me:secret@a,,b/0", "a host that is empty"),
        ("redis+sentinel://a,/mymaster", "a host that is empty; .* redis\\+sentinel://host:26379,"),
        ("redis+cluster://me:secret@a:1,b:x", "host or port cannot be read"),
        ("redis+cluster://me:secret@a:1,b:99999", "host or port cannot be read"),
        ("redis+cluster://me:secret@a:x,b:1", "host or port cannot be read"),
        ("redis+cluster://me:secret@a,[::1/0", "cannot be used"),
        ("redis+cluster://me:secret@a:1/3", "a Cluster has the database 0 only; .* names 3"),
        ("redis+cluster://me:secret@a:1/main", "must be a number"),
        (
            "redis+sentinel://me:secret@a:1",
            "does not name the master; write it like redis\\+sentinel://host",
        ),
        ("redis+sentinel://me:secret@a:1/", "does not name the master"),
        ("redis+sentinel://me:secret@a:1/mymaster/main", "must be a number"),
        ("redis+sentinel://me:1/secret@a:1", "has an invalid name of a master"),
        ("redis+cluster://me:1/secret@a:1", "must be a number"),
        ("redis+cluster://me:1?secret@a:1", "that rlbroker does not know"),
        (
            "redis+sentinel://a:1/mymaster?sentinel_passwort=secret",
            "'sentinel_passwort' that rlbroker does not know",
        ),
        ("redis+ring://me:secret@a:1", "has the scheme 'redis\\+ring'; use one of redis://"),
    ],
)
def test_a_wrong_url_of_several_servers_says_what_to_write_and_shows_no_password(url: str, said: str) -> None:
    with pytest.raises(InvalidArgument, match=said) as caught:
        client_from_url(parse_endpoint(redis_url(url)).url)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("run", ["", " ", "a b", "{x}", "a:b", "-x", "x" * 101, "ü"])
def test_run_names_that_would_spoil_keys_are_refused(run: str) -> None:
    with pytest.raises(InvalidArgument, match="run must be"):
        check_run_name(run)


def test_all_keys_of_a_run_share_one_hash_tag() -> None:
    keys = Keys("pong.v2")
    names = [keys.meta, keys.weights, keys.chunk("1-1-1", 0), keys.notify, keys.experiences(3), keys.control]
    assert all(name.startswith("rlb:{pong.v2}:") for name in names)


def test_settings_survive_the_meta_hash() -> None:
    settings = RunSettings(7, 8, "drop_oldest", 1.5, 60.0)
    assert RunSettings.from_fields(settings.to_fields()) == settings
    assert RunSettings.from_fields({"epoch": "3"}) == RunSettings()


@pytest.mark.parametrize("mark", ["#", "?", "/", "]", "\u2100"])
def test_a_url_that_cannot_be_used_does_not_show_its_password(mark: str) -> None:
    with pytest.raises(InvalidArgument, match=r"cannot be used|must be a number") as caught:
        client_from_url(redis_url(f"redis://me:zyx{mark}wvu@host:1"))
    shown = "".join(traceback.format_exception(caught.value))
    assert "redis" in shown
    assert "zyx" not in shown.replace("zyx{mark}wvu", "")  # as it is written above


def test_a_url_in_the_place_of_a_run_does_not_show_its_password() -> None:
    with pytest.raises(InvalidArgument, match="got 'redis://host'") as caught:
        check_run_name("redis://me:secret@host")
    assert "secret" not in str(caught.value)


def test_the_signing_key_is_the_argument_or_the_file_that_the_environment_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RLBROKER_SIGNING_KEY_FILE", raising=False)
    assert signing_secret() is None
    file = tmp_path / "key"
    file.write_bytes(b"f" * 64 + b"\r\n")
    monkeypatch.setenv("RLBROKER_SIGNING_KEY_FILE", str(file))
    assert signing_secret() == signing_secret(file) == b"f" * 64
    assert signing_secret("k" * 32) == signing_secret(b"k" * 32) == b"k" * 32


def test_an_unusable_signing_key_is_refused_with_the_name_of_its_setting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    short, empty = tmp_path / "short", tmp_path / "empty"
    short.write_bytes(b"k" * 31 + b"\n")
    empty.write_bytes(b"\n")
    for name, wrong in (
        ("cannot read", tmp_path / "none"),
        ("is empty", empty),
        ("at least 32 bytes", short),
    ):
        with pytest.raises(InvalidArgument, match=f"^signing_key: .*{name}"):
            signing_secret(wrong)
        monkeypatch.setenv("RLBROKER_SIGNING_KEY_FILE", str(wrong))
        with pytest.raises(InvalidArgument, match=f"^RLBROKER_SIGNING_KEY_FILE: .*{name}"):
            signing_secret()
    for given in ("k" * 31, b"", ""):
        with pytest.raises(InvalidArgument, match="at least 32 bytes"):
            signing_secret(given)
    with pytest.raises(InvalidArgument, match="must be text, bytes or a Path; got int") as error:
        signing_secret(12345)  # type: ignore[arg-type]
    assert "12345" not in str(error.value)
