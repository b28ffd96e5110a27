"""Attacks with the password of worker 0: the attacker sends any command it likes, and wants more than is worker 0's.

The server has the shipped configuration and the users of `rlbroker acl`. Before and after each attack the honest
worker 1 applies a version, does a command, and its batch is collected.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import numpy as np
import pytest
import redis
from conftest import wait_until
from guarded import GuardedServer
from scene import KEYS, Scene

from rlbroker import AccessDenied, Fenced, PeerError, WorkerClient
from rlbroker.codec.message import encode
from rlbroker.control.ledger import SETTLE
from rlbroker.experience import collector
from rlbroker.membership import incarnations
from rlbroker.membership.roster import RESTORE_RUN
from rlbroker.membership.worker_ids import REGISTER

Refused = redis.exceptions.NoPermissionError


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[GuardedServer]:
    with GuardedServer("embedded", tmp_path_factory.mktemp("guarded")) as server:
        yield server


@pytest.fixture
def scene(guarded: GuardedServer) -> Iterator[Scene]:
    """A run that works, before the attack and after it."""
    scene = Scene(guarded)
    try:
        scene.check_works()
        yield scene
        scene.check_works()
    finally:
        scene.close()
        guarded.client("admin").flushall()


def refused(scene: Scene, *command: Any) -> None:
    with pytest.raises(Refused):
        scene.attacker.execute_command(*command)


def dead_letters(scene: Scene) -> Any:
    scene.collect()
    return scene.learner.dead_letters(0)


def batch(number: Any) -> dict[str, Any]:
    data = encode({"number": number})
    return {"version": 1, "rows": 1, "raw_bytes": 1, "stored_bytes": len(data), "sent_at": 0, "data": data}


def test_a_worker_cannot_publish_or_spoil_weights(scene: Scene) -> None:
    refused(scene, "HSET", KEYS.weights, "version", "99")
    refused(scene, "XADD", KEYS.control, "*", "event", "version", "version", "99")
    refused(scene, "PUBLISH", KEYS.notify, "99")
    for key in scene.admin.scan_iter(f"{KEYS.prefix}:w:*"):
        refused(scene, "SET", key, b"mine")
        refused(scene, "PEXPIRE", key, 1)


def test_a_worker_cannot_send_commands(scene: Scene) -> None:
    incarnation = scene.worker.incarnation
    refused(
        scene,
        "XADD",
        KEYS.control,
        "*",
        "event",
        "command",
        "command",
        "x",
        "name",
        "stop",
        "workers",
        "1",
        "incarnations",
        incarnation,
    )


def test_a_worker_cannot_read_forge_or_delete_batches_of_others(scene: Scene) -> None:
    scene.worker.send_experiences({"number": "precious"})
    key = KEYS.experiences(1)
    for command in (("XRANGE", key, "-", "+"), ("XDEL", key, f"{scene.worker.incarnation}-1"), ("DEL", key)):
        refused(scene, *command)
    refused(scene, "XADD", key, f"{scene.worker.incarnation}-999", "data", b"mine")
    refused(scene, "XACK", key, "learner", f"{scene.worker.incarnation}-1")
    assert wait_until("it is collected", scene.collect) == ["precious"]


def test_a_worker_cannot_acknowledge_for_another_or_fence_it(scene: Scene) -> None:
    command = scene.learner.send_control_command("noop", worker_ids=[1])
    incarnation = scene.worker.incarnation
    refused(
        scene,
        "XADD",
        KEYS.acknowledgements(1),
        f"{incarnation}-500",
        "event",
        "command",
        "command",
        command.id,
        "outcome",
        "done",
    )
    refused(scene, "XADD", KEYS.acknowledgements(1), f"{incarnation}-501", "event", "left", "version", 0)
    refused(scene, "HSET", KEYS.life(1), "incarnation", incarnation + 1)
    refused(scene, "SREM", KEYS.workers, 1)
    keys = (KEYS.life(1), KEYS.workers, KEYS.acknowledgements(1), KEYS.weights, KEYS.control, KEYS.meta)
    with pytest.raises(redis.ResponseError):
        scene.attacker.execute_command(
            *REGISTER.call((*keys, KEYS.heartbeat(1), KEYS.ledger(1)), (1, 5, 0, "token", 1))
        )
    with pytest.raises(AccessDenied):
        WorkerClient(scene.server.url("pong-worker-0"), "pong", worker_id=1)
    assert scene.worker.incarnation == incarnation
    assert scene.learner.workers()[-1].incarnation == incarnation


def test_a_worker_cannot_replace_the_learner(scene: Scene) -> None:
    refused(scene, "HSET", KEYS.meta, "epoch", "9999999999999")
    refused(scene, "HSET", KEYS.meta, "learner:learner", "9999999999999")
    refused(scene, "HSET", KEYS.epochs(0), "learner", "9999999999999")


def test_a_worker_cannot_hide_what_it_missed(scene: Scene) -> None:
    client = scene.join_as_attacker()
    for _ in range(3):
        version = scene.learner.send_model_weights({"w": np.zeros(8)}).version
    wait_until("the newest version has been noticed", lambda: client._subscriber.newest == version)
    wait_until("the newest is applied", lambda: client.poll({}) and client.version == version)
    wait_until("it is recorded", lambda: scene.learner.missed_updates()[0].by_reason)
    before = scene.learner.missed_updates()[0].by_reason
    refused(scene, "DEL", KEYS.missed)
    refused(scene, "HSET", KEYS.ledger(0), "missed:superseded", "0")
    client.close()
    assert scene.learner.missed_updates()[0].by_reason == before


@pytest.mark.parametrize(
    "data", [b"", b"RLBW", b"\x00" * 4096, encode({"x": 1})[:-3], encode({"x": 1}) + b"?", b"\xff" * 100]
)
def test_an_invalid_batch_becomes_a_dead_letter(scene: Scene, data: bytes) -> None:
    client = scene.join_as_attacker()
    scene.attacker.xadd(KEYS.experiences(0), batch(1) | {"data": data}, id=f"{client.incarnation}-1")
    (letter,) = wait_until("it is a dead letter", lambda: dead_letters(scene))
    scene.learner.purge_dead_letters([letter])
    client.close()


def test_a_batch_that_claims_to_be_huge_gets_no_memory(scene: Scene) -> None:
    client = scene.join_as_attacker()
    data = encode({"x": np.random.default_rng(0).random(1 << 20)})[:200]
    claimed = {"data": data, "raw_bytes": 2**62, "stored_bytes": 2**62}
    scene.attacker.xadd(KEYS.experiences(0), batch(1) | claimed, id=f"{client.incarnation}-1")
    wait_until("it is a dead letter", lambda: dead_letters(scene))
    client.close()


def test_highly_compressed_batches_are_decoded_one_at_a_time(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Zeros compress to almost nothing, and the sizes that the attacker claims are not trusted."""
    monkeypatch.setattr(collector, "COLLECT_BYTES", 1 << 20)
    client = scene.join_as_attacker()
    data = encode({"number": np.zeros(1 << 20, np.uint8)})
    assert len(data) < 10_000
    for sequence in range(1, 5):
        claimed = {"data": data, "raw_bytes": -(10**9), "stored_bytes": -(10**9)}
        scene.attacker.xadd(KEYS.experiences(0), batch(1) | claimed, id=f"{client.incarnation}-{sequence}")
    assert [len(wait_until("one is collected", lambda: scene.collect(0))) for _ in range(4)] == [1] * 4
    client.close()


