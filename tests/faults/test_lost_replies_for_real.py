"""Scenarios 1, 2 and 9: lost replies and killed subscriptions, with real processes."""

from __future__ import annotations

import json
import threading
from typing import Any

from arena import Arena


def test_1_replies_to_sending_are_lost(arena: Arena, full: bool, measurements: dict[str, Any]) -> None:
    """The reply to each XADD of a batch is lost once: each batch is delivered once."""
    batches = 250 if full else 60
    arena.start_learner(direct=True)
    arena.proxy.lose_replies(b"XADD", count=4 * batches)
    for worker in range(4):
        arena.start_worker(worker, batches=batches, level=("redis", "learner")[worker % 2])
    arena.check(arena.finish(180.0))
    measurements |= {"faults": arena.proxy.injected, "batches": arena.count_produced()}
    assert arena.proxy.injected >= 4 * batches


def test_2_replies_to_reading_are_lost(arena: Arena, full: bool, measurements: dict[str, Any]) -> None:
    """A third of the replies to the learner's reads is lost: all batches are inserted, and none waits to be idle."""
    arena.proxy.lose_replies(b"XREADGROUP", part=0.33)
    # One batch for each read, so that there are many reads on a slow machine too.
    arena.start_learner(settings={"take_over_seconds": 600.0}, max_batches=1)
    for worker in range(3):
        arena.start_worker(worker, direct=True, batches=400 if full else 100, pause=0.005)
    arena.check(arena.finish())
    measurements |= {"faults": arena.proxy.injected, "batches": arena.count_produced()}
    assert arena.proxy.injected > 10


def test_9_subscriptions_are_killed_repeatedly(
    arena: Arena, full: bool, measurements: dict[str, Any]
) -> None:
    """All subscriptions are killed each second: versions and commands get outcomes, and the last version is applied."""
    versions, commands = (500, 100) if full else (80, 20)
    arena.start_learner(versions=versions, commands=commands, version_seconds=0.05)
    workers = [arena.start_worker(number, batches=300 if full else 60, pause=0.1) for number in range(3)]
    over, killed = threading.Event(), 0

    def kill() -> None:
        nonlocal killed
        with arena.server.client() as client:
            while not over.wait(1.0):
                killed += client.execute_command("CLIENT", "KILL", "TYPE", "pubsub")

    killer = threading.Thread(target=kill)
    killer.start()
    try:
        report = arena.finish(180.0)
    finally:
        over.set()
        killer.join()
    arena.check(report)
    assert killed > 2
    measurements |= {"faults": killed, "versions": report["version"]}
    assert report["version"] == versions + 1
    for worker in workers:
        assert worker.lines("version")[-1]["version"] == report["version"], json.dumps(report)
