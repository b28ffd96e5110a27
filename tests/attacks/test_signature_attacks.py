"""Attacks on workers that have a signing key, by somebody who has everything but the key.

What the attacker can do: read and write every key of the Redis server (it may be its administrator), send whatever a
learner sends, copy what was signed before, put files into the host's cache under names that can be read or guessed,
and even make other bytes with the same XXH3 digest. It has no key, or another one. What it cannot do is have a worker
load weights, or obey a command, that its learner did not make for it.
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
from rlbroker.weights.image_store import ImageStore
from rlbroker.weights.manifest import Manifest
from rlbroker.weights.publisher import Publisher

KEY = "the key that learner and workers share"
OTHER = SigningKey(b"some other key, which the attacker made up")
GOOD, EVIL = 1.0, 666.0

Make = Callable[..., Any]


def some(value: float, count: int = 30_000) -> dict[str, Any]:
    return {"w": np.full(count, value, np.float32), "noise": np.random.default_rng(1).bytes(200)}


class Attacker:
    """Writes to the run's keys as it likes."""

    def __init__(self, server: Server, run: str, epoch: int) -> None:
        self.server, self.keys, self.epoch = server, Keys(run), epoch
        self.connection = Connection(client=server.another_client())
        self.redis = server.client

    def publish(self, value: float, *, key: SigningKey | None = None, number: int = 0) -> int:
        """Publish weights as the learner does, under a number that may be chosen."""
        publisher = Publisher(self.connection, self.keys, epoch=self.epoch, key=key)
        publisher.raise_floor(number - 1)
        version = publisher.publish(some(value), compression=False).version
        publisher.close()
        return version

    def send(self, name: str, *, key: SigningKey | None = None) -> Command:
        """Send a command as the learner does."""
        return CommandSender(self.connection, self.keys, epoch=self.epoch, key=key).send(
            name, None, None, expires_seconds=None
        )

    def point_to(self, **changes: str) -> None:
        if changes:
            self.redis.hset(self.keys.weights, mapping=changes)
        self.redis.publish(self.keys.notify, changes.get("version", "1"))

    def pointer(self) -> dict[str, str]:
        return {name.decode(): text.decode() for name, text in self.redis.hgetall(self.keys.weights).items()}

    def form(self) -> Any:
        found = Manifest.from_fields(self.pointer())
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
    made: WorkerCommunicator = learner(signing_key=KEY, host_cache=False)
    return made


@pytest.fixture
def signed_worker(worker: Make) -> Make:
    return lambda worker_id=None, **settings: worker(
        worker_id, **{"signing_key": KEY, "host_cache": False, **settings}
    )


@pytest.fixture
def attacker(server: Server, run: str, comm: WorkerCommunicator) -> Iterator[Attacker]:
    made = Attacker(server, run, comm.epoch)
    made.keys.shards = comm._keys.shards
    yield made
    made.connection.close()


def load(client: WorkerClient) -> dict[str, Any]:
    model: dict[str, Any] = {}
    client.load_weights(model, timeout=5.0)
    return model


def refused(comm: WorkerCommunicator, client: WorkerClient, why: str, model: Any = None) -> None:
    """Have the worker look until its refusal is in the ledger."""
    target = {} if model is None else model

    def recorded() -> bool:
        assert not client.poll(target)
        records = comm.missed_updates()[client.worker_id].records
        return any(why in one.detail for one in records)

    wait_until(f"it is recorded: {why}", recorded)


def takes_the_next(
    comm: WorkerCommunicator, client: WorkerClient, model: dict[str, Any], count: int = 30_000
) -> None:
    """Check that the worker takes the learner's next version, as ever."""
    version = comm.send_model_weights(some(2.0, count), compression_enabled=False).version
    wait_until("it runs", lambda: (client.poll(model), client.version == version)[1])
    assert (client.version, model["w"][0]) == (version, 2.0)


# Weights