@pytest.mark.parametrize("value", ["9" * 400, "-" + "9" * 400, "nan", ""])
@pytest.mark.parametrize("field", ["version", "rows", "sent_at"])
def test_a_batch_with_invalid_numbers_loses_no_other_batch(scene: Scene, field: str, value: str) -> None:
    client = scene.join_as_attacker()
    scene.worker.send_experiences({"number": "precious"})
    scene.attacker.xadd(KEYS.experiences(0), batch(1) | {field: value}, id=f"{client.incarnation}-1")
    scene.worker.send_experiences({"number": "too"})
    found: list[Any] = []

    def collect_both() -> bool:
        found.extend(scene.collect())
        return len(found) == 2

    wait_until("both are collected", collect_both)
    assert found == ["precious", "too"]
    wait_until("the other is a dead letter", lambda: dead_letters(scene))
    client.close()


def test_invalid_counts_do_not_stop_the_learner(scene: Scene) -> None:
    client, pairs = scene.join_as_attacker(), list[Any]()
    client.send_experiences({"number": "mine"})
    scene.worker.send_experiences({"number": "precious"})

    def collect_both() -> bool:
        pairs.extend(scene.learner.collect_experiences(timeout=0.1))
        return len(pairs) == 2

    wait_until("both are collected", collect_both)
    scene.attacker.hset(KEYS.counts(0), f"sent:{client.incarnation}", "nonsense")
    scene.learner.acknowledge(pairs)
    for sequence, handle in (
        (8, scene.learner.purge_dead_letters),
        (9, scene.learner.retry_dead_letters),
    ):
        bad = batch(1) | {"data": b"?"}
        scene.attacker.xadd(KEYS.experiences(0), bad, id=f"{client.incarnation}-{sequence}")
        letters = wait_until("it is a dead letter", lambda: dead_letters(scene))
        for field in ("dead_bytes", "retried_corrupt"):
            scene.attacker.hset(KEYS.counts(0), field, "nonsense")
        assert handle(letters) == 1
    client.close()


