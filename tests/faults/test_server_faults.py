"""Scenarios 4, 5, 7 and 8: the server is killed, loses its data, is replaced, hangs, or is full."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from arena import Arena, measure_recovery
from proxy import Proxy
from servers import FaultyServer

from rlbroker import Unconfirmed, WorkerClient, WorkerCommunicator

NewServer = Callable[..., FaultyServer]


@pytest.mark.on_every_engine
@pytest.mark.parametrize("level", ["learner", "redis"])
def test_4_the_server_is_killed_and_comes_back_empty(
    arena: Arena, level: str, full: bool, measurements: dict[str, Any]
) -> None:
    """All clients recover in 10 s; level `learner` loses nothing, level `redis` counts each lost batch."""
    arena.start_learner(versions=0, version_seconds=0.3)
    for number in range(3):
        arena.start_worker(number, batches=None, pause=0.01, level=level)
    took: list[dict[str, float]] = []
    for kill in range(3 if full else 2):
        arena.wait("batches are inserted", partial(_exceeds, arena.count_inserted, 200 * (kill + 1)))
        if level == "redis":  # let batches wait, so that some are lost
            arena.pause()
            before = arena.count_produced()
            arena.wait("batches wait", partial(_exceeds, arena.count_produced, before + 30))
        arena.server.kill()
        arena.server.empty()
        time.sleep(0.5)
        arena.server.start()
        back = time.monotonic()
        arena.resume()
        took.append(measure_recovery(arena, back))
    report = arena.finish(120.0)
    arena.check(report, lost="nothing" if level == "learner" else "vanished")
    lost = sum(count["lost"].get("vanished", 0) for count in report["counts"].values())
    assert (lost > 0) == (level == "redis")
    measurements |= {
        "faults": len(took),
        "batches": arena.count_produced(),
        "vanished": lost,
        "recovery": took,
    }


def test_4b_the_server_is_killed_and_comes_back_with_old_data(
    new_server: NewServer, tmp_path: Path, seed: int, measurements: dict[str, Any]
) -> None:
    """The append-only file lacks acknowledged writes: level `learner` delivers each batch once."""
    server = new_server("--appendonly", "yes", "--appendfsync", "everysec")
    with Arena(server, tmp_path, seed) as arena:
        arena.start_learner(versions=0, version_seconds=0.3)
        for number in range(3):
            arena.start_worker(number, batches=None, pause=0.01, level="learner")
        arena.wait("batches are inserted", lambda: arena.count_inserted() > 200)
        server.kill()
        _shorten_append_only_file(server)
        server.start()
        took = measure_recovery(arena, time.monotonic())
        arena.check(arena.finish(120.0))
        measurements |= {"faults": 1, "batches": arena.count_produced(), "recovery": [took]}


def test_5_an_outdated_replica_is_promoted(
    new_server: NewServer, tmp_path: Path, seed: int, measurements: dict[str, Any]
) -> None:
    """Batches that the old server acknowledged and the replica never received are sent again, without a gap."""
    first, second = new_server(), new_server()
    with Arena(first, tmp_path, seed) as arena:
        # Its own proxy lets replication stop without a closed connection.
        replication_proxy = Arena(first, tmp_path, seed)
        second.follow("127.0.0.1", replication_proxy.proxy.port)
        arena.start_learner(versions=0, version_seconds=0.3)
        for number in range(3):
            arena.start_worker(number, batches=None, pause=0.01, level="learner")
        arena.wait("batches are inserted", lambda: arena.count_inserted() > 100)
        with replication_proxy.proxy.silence(dropping=True):
            before = arena.count_produced()
            arena.wait(
                "the old server acknowledges more batches", lambda: arena.count_produced() > before + 60
            )
            second.promote()
            arena.proxy.target = second.address
            arena.server = second
            arena.proxy.cut_all()
            back = time.monotonic()
        first.kill()
        replication_proxy.proxy.close()
        took = measure_recovery(arena, back)
        arena.check(arena.finish(120.0))
        measurements |= {"faults": 1, "batches": arena.count_produced(), "recovery": [took]}


def test_5b_batches_confirmed_by_a_replica_survive_a_failover(new_server: NewServer) -> None:
    """At level `replica` a confirmed batch survives a failover, and an unconfirmed one is sent again."""
    first, second = new_server(), new_server()
    replication_proxy, client_proxy = Proxy(first.address), Proxy(first.address)
    second.follow("127.0.0.1", replication_proxy.port)
    with (
        WorkerCommunicator(1, redis_url=client_proxy.url) as comm,
        WorkerClient(client_proxy.url, worker_id=0, level="replica") as client,
    ):
        for number in range(20):
            assert client.send_experiences({"number": number})
        with replication_proxy.silence(dropping=True):
            with pytest.raises(Unconfirmed):
                client.send_experiences({"number": 20}, timeout=1.0)
            second.promote()
            second_replica = new_server()
            second_replica.follow(*second.address)
            client_proxy.target = second.address
            client_proxy.cut_all()
            first.kill()
            assert client.send_experiences({"number": 21})
        got: list[int] = []
        while len(got) < 22:
            pairs = comm.collect_experiences(timeout=10.0)
            assert pairs, f"only {got} arrived"
            got += [batch["number"] for _, batch in pairs]
        assert got == list(range(22))
    replication_proxy.close()
    client_proxy.close()


@pytest.mark.on_every_engine
def test_7_the_server_freezes(arena: Arena, full: bool, measurements: dict[str, Any]) -> None:
    """Workers detect it within their timeout; then each applies the newest version, and missed ones are recorded."""

    @contextlib.contextmanager
    def freeze() -> Iterator[None]:
        arena.server.freeze()
        yield
        arena.server.thaw()

    _check_outage(arena, freeze(), 20.0 if full else 8.0, measurements)


@pytest.mark.parametrize("how", ["late", "dropping"])
def test_7_the_server_is_silent(arena: Arena, how: str, full: bool, measurements: dict[str, Any]) -> None:
    """The same if no data passes, and what was in transit arrives late or never."""
    _check_outage(arena, arena.proxy.silence(dropping=how == "dropping"), 60.0 if full else 8.0, measurements)


def _check_outage(
    arena: Arena, fault: AbstractContextManager[object], seconds: float, measurements: dict[str, Any]
) -> None:
    arena.start_learner(versions=0, version_seconds=0.3, timeout=5.0)
    for number in range(3):
        arena.start_worker(number, batches=None, pause=0.01, level="learner", timeout=5.0)
    arena.wait(
        "batches of every worker are inserted",
        lambda: arena.count_inserted() > 100 and arena.all_workers_send(),
    )
    with fault:
        time.sleep(seconds)
    back = time.monotonic()
    for worker in arena.workers:
        took = [line["took"] for line in worker.lines("took")]
        assert took, f"seed {arena.seed}: {worker.log.name} detected nothing"
        assert max(took) < 5.0 + 1.5, f"seed {arena.seed}: {worker.log.name} detected it late: {took}"
    recovered = measure_recovery(arena, back)
    report = arena.finish(120.0)
    arena.check(report)
    for worker in arena.workers:
        assert worker.lines("version")[-1]["version"] == report["version"]
    measurements |= {"faults": 1, "batches": arena.count_produced(), "recovery": [recovered]}


@pytest.mark.parametrize("when_full", ["block", "drop_oldest", "drop_newest"])
def test_8_the_server_is_full(
    new_server: NewServer, tmp_path: Path, seed: int, when_full: str, full: bool, measurements: dict[str, Any]
) -> None:
    """The server fills up while the learner is paused: its memory stays bounded, and each batch is counted."""
    limit = 24 << 20
    server = new_server("--maxmemory", str(limit), "--maxmemory-policy", "noeviction")
    with Arena(server, tmp_path, seed) as arena:
        bounds = {} if when_full == "block" else {"max_queue_bytes": 6 << 20}
        arena.start_learner(settings=bounds)
        arena.wait("the learner has opened the run", lambda: arena.learner and arena.learner.lines("opened"))
        (tmp_path / "pause").touch()
        batches = 1500 if full else 900
        for number in range(3):
            arena.start_worker(number, batches=batches, bytes=16_000, when_full=when_full, timeout=1.0)

        def is_blocked_or_done() -> bool:
            if when_full == "block":
                return all(worker.lines("retried") for worker in arena.workers)
            return all(worker.lines("finished") for worker in arena.workers)

        arena.wait(
            "the workers are blocked" if when_full == "block" else "the workers have sent all batches",
            is_blocked_or_done,
            90.0,
        )
        with server.client() as client:
            used = client.info("memory")["used_memory"]
        assert used < limit * 1.2
        (tmp_path / "pause").unlink()
        report = arena.finish(180.0)
        lost = {"block": "nothing", "drop_oldest": "dropped_oldest", "drop_newest": "nothing"}[when_full]
        arena.check(report, lost=lost)
        refused = sum(len(worker.lines("refused")) for worker in arena.workers)
        counted = sum(count["lost"].get("dropped_newest", 0) for count in report["counts"].values())
        assert refused == counted
        assert (refused > 0) == (when_full == "drop_newest")
        measurements |= {
            "batches": arena.count_produced(),
            "used_mb": used >> 20,
            "dropped": report["counts"]["0"]["lost"],
        }


def _exceeds(count: Callable[[], int], than: int) -> bool:
    return count() > than


def _shorten_append_only_file(server: FaultyServer) -> None:
    """Cut off the end of the append-only file, as a crash before the last flush does."""
    files = [path for path in server.folder.rglob("*") if path.name.endswith((".incr.aof", "appendonly.aof"))]
    assert files
    newest = max(files, key=lambda path: path.stat().st_size)
    data = newest.read_bytes()
    keep = data[: len(data) * 9 // 10]
    newest.write_bytes(keep[: keep.rfind(b"\r\n*") + 2])