@pytest.mark.parametrize(
    ("key", "number", "why"),
    [(None, 2, "its signature is missing"), (OTHER, 2, "signed with another key"), (None, 10**6, "missing")],
)
def test_forged_weights_are_not_loaded(
    comm: WorkerCommunicator,
    signed_worker: Make,
    attacker: Attacker,
    key: SigningKey | None,
    number: int,
    why: str,
) -> None:
    comm.send_model_weights(some(GOOD))
    client = signed_worker()
    model = load(client)
    if key is not None:  # and what it finds is no version to it, so that it counts from there
        number = attacker.publish(EVIL, key=key, number=number)
    else:
        attacker.publish(EVIL, number=number)
    refused(comm, client, why, model)
    missed = comm.missed_updates()[0]
    assert [one.why for one in missed.records] == ["refused"]
    assert (missed.total, missed.records[0].first) == (0, number)
    wait_until("it tells", lambda: comm.workers()[0].problem.startswith(f"version {number}: "))
    takes_the_next(comm, client, model)
    assert comm.version == 2  # a made-up number leaves no trace in those of the run
    assert comm.missed_updates()[0].total == 0


def collide(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have all bytes have the same digest: the attacker can find others that do."""
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
    """Both ways of fetching: small weights in one round trip, and large ones straight into place."""
    collide(monkeypatch)
    comm.send_model_weights(some(GOOD, size), compression_enabled=False)
    key = attacker.keys.chunk(attacker.form().upload, 1)
    genuine = attacker.redis.get(key)
    evil = genuine.replace(np.float32(GOOD).tobytes(), np.float32(EVIL).tobytes())
    assert len(evil) == len(genuine)
    attacker.redis.set(key, evil)
    assert EVIL in load(worker(host_cache=False))["w"]  # without a key the attack succeeds
    client = signed_worker()
    refused(comm, client, "is not what its signature speaks of")
    wait_until("the learner looks", lambda: comm._publisher.restore(unreadable_version=1))
    assert comm.version == 2  # it has noticed, and published them again
    takes_the_next(comm, client, {}, size)


def test_a_header_with_the_same_digest_is_not_decoded(
    comm: WorkerCommunicator, signed_worker: Make, attacker: Attacker, monkeypatch: pytest.MonkeyPatch
) -> None:
    collide(monkeypatch)
    comm.send_model_weights(some(GOOD))
    key = attacker.keys.chunk(attacker.form().upload, 0)
    attacker.redis.set(key, attacker.redis.get(key) + b"\0")
    refused(comm, signed_worker(), "chunk 0 of version 1 is not what its signature speaks of")


def test_forged_chunks_under_an_old_signature_are_not_loaded(
    comm: WorkerCommunicator, signed_worker: Make, attacker: Attacker, opened: ExitStack
) -> None:
    comm.send_model_weights(some(GOOD))
    genuine = attacker.pointer()
    word = genuine["signatures"].partition(":")[2]
    attacker.publish(EVIL)
    evil = attacker.pointer()
    attacker.point_to(signatures=f"{evil['upload']}:{word}")
    refused(comm, signed_worker(), "its signature is wrong")


@pytest.mark.parametrize("change", ["version", "base", "digest", "stored_bytes", "signatures"])
def test_an_altered_manifest_is_refused(
    comm: WorkerCommunicator, signed_worker: Make, attacker: Attacker, change: str
) -> None:
    comm.send_model_weights(some(GOOD))
    comm.send_model_weights(some(GOOD))
    client = signed_worker()
    model = load(client)
    fields = attacker.pointer()
    altered = {
        "version": {},
        "base": {"base": "1" if fields["base"] == "0" else "0"},
        "digest": {"digest": "0" * 32},
        "stored_bytes": {"stored_bytes": str(int(fields["stored_bytes"]) + 1)},
        "signatures": {"signatures": fields["signatures"][:-1] + "0"},
    }[change]
    attacker.point_to(**{"version": "50", **altered})
    refused(comm, client, "its signature is wrong", model)
    # Nor for a worker that has seen nothing yet, under the number that it was signed for.
    if change != "version":
        attacker.point_to(version="2")
        refused(comm, signed_worker(), "its signature is wrong")
    takes_the_next(comm, client, model)


def test_a_manifest_without_its_signature_is_refused(
    comm: WorkerCommunicator, signed_worker: Make, attacker: Attacker
) -> None:
    client = signed_worker()
    comm.send_model_weights(some(GOOD))
    assert load(client)
    comm.send_model_weights(some(GOOD))
    attacker.redis.hdel(attacker.keys.weights, "signatures")
    refused(comm, signed_worker(), "its signature is missing")
    takes_the_next(comm, client, {})


def test_weights_of_another_run_with_the_same_key_are_not_loaded(
    comm: WorkerCommunicator, signed_worker: Make, attacker: Attacker, learner: Make, run: str
) -> None:
    elsewhere = learner(run=f"{run}-other", signing_key=KEY, host_cache=False)
    elsewhere.send_model_weights(some(EVIL))
    for name in list(attacker.redis.scan_iter(f"{Keys(f'{run}-other').prefix}:w*")):
        own = name.decode().replace(f"{run}-other", run)
        if attacker.redis.type(name) == b"hash":
            attacker.redis.hset(own, mapping=attacker.redis.hgetall(name))
        elif attacker.redis.type(name) == b"string":
            attacker.redis.set(own, attacker.redis.get(name), ex=60)
    attacker.point_to()
    client = signed_worker()
    refused(comm, client, "its signature is wrong")
    takes_the_next(comm, client, {})


def test_a_running_worker_never_loads_an_older_version(
    comm: WorkerCommunicator, signed_worker: Make, attacker: Attacker
) -> None:
    comm.send_model_weights(some(EVIL))  # which the learner has learned to be bad
    old = attacker.pointer()
    comm.send_model_weights(some(GOOD))
    client = signed_worker()
    model = load(client)
    attacker.redis.delete(attacker.keys.weights)
    attacker.point_to(**old)
    with pytest.raises(DeadlineExceeded, match="older than 2, which was here before"):
        client.load_weights({}, timeout=1.5)
    assert not client.poll(model)
    assert client.version == 2
    takes_the_next(comm, client, model)


def test_the_base_of_a_delta_must_be_signed_too(
    comm: WorkerCommunicator, signed_worker: Make, attacker: Attacker
) -> None:
    first = some(GOOD)
    comm.send_model_weights(first)
    first["w"][:10] = 2.0
    assert comm.send_model_weights(first).kind == "delta"
    fields = attacker.pointer()
    attacker.publish(EVIL)
    evil = attacker.form()
    attacker.point_to(**{**fields, "others": fields["others"].replace(*whole_form(fields, evil))})
    refused(comm, signed_worker(), "its signature is missing")


def whole_form(fields: dict[str, str], evil: Any) -> tuple[str, str]:
    """Give the word of the whole version 1, and one of the attacker's in its place."""
    return fields["others"], f"1:0:{evil.upload}:{evil.chunks}:{evil.stored_bytes}:{evil.digest}"


def test_a_cached_image_from_a_process_without_the_key_is_not_used(
    comm: WorkerCommunicator, signed_worker: Make, attacker: Attacker, run: str, tmp_path: Path
) -> None:
    comm.send_model_weights(some(GOOD))
    form = attacker.form()
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
    comm.send_model_weights(some(GOOD))
    comm.cleanup()
    attacker.publish(EVIL)
    again = learner(signing_key=KEY, host_cache=False)
    assert again.version == 0
    client = signed_worker()
    model: dict[str, Any] = {}
    takes_the_next(again, client, model)
    assert again.version == 3
    assert "signatures" in attacker.pointer()


@pytest.mark.parametrize(
    "written",
    [{"version": "many"}, {"version": ""}, {"others": "x"}, {"upload": "\xff/.."}, {"version": "9" * 40}],
)
def test_an_invalid_manifest_keeps_no_learner_from_publishing(
    comm: WorkerCommunicator, signed_worker: Make, attacker: Attacker, written: dict[str, str]
) -> None:
    comm.send_model_weights(some(GOOD))
    client = signed_worker()
    model = load(client)
    attacker.point_to(**{"version": "7", **written})
    takes_the_next(comm, client, model)
    assert comm.version == 2


# Commands


@pytest.mark.parametrize("key", [None, OTHER])
def test_a_forged_command_is_not_done(
    comm: WorkerCommunicator, signed_worker: Make, attacker: Attacker, key: SigningKey | None
) -> None:
    client = signed_worker()
    command = attacker.send("stop", key=key)
    why = "signed with another key" if key else "its signature is missing"
    refused(comm, client, why)
    assert client.running
    assert command.outcomes()[0].state == "failed"
    assert why in command.outcomes()[0].detail
    [record] = comm.missed_updates()[0].records
    assert (record.what, record.why, record.command) == ("command", "refused", f"{command.id} stop")


def test_a_forged_command_unknown_to_the_ledger_is_recorded(
    comm: WorkerCommunicator, signed_worker: Make, attacker: Attacker
) -> None:
    client = signed_worker()
    attacker.put_command(
        {"event": "command", "command": "x" * 5000, "name": "stop", "workers": "0", "data": b"?"}
    )
    refused(comm, client, "its signature is missing")
    assert client.running
    [record] = comm.missed_updates()[0].records
    assert (record.what, record.why, len(record.command)) == ("command", "refused", 200 + len(" stop"))


def test_an_old_stop_does_not_stop_a_later_incarnation(
    comm: WorkerCommunicator, signed_worker: Make, attacker: Attacker
) -> None:
    first = signed_worker(0)
    command = comm.send_control_command("stop")
    wait_until("it stops", lambda: first.poll() or not first.running)
    wait_until("it is settled", lambda: command.outcomes()[0].state == "done")
    first.close()
    second = signed_worker(0)
    [sent] = attacker.commands()
    for life in (sent["incarnations"], str(second.incarnation), "0", ""):
        attacker.put_command({**sent, "incarnations": life})
    refused(comm, second, "signed for others, or for an earlier incarnation")
    attacker.put_command({**sent, "incarnations": "0", "signed_for": f"0:{second.incarnation}"})
    refused(comm, second, "its signature is wrong")
    assert second.running


@pytest.mark.parametrize(
    "change", ["data", "name", "expires_seconds", "command", "arguments", "signature", "run"]
)
def test_an_altered_command_is_not_done(
    comm: WorkerCommunicator, signed_worker: Make, attacker: Attacker, learner: Make, run: str, change: str
) -> None:
    told: list[Any] = []
    client = signed_worker()
    client.on_command("level", told.append)
    command = comm.send_control_command("level", {"to": 1}, expires=60.0)
    wait_until("it obeys", lambda: client.poll() or told)
    wait_until("it is settled", lambda: command.outcomes()[0].state == "done")
    [sent] = attacker.commands()
    comm.send_control_command("level", {"to": 2})
    wait_until("it obeys", lambda: client.poll() or len(told) == 2)
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
    refused(comm, client, "its signature is " + ("missing" if change == "signature" else "wrong"))
    assert len(told) == 2
    assert client.running


def test_a_command_for_another_worker_is_not_done(
    comm: WorkerCommunicator, signed_worker: Make, attacker: Attacker
) -> None:
    clients = [signed_worker(0), signed_worker(1)]
    comm.send_control_command("stop", worker_ids=[0])
    wait_until("it stops", lambda: clients[0].poll() or not clients[0].running)
    [sent] = attacker.commands()
    attacker.put_command({**sent, "workers": "1", "incarnations": str(clients[1].incarnation)})
    refused(comm, clients[1], "signed for others")
    both = sent["signed_for"].decode() + f",1:{clients[1].incarnation}"
    attacker.put_command({**sent, "workers": "1", "incarnations": "0", "signed_for": both})
    refused(comm, clients[1], "its signature is wrong")
    assert clients[1].running


def test_a_flood_of_forged_commands_makes_no_worker_repeat_a_command(
    comm: WorkerCommunicator, signed_worker: Make, attacker: Attacker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inbox, "REMEMBERED", 5)
    monkeypatch.setattr(command_signature, "REFUSED_REMEMBERED", 5)
    told: list[Any] = []
    client = signed_worker()
    client.on_command("level", told.append)
    comm.send_control_command("level", {"to": 1})
    wait_until("it obeys", lambda: client.poll() or told)
    [sent] = attacker.commands()
    for number in range(command_signature.REFUSALS_REPORTED + 20):
        attacker.put_command({**sent, "command": f"forged-{number}"})
    attacker.put_command(sent)
    last = comm.send_control_command("level", {"to": 2})
    wait_until("it has read all of them", lambda: client.poll() or last.outcomes()[0].state == "done")
    assert told == [{"to": 1}, {"to": 2}]
    assert comm.missed_updates()[0].total == 0
    assert len(comm.missed_updates()[0].records) <= command_signature.REFUSALS_REPORTED


def test_a_signature_for_weights_is_not_valid_for_a_command() -> None:
    key = SigningKey(KEY.encode())
    assert key.sign("weights", "a", 1) != key.sign("command", "a", 1)