def test_invalid_worker_names_do_not_stay_in_memory(scene: Scene) -> None:
    before = incarnations._parse_short_id.cache_info().currsize
    for number in range(20):
        scene.attacker.sadd(KEYS.workers, f"{number}" * 100_000)
    wait_until("they are removed", lambda: scene.admin.scard(KEYS.workers) == 1)
    assert incarnations._parse_short_id.cache_info().currsize == before


@pytest.mark.parametrize("kind", ["life", "hb", "counts", "ack", "x"])
@pytest.mark.parametrize("what", ["type", "numbers"])
def test_invalid_data_in_a_workers_own_keys_harms_no_other_worker(scene: Scene, kind: str, what: str) -> None:
    client = scene.join_as_attacker()
    key = f"{KEYS.prefix}:{kind}:0"
    if what == "type":
        scene.attacker.delete(key)
        scene.attacker.hset(key, "a", "b") if kind in ("ack", "x") else scene.attacker.xadd(key, {"a": "b"})
    elif kind in ("ack", "x"):
        scene.attacker.xadd(
            key,
            batch(1) | {"event": "version", "version": 2**62, "outcome": "applied"},
            id=f"{2**63}-{2**63}",
        )
    else:
        for field in (
            "incarnation",
            "seen",
            "known_version",
            "member",
            "delivered",
            "sent",
            "version",
            "removed_bytes",
        ):
            scene.attacker.hset(key, field, chr(0x661) if field == "member" else 2**62)
    for _ in range(2):
        scene.learner.collect_experiences(timeout=0.1)
        scene.learner.missed_updates()
    scene.check_works()
    scene.attacker.delete(key)
    with suppress(Fenced):
        client.close()


