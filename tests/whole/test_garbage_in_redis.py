"""Garbage in any field of any key of a run ends in a typed error or is treated as absent, never in anything else."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import redis
from conftest import wait_until
from crashed import end_at_once
from typer.testing import CliRunner

from rlbroker import IncompatibleFormat, RlbrokerError, WorkerClient, WorkerCommunicator
from rlbroker.backend.keys import Keys
from rlbroker.backend.replies import stored_integer
from rlbroker.local.embedded_server import RedisServer
from rlbroker.ops.cli.app import app
from rlbroker.ops.cli.exit_codes import EXIT_BUG

RUN = "garbage"

#: What no field of rlbroker's holds. The last are digits for Python, though not for the server.
GARBAGE: list[Any] = [
    "x",
    "",
    "1.5",
    "nan",
    "-1",
    "9" * 5000,
    "1e400",
    "01",
    b"\xff\xfe",
    "\u0661",
    "1 2 3",
    "a:b:c",
    "{",
    "18446744073709551616",
]

#: Commands that read a run, by the keys that they read beside those of every command.
COMMANDS = {
    "": [["status", "--json"], ["report", "--json"]],
    "meta": [["runs"], ["workers"], ["doctor"], ["check"], ["control", "pause", "--timeout", "0.5"]],
    "weights": [["weights", "list"], ["weights", "show"]],
    "w": [["weights", "show"]],
    "ctl": [["control", "list"]],
    "pending": [["control", "list"]],
    "outcomes": [["control", "list"]],
    "missed": [["missed", "--json"], ["control", "list"]],
    "ledger": [["missed", "--json"], ["control", "list"]],
    "ack": [["control", "list"]],
    "x": [["experiences", "peek"], ["experiences", "peek", "--json"]],
    "dead": [["dead", "list"], ["dead", "list", "--json"]],
    "hb": [["workers", "--json"]],
    "life": [["workers"], ["prune", "--dry-run"]],
}


def learner_calls(comm: WorkerCommunicator) -> list[Callable[[], Any]]:
    return [
        comm.collect_experiences,
        lambda: comm.collect_round(timeout=0.1),
        comm.workers,
        comm.missed_updates,
        comm.get_queue_info,
        comm.dead_letters,
        comm.marks,
        lambda: comm.send_control_command("reset").outcomes(),
        lambda: comm.send_model_weights({"w": np.zeros(10)}).wait_applied(timeout=0.1),
    ]


def worker_calls(worker: WorkerClient) -> list[Callable[[], Any]]:
    return [
        lambda: worker.poll({}),
        lambda: worker.load_weights({}, timeout=0.3),
        lambda: worker.wait_for_weights({}, timeout=0.1),
        worker.take_weights,
        lambda: worker.send_experiences({"x": np.zeros(3)}, timeout=0.3),
        lambda: worker.flush(0.3),
    ]


@dataclass
class Spoilt:
    """A server with a run that has something in every key; its processes have ended.

    Attributes:
        url: the server's.
        client: reads and writes its keys.
        keys: the value of each key, as DUMP returns it, and its lifetime in milliseconds.
    """

    url: str
    client: Any
    keys: dict[bytes, tuple[bytes, int]]

    def fields(self, kind: str) -> list[tuple[bytes, bytes]]:
        """Return the keys of one kind with their fields; those of a stream are the fields of its entries."""
        self.restore()
        found = []
        for key in sorted(self.keys):
            if short(key).partition(":")[0] != kind or key.endswith(
                tuple(b":%d" % n for n in (1, 10, 60, 600))
            ):
                continue
            names = {
                "hash": lambda key=key: self.client.hkeys(key),
                "stream": lambda key=key: {one for _, entry in self.client.xrange(key) for one in entry},
            }.get(self.client.type(key).decode(), lambda: [b""])()
            found += [(key, name) for name in sorted(names)]
        return found

    def restore(self) -> None:
        """Write everything back."""
        self.client.flushall()
        for key, (data, lifetime) in self.keys.items():
            self.client.restore(key, lifetime, data)

    def spoil(self, key: bytes, name: bytes, value: Any) -> None:
        """Write a value into one field; for a stream, into a copy of its last entry."""
        kind = self.client.type(key).decode()
        if kind == "hash":
            self.client.hset(key, name, value)
        elif kind == "stream":
            (incarnation, number), entry = (lambda one: (one[0].split(b"-"), one[1]))(
                self.client.xrevrange(key, count=1)[0]
            )
            self.client.xadd(key, {**entry, name: value}, id=b"%b-%d" % (incarnation, int(number) + 1))
        elif kind == "set":
            self.client.sadd(key, value)
        else:
            self.client.set(key, value, keepttl=True)


def short(key: bytes) -> str:
    """Return a key without the name of its run."""
    return key.decode().partition("}:")[2]


@pytest.fixture(scope="module")
def spoilt() -> Iterator[Spoilt]:
    with RedisServer() as server, redis.Redis.from_url(server.url, protocol=2) as client:
        settings: dict[str, Any] = {"redis_url": server.url, "run": RUN, "timeout": 5.0}
        comm = WorkerCommunicator(2, **settings, acknowledge="manual", max_deliveries=1)
        worker = WorkerClient(worker_id=0, **settings)
        for fill in (np.zeros, np.ones):
            comm.send_model_weights({"w": fill(10)})
        worker.load_weights({})
        comm.send_control_command("reset")
        worker.poll({})
        comm.send_control_command("unheard")
        worker.send_experiences({"n": 0})
        queue = Keys(RUN).experiences(0)
        _, entry = client.xrevrange(queue, count=1)[0]
        client.xadd(queue, {**entry, b"data": b"x"}, id=f"{worker.incarnation}-2")
        wait_until(
            "a batch is a dead letter", lambda: comm.collect_experiences(timeout=0.2) or comm.dead_letters()
        )
        for number in range(3, 5):
            client.xadd(queue, entry, id=f"{worker.incarnation}-{number}")
        wait_until("a sample is recorded", lambda: client.exists(Keys(RUN).history(1)))
        wait_until("the outcome is recorded", lambda: comm.missed_updates()[0].records)
        for thread in (
            comm._thread,
            worker._heartbeat._thread,
            worker._inbox._thread,
            worker._subscriber._thread,
        ):
            thread.stop(5.0)
        every = list(client.scan_iter(Keys(RUN).everything))
        yield Spoilt(server.url, client, {key: (client.dump(key), max(0, client.pttl(key))) for key in every})
        end_at_once(worker)
        end_at_once(comm)


#: The kinds of keys: the first word of their names.
KINDS = [
    *(
        "meta",
        "weights",
        "w",
        "ctl",
        "pending",
        "outcomes",
        "missed",
        "ledger",
        "ack",
        "x",
        "dead",
        "hb",
        "life",
    ),
    *("counts", "epochs", "history", "workers"),
]


def attempt(call: Callable[[], Any]) -> None:
    """Call it; only an error of rlbroker may be raised."""
    with suppress(RlbrokerError):
        call()


def trial(spoilt: Spoilt, kind: str, full: bool) -> Iterator[tuple[str, Any]]:
    """Put garbage into one field after the other, one kind of it or with --full two; yield which and what."""
    for number, (key, name) in enumerate(spoilt.fields(kind), KINDS.index(kind)):
        values = GARBAGE[number % len(GARBAGE)], GARBAGE[(5 * number + 7) % len(GARBAGE)]
        for value in values if full else values[:1]:
            spoilt.restore()
            spoilt.spoil(key, name, value)
            yield f"{short(key)}.{name.decode()}", value


def test_all_keys_of_the_run_are_tried(spoilt: Spoilt) -> None:
    assert {short(key).partition(":")[0] for key in spoilt.keys} - {"again", "shards"} == set(KINDS)


@pytest.mark.parametrize("kind", KINDS)
def test_commands_take_garbage_for_absent_or_say_so(spoilt: Spoilt, kind: str, full: bool) -> None:
    for _, value in trial(spoilt, kind, full):
        for command in (*COMMANDS[""], *COMMANDS.get(kind, ())):
            named = () if command[0] in ("runs", "prune") else ("--run", RUN)
            found = CliRunner().invoke(app, [*command, "--url", spoilt.url, *named])
            assert found.exit_code != EXIT_BUG, (value, found.output)
            assert found.exception is None or isinstance(found.exception, SystemExit), value


@pytest.mark.parametrize("kind", KINDS)
def test_clients_take_garbage_for_absent_or_say_so(spoilt: Spoilt, kind: str, full: bool) -> None:
    settings: dict[str, Any] = {"redis_url": spoilt.url, "run": RUN, "timeout": 0.5}

    def learn() -> None:
        with WorkerCommunicator(1, **settings) as comm:
            for call in learner_calls(comm):
                attempt(call)

    def work() -> None:
        with WorkerClient(worker_id=0, **settings) as worker:
            for call in worker_calls(worker):
                attempt(call)

    for _ in trial(spoilt, kind, full):
        attempt(work)
        attempt(learn)


@pytest.mark.parametrize(
    ("field", "value"),
    list(
        zip(
            itertools.cycle(["version", "chunks", "raw_bytes", "published"]),
            ["1.5", "nan", "9" * 5000, "x", "", b"\xff", "\u0661", "1_0", "-1", " 1"],
            strict=False,
        )
    ),
)
def test_a_version_that_is_not_a_number_is_a_typed_error(
    learner: Callable[..., WorkerCommunicator],
    worker: Callable[..., WorkerClient],
    server: Any,
    keys: Keys,
    field: str,
    value: Any,
) -> None:
    comm = learner()
    comm.send_model_weights({"w": np.zeros(10)})
    server.client.hset(keys.weights, field, value)
    attempt(comm.workers)
    attempt(comm.get_queue_info)
    with suppress(RlbrokerError):
        client = worker(timeout=0.5)
        attempt(lambda: client.load_weights({}, timeout=0.3))
        attempt(client.poll)


@pytest.mark.parametrize("value", ["1.5", "01", "\u0661", "abc", "9" * 5000, b"\xff", "1 ", "-1"])
def test_a_wire_format_that_is_another_text_is_incompatible(
    learner: Callable[..., WorkerCommunicator],
    worker: Callable[..., WorkerClient],
    server: Any,
    keys: Keys,
    value: Any,
) -> None:
    learner()
    server.client.hset(keys.meta, "wire_format", value)
    for join in (worker, learner):
        with pytest.raises(IncompatibleFormat) as caught:
            join()
        assert len(str(caught.value)) < 300


@pytest.mark.unit
@pytest.mark.parametrize(
    "text", ["1.5", "nan", "9" * 20, "x", "", "\u0661", "1_0", "-1", " 1", "0x1", b"\xff", None]
)
def test_only_plain_digits_are_a_number(text: Any) -> None:
    with pytest.raises(ValueError, match="is not a whole number"):
        stored_integer(text)
    assert stored_integer(b"12") == stored_integer("12") == stored_integer(12) == 12
    assert stored_integer(None, 3) == 3
