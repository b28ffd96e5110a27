"""One run under faults: its server, its proxy, its processes, what they logged, and the oracle over it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, Self

from proxy import Proxy
from redis_cluster import Cluster
from sentinel_trio import SentinelTrio
from servers import FaultyServer

from rlbroker.backend.keys import Keys
from rlbroker.backend.replies import text_fields
from rlbroker.control.outcomes import WorkerOutcomes

HERE = Path(__file__).parent


class Actor:
    """A process that logs lines of JSON."""

    def __init__(self, program: str, arguments: dict[str, Any]) -> None:
        self.log = Path(arguments["log"])
        self._arguments, self._program = arguments, program
        self._read, self._lines = 0, dict[str, list[dict[str, Any]]]()
        self.cut_short = False  #: whether a life of it ended, or was fenced, in the middle of something
        with self.log.with_suffix(".stderr").open("ab") as stderr:
            self.process = subprocess.Popen(
                [sys.executable, "-W", "error", str(HERE / program), json.dumps(arguments)],
                stdout=stderr,
                stderr=stderr,
            )

    def lines(self, name: str) -> list[dict[str, Any]]:
        """Give the logged lines that have this field, of all lives that share the log."""
        if self.log.exists():
            with self.log.open() as log:
                log.seek(self._read)
                whole, newline, _ = log.read().rpartition("\n")  # the last line may be half written
            self._read += len(whole) + len(newline)
            for line in map(json.loads, filter(None, whole.split("\n"))):
                for field in line:
                    self._lines.setdefault(field, []).append(line)
        return self._lines.get(name, [])

    @property
    def endless(self) -> bool:
        """Whether it sends batches until it is told that there have been enough."""
        return self._arguments.get("batches", 0) is None

    def signal(self, number: signal.Signals) -> None:
        os.kill(self.process.pid, number)

    def kill(self) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGCONT)
            self.process.kill()
            self.cut_short = True
        self.process.wait()

    def again(self, **changes: Any) -> Actor:
        """Start it once more, after it died, with the same log."""
        actor = Actor(self._program, self._arguments | changes)
        actor.cut_short = True
        return actor

    def tail(self) -> str:
        return self.log.with_suffix(".stderr").read_text()[-3000:]


class Arena:
    """Runs a learner and workers through a proxy on one server, or on an engine without one."""

    def __init__(self, server: FaultyServer | Cluster | SentinelTrio, folder: Path, seed: int) -> None:
        self.server, self.folder, self.seed = server, folder, seed
        # An engine's nodes tell clients their own addresses, which lead past any proxy.
        self._proxy = Proxy(server.address, seed) if isinstance(server, FaultyServer) else None
        self.run = f"faults-{seed}"
        self.keys = Keys(self.run)
        self.workers: list[Actor] = []
        self.learner: Actor | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        for actor in (*self.workers, self.learner):
            if actor is not None:
                actor.kill()
        if self._proxy:
            self._proxy.close()

    @property
    def proxy(self) -> Proxy:
        assert self._proxy, "there is no proxy before an engine"
        return self._proxy

    def _url(self, *, direct: bool) -> str:
        return self._proxy.url if self._proxy and not direct else self.server.url

    def start_learner(self, *, direct: bool = False, **chosen: Any) -> Actor:
        """Start the learner; what is chosen goes to fault_learner.py."""
        arguments = {
            "url": self._url(direct=direct),
            "run": self.run,
            "log": str(self.folder / "learner.log"),
            "checkpoint": str(self.folder / "checkpoint.json"),
            "finish": str(self.folder / "finish"),
            "pause": str(self.folder / "pause"),
            "timeout": 10.0,
            "versions": 5,
            "version_seconds": 0.1,
            "commands": 3,
            "die": None,
            "max_batches": 64,
            "collect_seconds": 0.0,
            "settings": {},
        }
        self.learner = Actor("fault_learner.py", arguments | chosen)
        return self.learner

    def start_worker(self, worker_id: int, *, name: str = "", direct: bool = False, **chosen: Any) -> Actor:
        """Start a worker; what is chosen goes to fault_worker.py."""
        arguments = {
            "url": self._url(direct=direct),
            "run": self.run,
            "log": str(self.folder / f"worker-{worker_id}{name}.log"),
            "worker_id": worker_id,
            "level": "redis",
            "when_full": None,
            "timeout": 10.0,
            "batches": 100,
            "bytes": 100,
            "pause": 0.0,
        }
        actor = Actor("fault_worker.py", arguments | chosen)
        self.workers.append(actor)
        return actor

    def wait(self, what: str, condition: Callable[[], Any], seconds: float = 60.0) -> Any:
        """Wait for something; if it does not come, or an actor died over an error, say what is known."""
        end = time.monotonic() + seconds
        while True:
            found = condition()
            if found:
                return found
            for actor in (*self.workers, self.learner):
                if actor is not None and actor.process.poll() not in (None, 0, -signal.SIGKILL):
                    raise AssertionError(f"seed {self.seed}: {actor.log.name} failed:\n{actor.tail()}")
            if time.monotonic() > end:
                tails = "\n".join(
                    f"{one.log.name}: {one.tail()}" for one in (*self.workers, self.learner) if one
                )
                raise AssertionError(f"seed {self.seed}: waited {seconds:g} s in vain until {what}\n{tails}")
            time.sleep(0.02)

    def produced(self) -> int:
        """Give how many batches the workers have logged."""
        return sum(len(worker.lines("produced")) for worker in self.workers)

    def inserted(self) -> int:
        """Give how many batches the learner has logged, those of lives that it lost included."""
        assert self.learner is not None
        return len(self.learner.lines("inserted"))

    def all_send(self) -> bool:
        """Whether the learner has logged batches of every worker; a process may take seconds to start."""
        assert self.learner is not None
        return len({line["inserted"][0] for line in self.learner.lines("inserted")}) == len(self.workers)

    def begin(self, level: str) -> None:
        """Start a learner and three workers that go on and on, and wait until batches of all flow."""
        learner = self.start_learner(versions=0, version_seconds=0.3)
        self.wait("the learner is there", lambda: learner.lines("opened"))
        for number in range(3):
            self.start_worker(number, batches=None, pause=0.01, level=level)
        self.wait("batches flow, of every worker", lambda: self.inserted() > 100 and self.all_send())

    def pause(self) -> None:
        """Let the learner stand still, so that what is sent waits on the server."""
        (self.folder / "pause").touch()

    def go_on(self) -> None:
        """Let the learner go on."""
        (self.folder / "pause").unlink(missing_ok=True)

    def finish(self, seconds: float = 90.0) -> dict[str, Any]:
        """Let the workers come to their end, then the learner; give its report."""
        learner = self.learner
        assert learner is not None
        living = [worker for worker in self.workers if worker.process.poll() is None]
        for worker in living:
            if worker.endless:
                worker.signal(signal.SIGUSR1)
        self.wait("the workers sent all", lambda: all(one.lines("finished") for one in living), seconds)
        (self.folder / "finish").touch()
        (line,) = self.wait("the learner reported", lambda: learner.lines("report"), seconds)
        self.wait(
            "all ended", lambda: all(one.process.poll() is not None for one in (*living, learner)), 30.0
        )
        report: dict[str, Any] = line["report"]
        return report

    def settle(self, level: str) -> list[tuple[int, int, int]]:
        """Let all come to their end, apply the oracle, and give what is lost, which at level `learner` is nothing."""
        return self.check(self.finish(120.0), lost="nothing" if level == "learner" else "vanished")

    def check(
        self, report: dict[str, Any], *, lost: str = "nothing", hostile: int = 0
    ) -> list[tuple[int, int, int]]:
        """The oracle. Produced = inserted and counted; nothing twice; in order; one final state for everything.

        Args:
            report: the learner's.
            lost: what may be missing: `nothing`, or the reason for which all of it must be counted.
            hostile: how many batches nobody produced, which may be counted as corrupt.

        Returns:
            What is missing: worker, incarnation and sequence.
        """
        produced: set[tuple[int, int, int]] = {
            (self._id_of(worker), *line["produced"])
            for worker in self.workers
            for line in worker.lines("produced")
        }
        buffer = json.loads((self.folder / "checkpoint.json").read_text())["buffer"]
        inserted = [tuple(one[:3]) for one in buffer]
        say = f"seed {self.seed}: "
        double = [one for one, count in Counter(inserted).items() if count > 1]
        assert not double, f"{say}inserted twice: {double[:10]}"
        # What was on its way when a process was killed or stopped for good may have come without being logged.
        cut_short = {self._id_of(worker) for worker in self.workers if worker.cut_short}
        last = {(worker, life): 0 for worker, life, _ in inserted}
        last |= {one[:2]: one[2] for one in sorted(produced)}
        produced |= {
            (*one, sequence + 1)
            for one, sequence in last.items()
            if one[0] in cut_short and (*one, sequence + 1) in set(inserted)
        }
        invented = set(inserted) - produced
        assert not invented, f"{say}inserted and never produced: {sorted(invented)[:10]}"
        for one in {(worker, life) for worker, life, _ in inserted}:
            sequences = [sequence for worker, life, sequence in inserted if (worker, life) == one]
            assert sequences == sorted(sequences), f"{say}out of order: {one}"
        missing = sorted(produced - set(inserted))
        counted: Counter[str] = Counter()
        for count in report["counts"].values():
            assert count["waiting"] == count["in_hand"] == 0, f"{say}{report['counts']}"
            counted.update(count["lost"])
        # What never got a number is not among the produced.
        counted = Counter({why: n for why, n in counted.items() if why not in ("dropped_newest", "fenced")})
        assert counted.pop("corrupt", 0) <= hostile, f"{say}{report['counts']}"
        if lost == "nothing":
            assert not missing, f"{say}missing: {missing[:10]} of {len(missing)}; counted: {dict(counted)}"
        assert counted == ({lost: len(missing)} if missing else {}), f"{say}missing {missing[:10]}: {counted}"
        delivered = Counter(worker for worker, _, _ in inserted)
        assert all(
            count["delivered"] == delivered[int(worker)] for worker, count in report["counts"].items()
        ), f"{say}{report['counts']} and not {delivered}"
        self._check_ledger(report)
        return missing

    def _check_ledger(self, report: dict[str, Any]) -> None:
        with self.server.client() as client:
            assert client.hlen(self.keys.pending) == 0, f"seed {self.seed}: commands without an end"
            for key in client.scan_iter(self.keys.outcomes("*")):
                assert b"waiting" not in client.hvals(key)
            for worker, missed in report["missed"].items():
                account = WorkerOutcomes.from_fields(
                    text_fields(client.hgetall(self.keys.ledger(int(worker))))
                )
                assert account.applied_total + sum(account.missed.values()) <= account.settled
                assert missed["recorded"] == sum(account.missed.values()), (
                    f"seed {self.seed}: worker {worker}"
                )
                assert missed["behind"] == 0, f"seed {self.seed}: worker {worker} has open versions"
        for worker in self.workers:
            notes = [line["note"] for line in worker.lines("note")]
            assert len(notes) == len(set(notes)), f"seed {self.seed}: a command was done twice: {notes}"

    def _id_of(self, worker: Actor) -> int:
        return int(worker._arguments["worker_id"])


def times(actor: Actor, name: str, after: float) -> Iterator[float]:
    """Give when an actor logged such lines after a moment."""
    return (line["t"] for line in actor.lines(name) if line["t"] > after)


def recovery(arena: Arena, back: float, seconds: float = 10.0) -> dict[str, float]:
    """Wait until of every worker a batch is inserted and a version applied after a moment; give how long it took."""
    learner = arena.learner
    assert learner is not None
    senders = {worker._arguments["worker_id"] for worker in arena.workers}

    def inserted() -> float | None:
        first = dict[int, float]()
        for line in learner.lines("inserted"):
            if line["t"] > back:
                first.setdefault(line["inserted"][0], line["t"])
        return max(first.values()) if first.keys() >= senders else None

    last = arena.wait("a batch of every worker came", inserted, seconds + 20)
    applied = [
        arena.wait("a version came", partial(_first, worker, "version", back), seconds + 20)
        for worker in arena.workers
    ]
    took = {"to_batch": round(last - back, 2), "to_version": round(max(applied) - back, 2)}
    assert max(took.values()) <= seconds, f"seed {arena.seed}: {took}"
    return took


def _first(actor: Actor, name: str, after: float) -> float | None:
    return next(times(actor, name, after), None)
