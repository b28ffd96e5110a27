"""`rlbroker experiences` and `rlbroker dead`: a look into batches, and what becomes of dead ones."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import redis
import torch
from conftest import wait_until
from executable import Shell

from rlbroker import DeadLetter, WorkerClient, WorkerCommunicator
from rlbroker.backend.keys import GROUP, Keys
from rlbroker.codec.message import encode
from rlbroker.experience import watched_streams
from rlbroker.local.embedded_server import RedisServer

RUN = "batches-commands"
KEYS = Keys(RUN)
BATCH = {"obs": np.zeros((4, 3), np.float32), "more": {"mask": torch.ones(4, dtype=torch.bool)}, "note": "x"}


class Planted:
    """A live run. Worker 0 has a batch in the learner's hands, and three that wait, of which one is damaged.

    Worker 1 has two dead batches: one that does not decode, and one over which learners died.
    """

    def __init__(self, client: Any, learner: WorkerCommunicator, worker: WorkerClient) -> None:
        self.client, self.learner, self.worker = client, learner, worker
        self.life = worker.incarnation

    def damage(self, worker: int, sequence: int, data: bytes) -> None:
        """Write a batch as a broken worker would."""
        life = self.client.hget(KEYS.life(worker), "incarnation").decode()
        fields = {
            "version": 0,
            "rows": 1,
            "raw_bytes": 1,
            "stored_bytes": len(data),
            "sent_at": 0,
            "data": data,
        }
        self.client.xadd(KEYS.experiences(worker), fields, id=f"{life}-{sequence}")

    def queues(self) -> list[Any]:
        """What looking must not alter."""
        found: list[Any] = [self.client.dump(KEYS.dead(worker)) for worker in (0, 1)]
        for key in (KEYS.experiences(0), KEYS.experiences(1)):
            found += [self.client.xinfo_stream(key), self.client.xinfo_groups(key)]
            found += [self.client.xrange(key), self.client.xpending(key, GROUP)]
            # Not how long ago it was handed out: that the learner renews by itself.
            found += [(row["message_id"], row["times_delivered"]) for row in self.pending(key)]
        return found

    def pending(self, key: str) -> list[Any]:
        rows: list[Any] = self.client.xpending_range(key, GROUP, "-", "+", 100)
        return rows


@pytest.fixture(scope="module")
def planted(embedded: RedisServer) -> Iterator[Planted]:
    way: dict[str, Any] = {"redis_url": embedded.url, "run": RUN}
    monkeypatch = pytest.MonkeyPatch()
    monkeypatch.setattr(watched_streams, "RECHECK_SECONDS", 0.1)
    with (
        redis.Redis.from_url(embedded.url, protocol=2) as client,
        WorkerCommunicator(2, acknowledge="manual", **way) as learner,
        WorkerClient(worker_id=0, **way) as first,
        WorkerClient(worker_id=1, **way) as second,
    ):
        run = Planted(client, learner, first)
        learner.send_model_weights({"w": np.zeros(3)})
        wait_until("worker 0 runs version 1", lambda: first.poll({}) and first.version == 1)
        learner.send_model_weights({"w": np.ones(3)})
        second.send_experiences(BATCH)
        wait_until("worker 1's came", lambda: learner.acknowledge(learner.collect_experiences(timeout=0.1)))
        run.damage(1, 2, b"damaged")
        wait_until("it is dead", lambda: learner.collect_experiences() or learner.dead_letters())
        letter = {"data": encode(BATCH), "version": 1, "rows": 4, "raw_bytes": 52, "sent_at": 0}
        reason = {"entry": "17-3", "reason": "poison", "detail": "", "deliveries": 3, "died_at": 1.5}
        client.xadd(KEYS.dead(1), {**letter, **reason})
        first.send_experiences(BATCH)
        wait_until("one is in hand", lambda: learner.collect_experiences(timeout=0.1))
        for _ in range(2):
            first.send_experiences(BATCH)
        run.damage(0, 4, encode(BATCH)[:-1] + b"?")
        yield run
        client.flushall()
    monkeypatch.undo()


@pytest.fixture
def shell(embedded: RedisServer, planted: Planted) -> Shell:
    return Shell(embedded.url, RUN)


# experiences peek


def test_peek_shows_what_batches_hold_and_takes_none(shell: Shell, planted: Planted) -> None:
    before = planted.queues()
    said = shell.json("experiences", "peek", "--count", "9")
    assert planted.queues() == before
    assert said.keys() == {"run", "workers", "not_shown"}
    first, second = said["workers"]
    assert (first["worker"], first["waiting"], first["in_hand"]) == (0, 3, 1)
    assert second == {"worker": 1, "waiting": 0, "in_hand": 0, "batches": []}
    batches = first["batches"]
    assert [one["id"] for one in batches] == [f"0/{planted.life}-{sequence}" for sequence in (1, 2, 3, 4)]
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


def test_peek_tells_people_what_is_at_the_end_of_the_queue(shell: Shell, planted: Planted) -> None:
    said = shell("experiences", "peek", "--newest", "--count", "2", "--worker", "0").stdout
    assert "worker 0: 3 waiting, 1 in the learner's hands" in said
    assert f"batch 0/{planted.life}-3; version 1, 1 behind; 4 rows" in said
    assert re.search(r"more\.mask +tensor bool 4$", said, re.MULTILINE)
    assert f"batch 0/{planted.life}-4" in said
    assert "does not decode: WireError: the digest" in said
    assert f"{planted.life}-2" not in said


# dead


def test_dead_batches_are_listed_shown_and_tried_again_as_the_hint_says(
    shell: Shell, planted: Planted
) -> None:
    before = planted.queues()
    listed = shell("dead", "list", "--worker", "1")
    corrupt = planted.learner.dead_letters()[0]
    assert re.search(rf"^ *1/{corrupt.incarnation}-2 +corrupt", listed.stdout, re.MULTILINE)
    assert re.search(r"^ *1/17-3 +poison", listed.stdout, re.MULTILINE)
    said = shell.json("dead", "show", "--worker", "1")["dead"]
    assert planted.queues() == before
    assert [one["id"] for one in said] == [f"1/{corrupt.incarnation}-2", "1/17-3"]
    facts = ["id", "worker", "incarnation", "sequence", "reason", "detail", "deliveries", "version"]
    assert list(said[0]) == [*facts, "stored_bytes", "died_at", "age_seconds", "problem", "contents"]
    assert (said[0]["reason"], said[0]["contents"]) == ("corrupt", [])
    assert "WireError" in said[0]["problem"]
    assert (said[1]["deliveries"], said[1]["problem"]) == (3, None)
    assert [one["name"] for one in said[1]["contents"]] == ["obs", "more.mask", "note"]
    hint = next(line for line in listed.stderr.splitlines() if " dead retry " in line)
    done = shell.type(hint[hint.index("rlbroker") :])
    assert (done.returncode, done.stdout) == (0, "1 dead batch will be delivered once more\n")

    def died_again() -> list[DeadLetter]:
        planted.learner.collect_experiences()
        return [one for one in planted.learner.dead_letters(1) if one.died_at > corrupt.died_at]

    (letter,) = wait_until("it came, and died again", died_again)
    assert (letter.reason, letter.sequence) == ("corrupt", 2)


def test_a_dead_batch_that_is_not_there_is_named(shell: Shell) -> None:
    done = shell("dead", "retry", "1/99-9", "1/17-3")
    assert (done.returncode, done.stdout) == (1, "1 dead batch will be delivered once more\n")
    assert "1/99-9 is no dead batch (any more)" in done.stderr


def test_purging_needs_a_yes(shell: Shell, planted: Planted) -> None:
    def dead() -> int:
        return len(planted.learner.dead_letters())

    planted.client.xadd(
        KEYS.dead(1), {"entry": "17-4", "reason": "corrupt", "detail": "", "deliveries": 1, "died_at": 1}
    )
    there = dead()
    done = shell("dead", "purge")
    assert (done.returncode, done.stdout) == (2, "")
    assert "--yes does it" in done.stderr
    code, said = shell.on_terminal("dead", "purge", answer="n\n")
    assert code == 2
    assert f"Delete {there} dead batch" in said
    assert dead() == there
    assert shell.json("dead", "purge", "--yes") == {"run": RUN, "purged": there, "missing": []}
    assert dead() == 0
