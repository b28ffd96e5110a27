"""A worker that changes the types of its own keys all the time troubles no other worker, and is named."""

from __future__ import annotations

import logging
import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from conftest import Reachable, wait_until
from executable import rlbroker

from rlbroker import WorkerClient, WorkerCommunicator
from rlbroker.backend.keys import Keys
from rlbroker.ops.inspect.snapshot import take_snapshot

Learner = Callable[..., WorkerCommunicator]
Worker = Callable[..., WorkerClient]

#: Commands that make a key one of each type.
KINDS = (
    ("SET", "x"),
    ("RPUSH", "x"),
    ("SADD", "x"),
    ("ZADD", "1", "x"),
    ("HSET", "x", "x"),
    ("XADD", "*", "x", "x"),
)


@contextmanager
def flipping(server: Reachable, names: list[str]) -> Iterator[None]:
    """A block in which these keys change their types all the time."""
    stopped, chance = threading.Event(), random.Random(1)
    client = server.another_client()

    def flip() -> None:
        while not stopped.is_set():
            for name in names:
                kind, *arguments = chance.choice(KINDS)
                pipeline = client.pipeline(transaction=chance.random() < 0.5)
                pipeline.execute_command("DEL", name)
                if chance.random() < 0.8:
                    pipeline.execute_command(kind, name, *arguments)
                pipeline.execute(raise_on_error=False)
                time.sleep(chance.choice((0, 0.001, 0.003)))

    thread = threading.Thread(target=flip)
    thread.start()
    try:
        yield
    finally:
        stopped.set()
        thread.join()
        client.delete(*names)


@pytest.mark.parametrize(
    "kinds", [("ack",), ("hb",), ("x",), ("life",), ("counts",), ("x", "ack", "hb", "life", "counts")]
)
def test_keys_whose_type_flips_trouble_no_other_worker(
    learner: Learner,
    worker: Worker,
    reachable: Reachable,
    keys: Keys,
    kinds: tuple[str, ...],
    caplog: pytest.LogCaptureFixture,
) -> None:
    comm, good, bad = learner(lease_seconds=0.5, forget_seconds=1.0), worker(), worker()
    own = dict(zip(("x", "counts", "ack", "life", "hb"), keys.written_by_worker(bad.worker_id), strict=True))
    model: dict[str, Any] = {}
    got: list[int] = []
    with caplog.at_level(logging.WARNING), flipping(reachable, [own[kind] for kind in kinds]):
        end, number = time.monotonic() + 4.0, 0
        while time.monotonic() < end:
            number += 1
            version = comm.send_model_weights({"x": number}).version
            good.load_weights(model)
            assert good.version >= version
            good.send_experiences({"number": number})
            command = comm.send_control_command("reset", worker_ids=[good.worker_id])
            wait_until("the command has arrived", lambda: good._inbox.waiting)
            good.poll()
            assert command.wait(5.0)[good.worker_id], command.outcomes()
            got += [
                batch["number"]
                for one, batch in comm.collect_experiences(timeout=5.0)
                if one == good.worker_id
            ]
            assert good.worker_id in [one.worker_id for one in comm.workers()]
            assert comm.get_queue_info()["counts"][good.worker_id].produced >= 1
            assert comm.missed_updates()[good.worker_id].total == 0
            comm._maintenance.housekeep()
            take_snapshot(comm._connection, keys.run)

    def all_are_collected() -> bool:
        pairs = comm.collect_experiences(timeout=0.1)
        got.extend(batch["number"] for one, batch in pairs if one == good.worker_id)
        return len(got) == number

    wait_until("all are collected", all_are_collected)
    comm._check()


def test_commands_are_not_troubled_by_keys_whose_type_flips(
    learner: Learner, worker: Worker, reachable: Reachable, keys: Keys
) -> None:
    comm, good, bad = learner(), worker(), worker()
    own = list(keys.written_by_worker(bad.worker_id))
    good.send_experiences({"x": 1})
    comm.send_control_command("reset")
    with flipping(reachable, own):
        for command in (
            ["status"],
            ["workers"],
            ["missed"],
            ["experiences", "peek"],
            ["control", "list"],
            ["dead", "list"],
            ["report", "--output", "-"],
            ["check"],
            ["doctor"],
        ):
            done = rlbroker(*command, "--run", keys.run, RLBROKER_REDIS_URL=reachable.url)
            assert done.returncode in ((0, 1, 2) if command[0] in ("check", "doctor") else (0,)), (
                command,
                done.stdout,
                done.stderr,
            )
            assert "unexpected" not in done.stderr, (command, done.stderr)