def test_the_learners_scripts_obey_no_numbers_of_a_worker(scene: Scene) -> None:
    """`settle.lua` takes counts of records and of values: they must not keep it busy, or make it read too far."""
    own = (KEYS.counts(0), KEYS.experiences(0), KEYS.life(0), KEYS.experiences(0))
    for numbers in ((10**9, 0), (10**9, 2, "a", "b"), (1, 10**9), (1, -5), ("x", 1), (2**60, 1, "a")):
        scene.attacker.delete(KEYS.counts(0), KEYS.experiences(0))
        scene.attacker.hset(KEYS.counts(0), "epoch", "1")
        entry = scene.attacker.xadd(KEYS.experiences(0), {"a": "b"}, id="1-7")
        with pytest.raises(redis.ResponseError):
            scene.attacker.execute_command(
                *SETTLE.call((*own, KEYS.counts(0)), (1, entry, 0, 60, 9, *numbers))
            )
        assert scene.attacker.xlen(KEYS.experiences(0)) <= 1
    scene.attacker.delete(KEYS.experiences(0), KEYS.counts(0))


def test_the_learners_scripts_cannot_be_made_to_run_for_long(scene: Scene) -> None:
    """A text that takes quadratic time to parse would block the server for everyone."""
    own = (KEYS.counts(0), KEYS.counts(0))
    scene.attacker.execute_command(*RESTORE_RUN.call(own, (1, "x", 0, "1" * 200_000, "a", "b")))
    scene.attacker.delete(KEYS.counts(0))


def test_an_invalid_incarnation_keeps_no_command_from_others(scene: Scene) -> None:
    client = scene.join_as_attacker()
    for invalid in (
        f"0{client.incarnation}",
        f" {client.incarnation}",
        f"{client.incarnation}.0",
        "\uff19" * 13,
    ):
        scene.attacker.hset(KEYS.life(0), "incarnation", invalid)
        command = scene.learner.send_control_command("reset")
        assert 1 in command.worker_ids
        wait_until("it is done", lambda: [scene.worker.poll()] and command.outcomes()[1].state == "done")  # noqa: B023 - called at once
    with suppress(PeerError):
        client.close()


def test_a_worker_cannot_use_up_the_version_numbers(scene: Scene) -> None:
    client, before = scene.join_as_attacker(), scene.learner.version
    for claimed in (2**51, 2**40, 20_000_000):
        scene.attacker.hset(KEYS.life(0), "known_version", claimed)
        scene.learner._maintenance.send_heartbeat()
        before += 1
        assert scene.learner.send_model_weights({"w": np.zeros(8)}).version == before
    client.close()


def test_a_batch_with_a_used_number_is_refused(scene: Scene) -> None:
    client = scene.join_as_attacker()
    client.send_experiences({"number": "mine"})
    (entry,) = scene.attacker.xrange(KEYS.experiences(0))
    assert wait_until("it is collected", lambda: scene.collect(0)) == ["mine"]
    with pytest.raises(redis.ResponseError, match="equal or smaller"):
        scene.attacker.xadd(KEYS.experiences(0), entry[1], id=entry[0])
    # Under a new number it is a new batch, of the same worker.
    scene.attacker.xadd(KEYS.experiences(0), entry[1], id=f"{client.incarnation}-2")
    assert wait_until("it is collected", lambda: scene.collect(0)) == ["mine"]
    counts = scene.learner.get_queue_info()["counts"]
    assert [counts[worker].delivered for worker in (0, 1)] == [2, scene.sent]
    client.close()


def test_a_worker_learns_no_passwords(scene: Scene) -> None:
    for command in (
        ("ACL", "LIST"),
        ("ACL", "GETUSER", "admin"),
        ("CONFIG", "GET", "*"),
        ("CLIENT", "LIST"),
        ("MONITOR",),
    ):
        refused(scene, *command)


def test_a_worker_cannot_block_the_server_with_a_script_of_its_own(scene: Scene) -> None:
    refused(scene, "EVAL", "while true do end", 0)
    refused(scene, "SCRIPT", "LOAD", "while true do end")
    refused(
        scene,
        "FUNCTION",
        "LOAD",
        "#!lua name=l\nredis.register_function('f', function() while true do end end)",
    )
    refused(scene, "KEYS", "*")
    refused(scene, "CLIENT", "PAUSE", 5000)
