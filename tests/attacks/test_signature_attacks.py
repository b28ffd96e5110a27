"""Attacks on workers with a signing key, by an attacker that has everything but the key.

The attacker can read and write every key of the Redis server (it may be its administrator), send everything that a
learner sends, copy what was signed before, put files into the host cache under names that it can read or guess, and
even find other bytes with the same XXH3 digest. It has no signing key, or another one. It cannot make a worker load
weights or do a command that the worker's learner did not make for it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xxhash
from conftest import Server, wait_until

from rlbroker import Command, DeadlineExceeded, WorkerClient, WorkerCommunicator
from rlbroker.backend.connection import Connection
from rlbroker.backend.keys import Keys
from rlbroker.codec import format as wire_format
from rlbroker.codec import image as wire_image
from rlbroker.codec.signing import SigningKey
from rlbroker.control import command_signature, inbox
from rlbroker.control.commands import CommandSender
from rlbroker.weights.host_cache import ImageStore
from rlbroker.weights.manifest import Manifest
from rlbroker.weights.publisher import Publisher

KEY = "the key that learner and workers share"
OTHER = SigningKey(b"some other key, which the attacker made up")
GOOD, EVIL = 1.0, 666.0

Make = Callable[..., Any]


def make_weights(value: float, count: int = 30_000) -> dict[str, Any]:
    return {"w": np.full(count, value, np.float32), "noise": np.random.default_rng(1).bytes(200)}


class Attacker:
    """Writes to any key of the run."""

    def __init__(self, server: Server, run: str, epoch: int) -> None:
        self.server, self.keys, self.epoch = server, Keys(run), epoch
        self.connection = Connection(client=server.another_client())
        self.redis = server.client

    def publish(self, value: float, *, key: SigningKey | None = None, number: int = 0) -> int:
        """Publish weights as a learner does, under the next version or a chosen one."""
        publisher = Publisher(self.connection, self.keys, epoch=self.epoch, key=key)
        publisher.mark_used(number - 1)
        version = publisher.publish(make_weights(value), compression=False).version
        publisher.close()
        return version

    def send(self, name: str, *, key: SigningKey | None = None) -> Command:
        """Send a command as a learner does."""
        return CommandSender(self.connection, self.keys, epoch=self.epoch, key=key).send(
            name, None, None, expires_seconds=None
        )

    def change_manifest(self, **changes: str) -> None:
        """Change fields of the manifest, and publish the notice of a version."""
        if changes:
            self.redis.hset(self.keys.weights, mapping=changes)
        self.redis.publish(self.keys.notify, changes.get("version", "1"))

    def manifest_fields(self) -> dict[str, str]:
        return {name.decode(): text.decode() for name, text in self.redis.hgetall(self.keys.weights).items()}

    def stored_form(self) -> Any:
        found = Manifest.from_fields(self.manifest_fields())
        assert found
        return found.latest

    def commands(self) -> list[dict[str, bytes]]:
        entries = self.redis.xrange(self.keys.control)
        found = [{name.decode(): value for name, value in fields.items()} for _, fields in entries]
        return [fields for fields in found if fields["event"] == b"command"]

    def put_command(self, fields: dict[str, Any]) -> None:
        self.redis.xadd(self.keys.control, fields)


@pytest.fixture
def comm(learner: Make) -> WorkerCommunicator:
    comm: WorkerCommunicator = learner(signing_key=KEY, host_cache=False)
    return comm


@pytest.fixture
def signed_worker(worker: Make) -> Make:
    return lambda worker_id=None, **settings: worker(
        worker_id, **{"signing_key": KEY, "host_cache": False, **settings}
    )


@pytest.fixture
def attacker(server: Server, run: str, comm: WorkerCommunicator) -> Iterator[Attacker]:
    attacker = Attacker(server, run, comm.epoch)
    attacker.keys.shards = comm._keys.shards
    yield attacker
    attacker.connection.close()


def load(client: WorkerClient) -> dict[str, Any]:
    model: dict[str, Any] = {}
    client.load_weights(model, timeout=5.0)
    return model


def wait_for_refusal(comm: WorkerCommunicator, client: WorkerClient, reason: str, model: Any = None) -> None:
    """Let the worker poll until its refusal is in the ledger."""
    target = {} if model is None else model

    def recorded() -> bool:
        assert not client.poll(target)
        records = comm.missed_updates()[client.worker_id].records
        return any(reason in one.detail for one in records)

    wait_until(f"the refusal is recorded: {reason}", recorded)


def check_next_version(
    comm: WorkerCommunicator, client: WorkerClient, model: dict[str, Any], count: int = 30_000
) -> None:
    """Check that the worker applies the learner's next version."""
    version = comm.send_model_weights(make_weights(2.0, count), compression_enabled=False).version
    wait_until("it is applied", lambda: (client.poll(model), client.version == version)[1])
    assert (client.version, model["w"][0]) == (version, 2.0)


