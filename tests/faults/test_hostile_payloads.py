"""Scenario 10: payloads of a hostile worker or a damaged disk; the learner and the workers survive them."""

from __future__ import annotations

import random
from typing import Any

from arena import Arena
from hostile_payloads import make_hostile_payload

from rlbroker.backend.replies import text_fields


def test_10_hostile_payloads_in_every_stream_and_chunk(
    arena: Arena, seed: int, full: bool, measurements: dict[str, Any]
) -> None:
    """The learner survives in bounded memory; each invalid batch is counted and becomes a dead letter with a reason."""
    chance = random.Random(seed)
    count = 600 if full else 150
    learner = arena.start_learner(versions=0, version_seconds=0.5)
    honest = arena.start_worker(1, batches=300, pause=0.01)
    arena.wait("the honest worker has applied a version", lambda: honest.lines("version"))
    before = _resident_mb(learner.process.pid)
    keys = arena.keys
    with arena.server.client() as client:
        # Join by hand as a worker whose every message is hostile.
        client.hset(keys.life(0), mapping={"incarnation": 1})
        client.sadd(keys.workers, 0)
        client.xgroup_create(keys.experiences(0), "learner", "0", mkstream=True)
        for number in range(1, count + 1):
            fields: dict[str, Any] = {
                "version": 0,
                "rows": 1,
                "raw_bytes": 1,
                "stored_bytes": 1,
                "sent_at": 0,
            }
            fields["data"] = make_hostile_payload(chance)
            for name in chance.sample(sorted(fields), chance.randrange(3)):
                fields[name] = chance.choice([b"", b"-1", b"9" * 40, b"x", b"\xff\xfe", "١٢"])
            client.xadd(keys.experiences(0), fields, id=f"1-{number}")
            event = chance.choice(["version", "command", "left", "joined", "gone", "", "future"])
            acknowledgement = {
                "event": event,
                "version": chance.choice(["-1", "99", "9" * 30, "x"]),
                "outcome": "applied",
            }
            client.xadd(keys.acknowledgements(0), acknowledgement, id=f"1-{number}")
            if number % 50 == 0:  # also damage what workers read: a chunk and a command
                manifest = text_fields(client.hgetall(keys.weights))
                client.set(
                    keys.chunk(manifest["upload"], chance.randrange(2)), make_hostile_payload(chance), ex=60
                )
                command = {"event": "command", "command": f"bad{number}", "name": "note", "workers": "0,1"}
                client.xadd(keys.control, command | {"data": make_hostile_payload(chance)})
        arena.wait("the learner has read all batches", lambda: client.xlen(keys.experiences(0)) == 0)
        arena.wait(
            "the learner has read all acknowledgements", lambda: client.xlen(keys.acknowledgements(0)) == 0
        )
        peak = _resident_mb(learner.process.pid)
        dead = client.xlen(keys.dead(0))
        counted = int(client.hget(keys.counts(0), "corrupt"))
    report = arena.finish()
    assert counted == count
    assert dead == min(count, 1000)
    assert peak < before + 300, f"{before} MB before, {peak} MB after"
    assert report["counts"]["0"]["lost"] == {"corrupt": count}
    assert report["counts"]["1"] | {"duplicates": 0} == {
        "waiting": 0,
        "in_hand": 0,
        "delivered": 300,
        "lost": {},
        "duplicates": 0,
        "produced": 300,
    }
    assert honest.lines("version")[-1]["version"] == report["version"]
    measurements |= {"faults": 2 * count, "dead": dead, "mb_before": before, "mb_after": peak}


def _resident_mb(pid: int) -> int:
    with open(f"/proc/{pid}/status") as status:  # noqa: PTH123
        line = next(line for line in status if line.startswith("VmHWM"))
    return int(line.split()[1]) >> 10
