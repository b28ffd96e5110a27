"""Requests above a limit of the server are refused at once, and nothing behind them fails."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest
from conftest import RealServer, wait_until

from rlbroker import BatchTooLarge, WorkerClient, WorkerCommunicator
from rlbroker.errors import ServerUnsuitable

#: The lowest limit that a server accepts.
LIMIT = 1 << 20

#: Sockets take a batch of the first size whole; while the second is sent, the server closes the connection.
SIZES = [LIMIT + 1000, 12 * LIMIT]


@pytest.fixture
def strict(real_server: RealServer) -> Iterator[RealServer]:
    """A server that takes no argument above `LIMIT`."""
    name = "proto-max-bulk-len"
    before = real_server.client.config_get(name)[name]
    real_server.client.config_set(name, LIMIT)
    yield real_server
    real_server.client.config_set(name, before)


def batch(size: int) -> dict[str, Any]:
    return {"noise": os.urandom(size)}


def collect(comm: WorkerCommunicator, count: int) -> list[int]:
    """Collect and acknowledge this many batches; return the number in each."""
    found: list[int] = []

    def all_came() -> bool:
        found.extend(one["n"] for _, one in comm.collect_experiences(0.2))
        return len(found) >= count

    wait_until("all batches arrived", all_came, 20.0)
    comm.collect_experiences()
    return found


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("level", ["redis", "learner"])
@pytest.mark.parametrize("rights", [(), ("-config",)], ids=["config", "no-config"])
def test_a_batch_that_the_server_never_takes_is_refused_at_once_and_those_behind_it_arrive(
    strict: RealServer, run: str, size: int, level: Any, rights: tuple[str, ...]
) -> None:
    strict.client.execute_command(
        "ACL", "SETUSER", "sender", "reset", "on", ">pw", "~*", "&*", "+@all", *rights
    )
    url = strict.url.replace(strict.url.split("//")[1].split("@")[0], "sender:pw")
    with (
        WorkerCommunicator(1, redis_url=strict.url, run=run, timeout=30.0) as comm,
        WorkerClient(url, run, worker_id=0, timeout=30.0, level=level) as client,
    ):
        client.send_experiences({"n": 1})
        for _ in range(3):
            with pytest.raises(BatchTooLarge, match="proto-max-bulk-len"):
                client.send_experiences(batch(size))
            assert not any(one.sequence > 1 for one in client._sender.writer.pending)
        for n in (2, 3):
            assert client.send_experiences({"n": n}).sequence == n
        assert collect(comm, 3) == [1, 2, 3]
        counts = comm.get_queue_info()["counts"][0]
        assert (counts.produced, counts.delivered) == (3, 3)


def test_a_kept_batch_that_the_server_no_longer_takes_does_not_block_those_behind_it(
    real_server: RealServer, run: str
) -> None:
    """Level `learner` sends it again after a loss; in the meantime the limit was lowered."""
    client = real_server.client
    name = "proto-max-bulk-len"
    before = client.config_get(name)[name]
    try:
        with (
            WorkerCommunicator(1, redis_url=real_server.url, run=run, timeout=20.0) as comm,
            WorkerClient(real_server.url, run, worker_id=0, timeout=20.0, level="learner") as worker,
        ):
            worker.send_experiences({"n": 1})
            worker.send_experiences({"n": 2, **batch(3 * LIMIT)})
            worker.send_experiences({"n": 3})
            client.config_set(name, LIMIT)
            client.flushall()
            client.client_kill_filter(_type="normal", skipme=True)
            worker.send_experiences({"n": 4})
            assert collect(comm, 3) == [1, 3, 4]
            wait_until("it is counted", lambda: comm.get_queue_info()["counts"][0].lost == {"vanished": 1})
    finally:
        client.config_set(name, before)


@pytest.mark.parametrize("size", [2 * LIMIT + 1000, 12 * LIMIT])
def test_weights_and_commands_that_the_server_never_takes_are_refused_at_once(
    strict: RealServer, run: str, size: int
) -> None:
    with WorkerCommunicator(1, redis_url=strict.url, run=run, timeout=30.0) as comm:
        with pytest.raises(ServerUnsuitable, match="proto-max-bulk-len"):
            comm.send_model_weights({"w": os.urandom(size)}, compression_enabled=False)
        with (
            WorkerClient(strict.url, run, worker_id=0) as _,
            pytest.raises(ServerUnsuitable, match="proto-max-bulk-len"),
        ):
            comm.send_control_command("x", {"data": os.urandom(size)})
        assert comm.send_model_weights({"w": b"small"}).version >= 1


def test_a_request_above_the_query_buffer_limit_is_refused_and_those_behind_it_arrive(
    real_server: RealServer, run: str
) -> None:
    """The server closes the connection without an answer."""
    name = "client-query-buffer-limit"
    before = real_server.client.config_get(name)[name]
    real_server.client.config_set(name, LIMIT)
    try:
        with (
            WorkerCommunicator(1, redis_url=real_server.url, run=run, timeout=30.0) as comm,
            WorkerClient(real_server.url, run, worker_id=0, timeout=30.0) as client,
        ):
            for n in (1, 2):
                with pytest.raises(BatchTooLarge, match=name):
                    client.send_experiences(batch(3 * LIMIT))
                assert client.send_experiences({"n": n}).sequence == n
            assert collect(comm, 2) == [1, 2]
            with pytest.raises(ServerUnsuitable, match=name):
                comm.send_control_command("x", {"data": os.urandom(3 * LIMIT)})
            with pytest.raises(ServerUnsuitable, match=name):
                comm.send_model_weights({"w": os.urandom(3 * LIMIT)}, compression_enabled=False)
    finally:
        real_server.client.config_set(name, before)