# Weights


@pytest.mark.parametrize(
    ("key", "number", "reason"),
    [(None, 2, "its signature is missing"), (OTHER, 2, "signed with another key"), (None, 10**6, "missing")],
)
def test_forged_weights_are_not_loaded(
    comm: WorkerCommunicator,
    signed_worker: Make,
    attacker: Attacker,
    key: SigningKey | None,
    number: int,
    reason: str,
) -> None:
    comm.send_model_weights(make_weights(GOOD))
    client = signed_worker()
    model = load(client)
    if key is not None:  # it does not count versions of another key, and starts at the given number
        number = attacker.publish(EVIL, key=key, number=number)
    else:
        attacker.publish(EVIL, number=number)
    wait_for_refusal(comm, client, reason, model)
    missed = comm.missed_updates()[0]
    assert [one.why for one in missed.records] == ["refused"]
    assert (missed.total, missed.records[0].first) == (0, number)
    wait_until("a heartbeat reports it", lambda: comm.workers()[0].problem.startswith(f"version {number}: "))
    check_next_version(comm, client, model)
    assert comm.version == 2  # a forged version does not change the run's version numbers
    assert comm.missed_updates()[0].total == 0


def collide(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make all digests equal, as if the attacker could find collisions."""
    monkeypatch.setattr(xxhash, "xxh3_128_hexdigest", lambda data: "c0ffee")
    for module in (wire_format, wire_image):
        monkeypatch.setattr(module, "digest_of", lambda data: 7)


@pytest.mark.parametrize("size", [30_000, 600_000])
def test_a_chunk_with_the_same_digest_is_not_decoded(
    comm: WorkerCommunicator,
    signed_worker: Make,
    worker: Make,
    attacker: Attacker,
    monkeypatch: pytest.MonkeyPatch,
    size: int,
) -> None:
    """Small weights are fetched in one round trip, and large ones directly into place."""
    collide(monkeypatch)
    comm.send_model_weights(make_weights(GOOD, size), compression_enabled=False)
    key = attacker.keys.chunk(attacker.stored_form().upload, 1)
    genuine = attacker.redis.get(key)
    evil = genuine.replace(np.float32(GOOD).tobytes(), np.float32(EVIL).tobytes())
    assert len(evil) == len(genuine)
    attacker.redis.set(key, evil)
    assert EVIL in load(worker(host_cache=False))["w"]  # without a signing key the attack succeeds
    client = signed_worker()
    wait_for_refusal(comm, client, "does not match its signature")
    wait_until("the learner has checked its chunks", lambda: comm._publisher.restore(unreadable_version=1))
    assert comm.version == 2  # it noticed, and published the weights again
    check_next_version(comm, client, {}, size)


def test_a_header_with_the_same_digest_is_not_decoded(
    comm: WorkerCommunicator, signed_worker: Make, attacker: Attacker, monkeypatch: pytest.MonkeyPatch
) -> None:
    collide(monkeypatch)
    comm.send_model_weights(make_weights(GOOD))
    key = attacker.keys.chunk(attacker.stored_form().upload, 0)
    attacker.redis.set(key, attacker.redis.get(key) + b"\0")
    wait_for_refusal(comm, signed_worker(), "chunk 0 of version 1 does not match its signature")


def test_forged_chunks_under_an_old_signature_are_not_loaded(
    comm: WorkerCommunicator, signed_worker: Make, attacker: Attacker, opened: ExitStack
) -> None:
    comm.send_model_weights(make_weights(GOOD))
    genuine = attacker.manifest_fields()
    word = genuine["signatures"].partition(":")[2]
    attacker.publish(EVIL)
    evil = attacker.manifest_fields()
    attacker.change_manifest(signatures=f"{evil['upload']}:{word}")
    wait_for_refusal(comm, signed_worker(), "its signature is wrong")


@pytest.mark.parametrize("change", ["version", "base", "digest", "stored_bytes", "signatures"])
def test_an_altered_manifest_is_refused(
    comm: WorkerCommunicator, signed_worker: Make, attacker: Attacker, change: str
) -> None:
    comm.send_model_weights(make_weights(GOOD))
    comm.send_model_weights(make_weights(GOOD))
    client = signed_worker()
    model = load(client)
    fields = attacker.manifest_fields()
    altered = {
        "version": {},
        "base": {"base": "1" if fields["base"] == "0" else "0"},
        "digest": {"digest": "0" * 32},
        "stored_bytes": {"stored_bytes": str(int(fields["stored_bytes"]) + 1)},
        "signatures": {"signatures": fields["signatures"][:-1] + "0"},
    }[change]
    attacker.change_manifest(**{"version": "50", **altered})
    wait_for_refusal(comm, client, "its signature is wrong", model)
    # Nor does a new worker load it, under the version that it was signed for.
    if change != "version":
        attacker.change_manifest(version="2")
        wait_for_refusal(comm, signed_worker(), "its signature is wrong")
    check_next_version(comm, client, model)


def test_a_manifest_without_its_signature_is_refused(
    comm: WorkerCommunicator, signed_worker: Make, attacker: Attacker
) -> None:
    client = signed_worker()
    comm.send_model_weights(make_weights(GOOD))
    assert load(client)
    comm.send_model_weights(make_weights(GOOD))
    attacker.redis.hdel(attacker.keys.weights, "signatures")
    wait_for_refusal(comm, signed_worker(), "its signature is missing")
    check_next_version(comm, client, {})


def test_weights_of_another_run_with_the_same_key_are_not_loaded(
    comm: WorkerCommunicator, signed_worker: Make, attacker: Attacker, learner: Make, run: str
) -> None:
    elsewhere = learner(run=f"{run}-other", signing_key=KEY, host_cache=False)
    elsewhere.send_model_weights(make_weights(EVIL))
    for name in list(attacker.redis.scan_iter(f"{Keys(f'{run}-other').prefix}:w*")):
        own = name.decode().replace(f"{run}-other", run)
        if attacker.redis.type(name) == b"hash":
            attacker.redis.hset(own, mapping=attacker.redis.hgetall(name))
        elif attacker.redis.type(name) == b"string":
            attacker.redis.set(own, attacker.redis.get(name), ex=60)
    attacker.change_manifest()
    client = signed_worker()
    wait_for_refusal(comm, client, "its signature is wrong")
    check_next_version(comm, client, {})


def test_a_running_worker_never_loads_an_older_version(
    comm: WorkerCommunicator, signed_worker: Make, attacker: Attacker
) -> None:
    comm.send_model_weights(make_weights(EVIL))  # an old version that the learner has replaced
    old = attacker.manifest_fields()
    comm.send_model_weights(make_weights(GOOD))
    client = signed_worker()
    model = load(client)
    attacker.redis.delete(attacker.keys.weights)
    attacker.change_manifest(**old)
    with pytest.raises(DeadlineExceeded, match="older than 2, which this worker has seen"):
        client.load_weights({}, timeout=1.5)
    assert not client.poll(model)
    assert client.version == 2
    check_next_version(comm, client, model)


def test_the_base_of_a_delta_must_be_signed_too(
    comm: WorkerCommunicator, signed_worker: Make, attacker: Attacker
) -> None:
    first = make_weights(GOOD)
    comm.send_model_weights(first)
    first["w"][:10] = 2.0
    assert comm.send_model_weights(first).kind == "delta"
    fields = attacker.manifest_fields()
    attacker.publish(EVIL)
    evil = attacker.stored_form()
    attacker.change_manifest(**{**fields, "others": fields["others"].replace(*forged_base(fields, evil))})
    wait_for_refusal(comm, signed_worker(), "its signature is missing")


def forged_base(fields: dict[str, str], evil: Any) -> tuple[str, str]:
    """Return the word of the full version 1, and a forged one that replaces it."""
    return fields["others"], f"1:0:{evil.upload}:{evil.chunks}:{evil.stored_bytes}:{evil.digest}"


def test_a_cached_image_from_a_process_without_the_key_is_not_used(
    comm: WorkerCommunicator, signed_worker: Make, attacker: Attacker, run: str, tmp_path: Path
) -> None:
    comm.send_model_weights(make_weights(GOOD))
    form = attacker.stored_form()
    header = attacker.redis.get(attacker.keys.chunk(form.upload, 0))
    genuine = load(signed_worker())
    poisoner = ImageStore(run, tmp_path)
    names = [form.name_of_image(None, run), form.name_of_image(OTHER, run)]
    names += [f"{form.upload}-{form.signature.partition(':')[2]}"]
    kept = []
    for name in names:
        draft = poisoner.reserve(150_000, 150_000)
        draft.array[:] = 0xEE
        kept.append(draft.publish(name, header))
        assert poisoner.find(name, 150_000)
    assert np.array_equal(load(signed_worker(host_cache=tmp_path))["w"], genuine["w"])
    poisoner.close()


# A learner


def test_a_restarted_learner_does_not_continue_from_forged_weights(
    comm: WorkerCommunicator, learner: Make, signed_worker: Make, attacker: Attacker
) -> None:
    comm.send_model_weights(make_weights(GOOD))
    comm.cleanup()
    attacker.publish(EVIL)
    restarted = learner(signing_key=KEY, host_cache=False)
    assert restarted.version == 0
    client = signed_worker()
    model: dict[str, Any] = {}
    check_next_version(restarted, client, model)
    assert restarted.version == 3
    assert "signatures" in attacker.manifest_fields()


@pytest.mark.parametrize(
    "written",
    [{"version": "many"}, {"version": ""}, {"others": "x"}, {"upload": "\xff/.."}, {"version": "9" * 40}],
)
def test_an_invalid_manifest_keeps_no_learner_from_publishing(
    comm: WorkerCommunicator, signed_worker: Make, attacker: Attacker, written: dict[str, str]
) -> None:
    comm.send_model_weights(make_weights(GOOD))
    client = signed_worker()
    model = load(client)
    attacker.change_manifest(**{"version": "7", **written})
    check_next_version(comm, client, model)
    assert comm.version == 2


# Commands


@pytest.mark.parametrize("key", [None, OTHER])
def test_a_forged_command_is_not_done(
    comm: WorkerCommunicator, signed_worker: Make, attacker: Attacker, key: SigningKey | None
) -> None:
    client = signed_worker()
    command = attacker.send("stop", key=key)
    reason = "signed with another key" if key else "its signature is missing"
    wait_for_refusal(comm, client, reason)
    assert client.running
    assert command.outcomes()[0].state == "failed"
    assert reason in command.outcomes()[0].detail
    [record] = comm.missed_updates()[0].records
    assert (record.what, record.why, record.command) == ("command", "refused", f"{command.id} stop")


def test_a_forged_command_unknown_to_the_ledger_is_recorded(
    comm: WorkerCommunicator, signed_worker: Make, attacker: Attacker
) -> None:
    client = signed_worker()
    attacker.put_command(
        {"event": "command", "command": "x" * 5000, "name": "stop", "workers": "0", "data": b"?"}
    )
    wait_for_refusal(comm, client, "its signature is missing")
    assert client.running
    [record] = comm.missed_updates()[0].records
    assert (record.what, record.why, len(record.command)) == ("command", "refused", 200 + len(" stop"))


def test_an_old_stop_does_not_stop_a_later_incarnation(
    comm: WorkerCommunicator, signed_worker: Make, attacker: Attacker
) -> None:
    first = signed_worker(0)
    command = comm.send_control_command("stop", worker_ids=[0])
    wait_until("it stops", lambda: first.poll() or not first.running)
    wait_until("it is settled", lambda: command.outcomes()[0].state == "done")
    first.close()
    second = signed_worker(0)
    [sent] = attacker.commands()
    for incarnation in (sent["incarnations"], str(second.incarnation), "0", ""):
        attacker.put_command({**sent, "incarnations": incarnation})
    wait_for_refusal(comm, second, "signed for others, or for an earlier incarnation")
    attacker.put_command({**sent, "incarnations": "0", "signed_for": f"0:{second.incarnation}"})
    wait_for_refusal(comm, second, "its signature is wrong")
    assert second.running


@pytest.mark.parametrize(
    "change", ["data", "name", "expires_seconds", "command", "arguments", "signature", "run"]
)
def test_an_altered_command_is_not_done(
    comm: WorkerCommunicator, signed_worker: Make, attacker: Attacker, learner: Make, run: str, change: str
) -> None:
    received: list[Any] = []
    client = signed_worker()
    client.on_command("level", received.append)
    command = comm.send_control_command("level", {"to": 1}, expires=60.0)
    wait_until("it is done", lambda: client.poll() or received)
    wait_until("it is settled", lambda: command.outcomes()[0].state == "done")
    [sent] = attacker.commands()
    comm.send_control_command("level", {"to": 2})
    wait_until("it is done", lambda: client.poll() or len(received) == 2)
    other = attacker.commands()[1]
    altered: dict[str, Any] = dict(sent)
    if change in ("data", "arguments"):
        altered[change] = other[change]
    elif change == "signature":
        del altered["signature"]
    elif change == "run":
        elsewhere = learner(run=f"{run}-other", signing_key=KEY)
        signed_worker(0, run=f"{run}-other")
        elsewhere.send_control_command("level", {"to": 1})
        [(_, fields)] = attacker.redis.xrange(Keys(f"{run}-other").control)
        altered = {name.decode(): value for name, value in fields.items()}
        altered |= {"incarnations": str(client.incarnation)}
    else:
        altered[change] = {"name": "stop", "expires_seconds": "0"}.get(change, "0123456789ab")
    attacker.put_command(altered)
    wait_for_refusal(comm, client, "its signature is " + ("missing" if change == "signature" else "wrong"))
    assert len(received) == 2
    assert client.running


def test_a_command_for_another_worker_is_not_done(
    comm: WorkerCommunicator, signed_worker: Make, attacker: Attacker
) -> None:
    clients = [signed_worker(0), signed_worker(1)]
    comm.send_control_command("stop", worker_ids=[0])
    wait_until("it stops", lambda: clients[0].poll() or not clients[0].running)
    [sent] = attacker.commands()
    attacker.put_command({**sent, "workers": "1", "incarnations": str(clients[1].incarnation)})
    wait_for_refusal(comm, clients[1], "signed for others")
    both = sent["signed_for"].decode() + f",1:{clients[1].incarnation}"
    attacker.put_command({**sent, "workers": "1", "incarnations": "0", "signed_for": both})
    wait_for_refusal(comm, clients[1], "its signature is wrong")
    assert clients[1].running


def test_a_flood_of_forged_commands_makes_no_worker_repeat_a_command(
    comm: WorkerCommunicator, signed_worker: Make, attacker: Attacker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inbox, "REMEMBERED", 5)
    monkeypatch.setattr(command_signature, "REFUSED_REMEMBERED", 5)
    received: list[Any] = []
    client = signed_worker()
    client.on_command("level", received.append)
    comm.send_control_command("level", {"to": 1})
    wait_until("it is done", lambda: client.poll() or received)
    [sent] = attacker.commands()
    for number in range(command_signature.REFUSALS_REPORTED + 20):
        attacker.put_command({**sent, "command": f"forged-{number}"})
    attacker.put_command(sent)
    last = comm.send_control_command("level", {"to": 2})
    wait_until("it has read all of them", lambda: client.poll() or last.outcomes()[0].state == "done")
    assert received == [{"to": 1}, {"to": 2}]
    assert comm.missed_updates()[0].total == 0
    assert len(comm.missed_updates()[0].records) <= command_signature.REFUSALS_REPORTED


def test_a_signature_for_weights_is_not_valid_for_a_command() -> None:
    key = SigningKey(KEY.encode())
    assert key.sign("weights", "a", 1) != key.sign("command", "a", 1)
