"""`rlbroker experiences` and `rlbroker dead`: the contents of waiting batches and dead letters, and retrying them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import redis
import torch
from conftest import wait_until
from executable import RunShell

from rlbroker import DeadLetter, WorkerClient, WorkerCommunicator
from rlbroker.backend.keys import GROUP, Keys
from rlbroker.codec.message import encode
from rlbroker.experience import watched_streams
from rlbroker.local.embedded_server import RedisServer

RUN = "batches-commands"
KEYS = Keys(RUN)
BATCH = {"obs": np.zeros((4, 3), np.float32), "more": {"mask": torch.ones(4, dtype=torch.bool)}, "note": "x"}


class RunWithBatches:
    """A run with a live learner.

    Worker 0 has one pending batch and three that wait, one of them damaged. Worker 1 has two dead letters: a
    corrupt one, and a poison one over which learners died.
    """

    def __init__(self, client: Any, learner: WorkerCommunicator, worker: WorkerClient) -> None:
        self.client, self.learner, self.worker = client, learner, worker
        self.incarnation = worker.incarnation

    def add_damaged(self, worker: int, sequence: int, data: bytes) -> None:
        """Add a batch that a broken worker would send."""
        incarnation = self.client.hget(KEYS.life(worker), "incarnation").decode()
        fields = {
            "version": 0,
            "rows": 1,
            "raw_bytes": 1,
            "stored_bytes": len(data),
            "sent_at": 0,
            "data": data,
        }
        self.client.xadd(KEYS.experiences(worker), fields, id=f"{incarnation}-{sequence}")

    def queues(self) -> list[Any]:
        """Return everything that reading must not change."""
        found: list[Any] = [self.client.dump(KEYS.dead(worker)) for worker in (0, 1)]
        for key in (KEYS.experiences(0), KEYS.experiences(1)):
            found += [self.client.xinfo_stream(key), self.client.xinfo_groups(key)]
            found += [self.client.xrange(key), self.client.xpending(key, GROUP)]
            # Without the idle times: the learner renews them by itself.
            found += [(row["message_id"], row["times_delivered"]) for row in self.pending(key)]
        return found

    def pending(self, key: str) -> list[Any]:
        rows: list[Any] = self.client.xpending_range(key, GROUP, "-", "+", 100)
        return rows


@pytest.fixture(scope="module")
def planted(embedded: RedisServer) -> Iterator[RunWithBatches]:
    endpoint: dict[str, Any] = {"redis_url": embedded.url, "run": RUN}
    monkeypatch = pytest.MonkeyPatch()
    monkeypatch.setattr(watched_streams, "RECHECK_SECONDS", 0.1)
    with (
        redis.Redis.from_url(embedded.url, protocol=2) as client,
        WorkerCommunicator(2, acknowledge="manual", **endpoint) as learner,
        WorkerClient(worker_id=0, **endpoint) as first,
        WorkerClient(worker_id=1, **endpoint) as second,
    ):
        run = RunWithBatches(client, learner, first)
        learner.send_model_weights({"w": np.zeros(3)})
        wait_until("worker 0 runs version 1", lambda: first.poll({}) and first.version == 1)
        learner.send_model_weights({"w": np.ones(3)})
        second.send_experiences(BATCH)
        wait_until(
            "the batch of worker 1 arrives",
            lambda: learner.acknowledge(learner.collect_experiences(timeout=0.1)),
        )
        run.add_damaged(1, 2, b"damaged")
        wait_until(
            "the damaged batch is a dead letter",
            lambda: learner.collect_experiences() or learner.dead_letters(),
        )
        letter = {"data": encode(BATCH), "version": 1, "rows": 4, "raw_bytes": 52, "sent_at": 0}
        reason = {"entry": "17-3", "reason": "poison", "detail": "", "deliveries": 3, "died_at": 1.5}
        client.xadd(KEYS.dead(1), {**letter, **reason})
        first.send_experiences(BATCH)
        wait_until("one is pending", lambda: learner.collect_experiences(timeout=0.1))
        for _ in range(2):
            first.send_experiences(BATCH)
        run.add_damaged(0, 4, encode(BATCH)[:-1] + b"?")
        yield run
        client.flushall()
    monkeypatch.undo()


@pytest.fixture
def shell(embedded: RedisServer, planted: RunWithBatches) -> RunShell:
    return RunShell(embedded.url, RUN)


# experiences peek


def test_peek_shows_the_contents_of_batches_without_taking_them(
    shell: RunShell, planted: RunWithBatches
) -> None:
    before = planted.queues()
    data = shell.json("experiences", "peek", "--count", "9")
    assert planted.queues() == before
    assert data.keys() == {"run", "workers", "not_shown"}
    first, second = data["workers"]
    assert (first["worker"], first["waiting"], first["in_hand"]) == (0, 3, 1)
    assert second == {"worker": 1, "waiting": 0, "in_hand": 0, "batches": []}
    batches = first["batches"]
    assert [one["id"] for one in batches] == [
        f"0/{planted.incarnation}-{sequence}" for sequence in (1, 2, 3, 4)
    ]
    assert [one["in_hand"] for one in batches] == [True, False, False, False]
    assert batches[0]["deliveries"] == 1
    assert batches[0]["held_by"]
    facts = {
        "version": 1,
        "staleness": 1,
        "rows": 4,
        "raw_bytes": 52,
        "retried": False,
        "held_by": None,
        "problem": None,
    }
    assert batches[1] | facts == batches[1]
    assert 0 <= batches[1]["age_seconds"] < 60
    assert batches[1]["contents"] == [
        {"name": "obs", "kind": "array", "dtype": "<f4", "shape": [4, 3], "bytes": 48},
        {"name": "more.mask", "kind": "tensor", "dtype": "bool", "shape": [4], "bytes": 4},
        {"name": "note", "kind": "str", "dtype": None, "shape": None, "bytes": None},
    ]
    assert batches[3]["contents"] == []
    assert "digest" in batches[3]["problem"]


def test_peek_prints_the_newest_batches_as_text(shell: RunShell, planted: RunWithBatches) -> None:
    output = shell("experiences", "peek", "--newest", "--count", "2", "--worker", "0").stdout
    assert "worker 0: 3 waiting, 1 in hand" in output
    assert f"batch 0/{planted.incarnation}-3; version 1, 1 behind; 4 rows" in output
    assert re.search(r"more\.mask +tensor bool 4$", output, re.MULTILINE)
    assert f"batch 0/{planted.incarnation}-4" in output
    assert "does not decode: WireError: the digest" in output
    assert f"{planted.incarnation}-2" not in output


# dead


def test_dead_letters_are_listed_shown_and_retried_with_the_printed_hint(
    shell: RunShell, planted: RunWithBatches
) -> None:
    before = planted.queues()
    listed = shell("dead", "list", "--worker", "1")
    corrupt = planted.learner.dead_letters()[0]
    assert re.search(rf"^ *1/{corrupt.incarnation}-2 +corrupt", listed.stdout, re.MULTILINE)
    assert re.search(r"^ *1/17-3 +poison", listed.stdout, re.MULTILINE)
    data = shell.json("dead", "show", "--worker", "1")["dead"]
    assert planted.queues() == before
    assert [one["id"] for one in data] == [f"1/{corrupt.incarnation}-2", "1/17-3"]
    facts = ["id", "worker", "incarnation", "sequence", "reason", "detail", "deliveries", "version"]
    assert list(data[0]) == [*facts, "stored_bytes", "died_at", "age_seconds", "problem", "contents"]
    assert (data[0]["reason"], data[0]["contents"]) == ("corrupt", [])
    assert "WireError" in data[0]["problem"]
    assert (data[1]["deliveries"], data[1]["problem"]) == (3, None)
    assert [one["name"] for one in data[1]["contents"]] == ["obs", "more.mask", "note"]
    hint = next(line for line in listed.stderr.splitlines() if " dead retry " in line)
    done = shell.type(hint[hint.index("rlbroker") :])
    assert (done.returncode, done.stdout) == (0, "1 dead letter will be delivered once more\n")

    def died_again() -> list[DeadLetter]:
        planted.learner.collect_experiences()
        return [one for one in planted.learner.dead_letters(1) if one.died_at > corrupt.died_at]

    (letter,) = wait_until("it is delivered, and dies again", died_again)
    assert (letter.reason, letter.sequence) == ("corrupt", 2)


def test_an_unknown_dead_letter_is_named(shell: RunShell) -> None:
    done = shell("dead", "retry", "1/99-9", "1/17-3")
    assert (done.returncode, done.stdout) == (1, "1 dead letter will be delivered once more\n")
    assert "1/99-9 is not a dead letter (any more)" in done.stderr


def test_purging_needs_confirmation(shell: RunShell, planted: RunWithBatches) -> None:
    def dead() -> int:
        return len(planted.learner.dead_letters())

    planted.client.xadd(
        KEYS.dead(1), {"entry": "17-4", "reason": "corrupt", "detail": "", "deliveries": 1, "died_at": 1}
    )
    there = dead()
    done = shell("dead", "purge")
    assert (done.returncode, done.stdout) == (2, "")
    assert "confirm it with --yes" in done.stderr
    code, output = shell.on_terminal("dead", "purge", answer="n\n")
    assert code == 2
    assert f"Delete {there} dead letter" in output
    assert dead() == there
    assert shell.json("dead", "purge", "--yes") == {"run": RUN, "purged": there, "missing": []}
    assert dead() == 0
