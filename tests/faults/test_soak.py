"""Scenario 11: random faults, one after another, for the time of --soak; then the checks."""

from __future__ import annotations

import contextlib
import random
import signal
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import redis
from arena import Arena, LoggedProcess, log_times
from hostile_payloads import make_hostile_payload
from proxy import Proxy
from servers import FaultyServer

from rlbroker.backend.keys import GROUP

#: The pause between a recovery and the next fault.
PAUSE_SECONDS = 3.0


def test_11_all_faults_at_random(
    new_server: Callable[..., FaultyServer],
    tmp_path: Path,
    request: pytest.FixtureRequest,
    measurements: dict[str, Any],
) -> None:
    """Level `learner` loses no batch, and no process grows in memory, threads or open files."""
    minutes = request.config.getoption("--soak")
    if not minutes:
        pytest.skip("only with --soak MINUTES")
    seed = request.node.callspec.params["seed"]
    print(f"seed {seed}")
    chance = random.Random(seed)
    hostile_sent = 0

    def send_hostile() -> None:
        nonlocal hostile_sent
        hostile_sent += 20
        _send_hostile(arena, chance, range(hostile_sent - 19, hostile_sent + 1))

    with Arena(new_server(), tmp_path, seed) as arena:
        arena.start_learner(versions=0, version_seconds=0.5, collect_seconds=0.3)
        for number in range(8):
            arena.start_worker(number, batches=None, pause=0.15, level="learner", bytes=2000)
        arena.wait("batches are inserted", lambda: arena.count_inserted() > 50)
        faults: dict[str, Callable[[], None]] = {
            "server killed, back empty": lambda: _empty(arena),
            "server frozen": lambda: _freeze(arena, chance.uniform(1, 8)),
            "network silent, late": lambda: _silence(arena, chance.uniform(1, 8), dropping=False),
            "network silent, dropping": lambda: _silence(arena, chance.uniform(1, 8), dropping=True),
            "connections cut": arena.proxy.cut_all,
            "replies to sending lost": lambda: _lose(arena, b"XADD"),
            "replies to reading lost": lambda: _lose(arena, b"XREADGROUP"),
            "replies to scripts lost": lambda: _lose(arena, b"EVALSHA"),
            "learner killed": lambda: _kill_learner(arena),
            "worker suspended": lambda: _suspend(arena.workers[chance.randrange(8)], chance.uniform(1, 6)),
            "subscriptions killed": lambda: _command(arena, "CLIENT", "KILL", "TYPE", "pubsub"),
            "scripts flushed": lambda: _command(arena, "SCRIPT", "FLUSH"),
            "everything flushed": lambda: _command(arena, "FLUSHALL"),
            "a group destroyed": lambda: _command(
                arena, "XGROUP", "DESTROY", arena.keys.experiences(chance.randrange(8)), GROUP
            ),
            "failover": lambda: _fail_over(arena, new_server),
            "server full": lambda: _fill(arena),
            "hostile batches": send_hostile,
            "worker killed": lambda: _kill_worker(arena, chance.randrange(8)),
            "worker suspended and replaced": lambda: _replace_worker(arena, chance.randrange(8)),
            "replies cut": lambda: _cut_replies(arena, chance.randrange(200, 20_000)),
        }
        done: list[str] = []
        took: list[float] = []
        sizes: dict[str, list[tuple[int, int, int]]] = {}
        end = time.monotonic() + minutes * 60
        while time.monotonic() < end:
            name = chance.choice(sorted(faults))
            faults[name]()
            done.append(name)
            took.append(_recovery(arena, name))
            time.sleep(PAUSE_SECONDS)
            learner = arena.learner
            assert learner is not None
            for process in (learner, *arena.workers):
                sizes.setdefault(f"{process.log.stem}:{process.process.pid}", []).append(_size(process))
        arena.check(arena.finish(180.0), hostile_count=hostile_sent)
        measurements |= {"faults": len(done), "batches": arena.count_produced()}
        measurements |= {
            "recovery_median": round(statistics.median(took), 2),
            "recovery_worst": round(max(took), 2),
        }
        measurements["kinds"] = {name: done.count(name) for name in sorted(set(done))}
        for name, measured in sizes.items():
            if len(measured) >= 20:
                grew = _growth(measured)
                measurements[f"growth of {name.split(':')[0]} (KiB, threads, files)"] = grew
                assert grew[0] < 20_000, f"{name}: {measured}"
                assert grew[1] <= 2, f"{name}: {measured}"
                assert grew[2] <= 6, f"{name}: {measured}"


