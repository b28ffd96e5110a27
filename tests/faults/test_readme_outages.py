"""The loops that the README shows outlast every kind of outage, on both sides, and nothing is lost."""

from __future__ import annotations

import os
import re
import signal
import textwrap
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from conftest import wait_until
from servers import FaultyServer

import rlbroker
from rlbroker import WorkerClient, WorkerCommunicator
from rlbroker.config import Level

README = Path(__file__).parents[2] / "README.md"

NewServer = Callable[..., FaultyServer]

#: Shorter than the outages, so that every call fails at least once.
TIMEOUT = 1.0

#: Failures that each loop must outlast in one outage.
FAILURES = 2


def typed(beginning: str) -> str:
    """Return the block of code in the README that begins so."""
    (block,) = [
        block
        for block in re.findall(r"^```python\n(.*?)^```", README.read_text(), re.MULTILINE | re.DOTALL)
        if block.startswith(beginning)
    ]
    return str(block)


def compiled(before: str, block: str, after: str) -> Any:
    """Return a function whose loop has the block as its body, between other lines."""
    body = textwrap.indent(f"{before}\n{block}{after}", " " * 8)
    names: dict[str, Any] = dict(vars(rlbroker))
    exec(f"def loop(ended, **given):\n    globals().update(given)\n    while not ended():\n{body}", names)
    return names["loop"]


WORKER_LOOP = compiled(
    "worker.poll(model)\nattempts.append(number())\nbatch = {'n': number()}",
    typed("try:\n    worker.send_experiences(batch)\n"),
    "accepted.append(number())\n",
)
LEARNER_LOOP = compiled(
    "steps.append(1)", typed("try:\n    pairs = comm.collect_experiences(timeout=1.0)\n"), "done.append(1)\n"
)


@contextmanager
def memory(server: FaultyServer) -> Iterator[None]:
    server.client().config_set("maxmemory", 1)
    yield
    server.client().config_set("maxmemory", 0)


@contextmanager
def disk(server: FaultyServer) -> Iterator[None]:
    """Let a snapshot fail, as at a full disk."""
    client = server.client()
    client.set("some", "key")
    client.config_set("rdb-key-save-delay", 10_000_000)
    client.bgsave()
    children = Path(f"/proc/{client.info('server')['process_id']}/task").glob("*/children")
    for pid in " ".join(path.read_text() for path in children).split():
        os.kill(int(pid), signal.SIGKILL)
    wait_until("the snapshot failed", lambda: client.info("persistence")["rdb_last_bgsave_status"] == "err")
    yield
    client.config_set("rdb-key-save-delay", 0)
    client.bgsave()


@contextmanager
def rights(server: FaultyServer) -> Iterator[None]:
    server.client().execute_command(
        "ACL", "SETUSER", "me", "-hset", "-evalsha", "-xread", "-xreadgroup", "-xadd"
    )
    yield
    server.client().execute_command("ACL", "SETUSER", "me", "+@all")


@contextmanager
def password(server: FaultyServer) -> Iterator[None]:
    server.client().execute_command("ACL", "SETUSER", "me", "resetpass", ">other")
    server.client().client_kill_filter(user="me")
    yield
    server.client().execute_command("ACL", "SETUSER", "me", ">pw")


@contextmanager
def replica(server: FaultyServer) -> Iterator[None]:
    server.client().replicaof("127.0.0.1", 1)
    yield
    server.client().replicaof("NO", "ONE")


@contextmanager
def replicas(server: FaultyServer) -> Iterator[None]:
    server.client().config_set("min-replicas-to-write", 1)
    yield
    server.client().config_set("min-replicas-to-write", 0)


@contextmanager
def clients(server: FaultyServer) -> Iterator[None]:
    client = server.client()
    client.config_set("maxclients", 1)
    client.client_kill_filter(_type="normal", skipme=True)
    client.client_kill_filter(_type="pubsub", skipme=True)
    yield
    client.config_set("maxclients", 10_000)


@contextmanager
def frozen(server: FaultyServer) -> Iterator[None]:
    server.freeze()
    yield
    server.thaw()


@contextmanager
def dead(server: FaultyServer) -> Iterator[None]:
    server.client().save()
    server.kill()
    yield
    server.start()
    server.client().execute_command("ACL", "SETUSER", "me", "reset", "on", ">pw", "~*", "&*", "+@all")


OUTAGES = [memory, disk, rights, password, replica, replicas, clients, frozen, dead]


@pytest.mark.parametrize("outage", OUTAGES, ids=lambda one: one.__name__)
def test_the_loops_of_the_readme_outlast_an_outage(new_server: NewServer, outage: Any) -> None:
    server = new_server("--save", "3600 100000000", "--enable-debug-command", "yes")
    server.client().execute_command("ACL", "SETUSER", "me", "reset", "on", ">pw", "~*", "&*", "+@all")
    url = server.url.replace("//", "//me:pw@")
    accepted: list[int] = []
    attempts: list[int] = []
    steps: list[int] = []
    done: list[int] = []
    collected: list[int] = []
    weights: dict[str, Any] = {}
    ended = threading.Event()
    problems: list[BaseException] = []

    def run(loop: Any, **given: Any) -> threading.Thread:
        def guarded() -> None:
            try:
                loop(ended.is_set, **given)
            except BaseException as error:  # noqa: BLE001 - shown below
                problems.append(error)

        thread = threading.Thread(target=guarded)
        thread.start()
        return thread

    def failures() -> tuple[int, int]:
        assert not problems, problems
        return len(attempts) - len(accepted), len(steps) - len(done)

    # A server that dies loses what it accepted since it saved its data; only this level survives that.
    level: Level = "learner" if outage is dead else "redis"
    with (
        WorkerCommunicator(1, redis_url=url, run="pong", timeout=TIMEOUT) as comm,
        WorkerClient(url, "pong", worker_id=0, timeout=TIMEOUT, level=level) as worker,
    ):
        threads = [
            run(
                WORKER_LOOP,
                worker=worker,
                model=weights,
                accepted=accepted,
                attempts=attempts,
                number=lambda: len(accepted),
            ),
            run(
                LEARNER_LOOP,
                comm=comm,
                steps=steps,
                done=done,
                learn=lambda batch: collected.append(batch["n"]),
                model=Model(),
            ),
        ]
        try:
            wait_until("both loops run", lambda: len(accepted) > 3 and len(collected) > 3)
            with outage(server):
                before = failures()
                wait_until(
                    "both loops have failed",
                    lambda: all(now >= then + FAILURES for now, then in zip(failures(), before, strict=True)),
                    30.0,
                )
            counts = len(accepted), len(done), worker.version
            wait_until(
                "both loops work again",
                lambda: (
                    not problems
                    and len(accepted) > counts[0] + 3
                    and len(done) > counts[1] + 3
                    and worker.version > counts[2]
                ),
                30.0,
            )
        finally:
            ended.set()
            for thread in threads:
                thread.join()
        assert not problems

        def all_collected() -> bool:
            collected.extend(batch["n"] for _, batch in comm.collect_experiences(timeout=0.5))
            return len(collected) >= len(accepted)

        wait_until("all batches arrived", all_collected, 20.0)
        assert sorted(collected) == list(range(len(accepted)))
        wait_until("all are safe", lambda: comm.collect_experiences() == [] and worker.flush(0.2) == 0)


class Model:
    """A model with some weights."""

    def state_dict(self) -> dict[str, Any]:
        return {"w": b"weights"}