def _recovery(arena: Arena, name: str) -> float:
    back, learner = time.monotonic(), arena.learner
    assert learner is not None
    inserted_at = arena.wait(
        f"a batch is inserted after: {name}", lambda: next(log_times(learner, "inserted", back), None), 40.0
    )
    return float(inserted_at - back)


def _empty(arena: Arena) -> None:
    arena.server.kill()
    arena.server.empty()
    time.sleep(0.3)
    arena.server.start()


def _freeze(arena: Arena, seconds: float) -> None:
    arena.server.freeze()
    time.sleep(seconds)
    arena.server.thaw()


def _silence(arena: Arena, seconds: float, *, dropping: bool) -> None:
    with arena.proxy.silence(dropping=dropping):
        time.sleep(seconds)


def _lose(arena: Arena, command: bytes) -> None:
    arena.proxy.lose_replies(command, part=0.5)
    time.sleep(2.0)
    arena.proxy.lose_replies(command, part=0.0)


def _cut_replies(arena: Arena, after_bytes: int) -> None:
    arena.proxy.cut_within_replies(after_bytes)
    time.sleep(2.0)
    arena.proxy.cut_within_replies(None)


def _kill_learner(arena: Arena) -> None:
    assert arena.learner is not None
    arena.learner.kill()
    arena.learner = arena.learner.restart()


def _kill_worker(arena: Arena, index: int) -> None:
    arena.workers[index].kill()
    arena.workers[index] = arena.workers[index].restart()


def _replace_worker(arena: Arena, index: int) -> None:
    """Replace a suspended worker by a second process; the first is fenced when it resumes."""
    first = arena.workers[index]
    first.signal(signal.SIGSTOP)
    second = arena.workers[index] = first.restart()
    before = len(first.lines("joined"))
    arena.wait("the second process has joined", lambda: len(second.lines("joined")) > before)
    first.signal(signal.SIGCONT)
    first.process.wait(timeout=30.0)


def _fail_over(arena: Arena, new_server: Callable[..., FaultyServer]) -> None:
    """Promote a replica that lacks the last second."""
    first, second = arena.server, new_server()
    assert isinstance(first, FaultyServer)
    link = Proxy(first.address, arena.seed)
    second.follow("127.0.0.1", link.port)
    with link.silence(dropping=True):
        time.sleep(1.0)
        second.promote()
        arena.proxy.target, arena.server = second.address, second
        arena.proxy.cut_all()
    first.kill()
    link.close()


def _fill(arena: Arena) -> None:
    with arena.server.client() as client:
        client.config_set("maxmemory", client.info("memory")["used_memory"])
        time.sleep(3.0)
        client.config_set("maxmemory", 0)


def _send_hostile(arena: Arena, chance: random.Random, numbers: range) -> None:
    """Send hostile batches as a ninth worker that joined by hand."""
    keys, worker = arena.keys, 8
    with arena.server.client() as client:
        client.hset(keys.life(worker), mapping={"incarnation": 1})
        client.sadd(keys.workers, worker)
        with contextlib.suppress(redis.ResponseError):  # the group exists
            client.xgroup_create(keys.experiences(worker), GROUP, "0", mkstream=True)
        for number in numbers:
            fields = {"version": 0, "rows": 1, "raw_bytes": 1, "stored_bytes": 1, "sent_at": 0}
            client.xadd(
                keys.experiences(worker), fields | {"data": make_hostile_payload(chance)}, id=f"1-{number}"
            )


def _suspend(worker: LoggedProcess, seconds: float) -> None:
    worker.signal(signal.SIGSTOP)
    time.sleep(seconds)
    worker.signal(signal.SIGCONT)


def _command(arena: Arena, *command: str) -> None:
    with arena.server.client() as client:
        client.execute_command(*command)


def _size(process: LoggedProcess) -> tuple[int, int, int]:
    """Return resident KiB, threads and open files of a process."""
    folder = Path(f"/proc/{process.process.pid}")
    lines = dict(line.split(":", 1) for line in (folder / "status").read_text().splitlines())
    return int(lines["VmRSS"].split()[0]), int(lines["Threads"]), len(list((folder / "fd").iterdir()))


def _growth(measured: list[tuple[int, int, int]]) -> list[float]:
    """Return the difference between the medians of the last and the second quarter."""
    quarter = len(measured) // 4
    early, late = measured[quarter : 2 * quarter], measured[-quarter:]
    return [
        statistics.median(one[what] for one in late) - statistics.median(one[what] for one in early)
        for what in range(3)
    ]
