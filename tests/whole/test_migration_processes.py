"""What `docs/migration.md` says of runs and processes is true: their names, and the ways to start and to end them."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from multiprocessing.process import BaseProcess
from typing import Any

import numpy as np
import pytest
from conftest import RealServer, Server, wait_until
from migrated_worker import work

from rlbroker import Fenced, ForkedProcess, WorkerCommunicator

#: Seconds for what takes milliseconds on an idle machine.
LONG = 20.0


@pytest.fixture
def start(real_server: RealServer, run: str) -> Iterator[Callable[..., BaseProcess]]:
    """Starts workers as daemon processes; kills those that a test leaves."""
    with ExitStack() as stack:

        def start_one(method: str, worker_id: int, *arguments: Any) -> BaseProcess:
            process: BaseProcess = multiprocessing.get_context(method).Process(  # type: ignore[attr-defined]
                target=work, args=(worker_id, real_server.url, run, *arguments), daemon=True
            )
            process.start()
            stack.callback(process.join)
            stack.callback(process.kill)
            return process

        yield start_one


@pytest.fixture
def comm(real_server: RealServer, run: str) -> Iterator[WorkerCommunicator]:
    with WorkerCommunicator(2, 10, LONG, redis_url=real_server.url, run=run, lease_seconds=2.0) as comm:
        comm.send_model_weights({"w": np.ones(3)})
        yield comm


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.parametrize("method", ["spawn", "forkserver", "fork"])
def test_a_client_is_made_in_the_child_by_any_start_method(
    comm: WorkerCommunicator, start: Callable[..., BaseProcess], method: str
) -> None:
    process = start(method, 1)
    assert comm.collect_experiences(timeout=LONG)[0][0] == 1
    comm.send_control_command("stop")
    process.join(LONG)
    assert process.exitcode == 0
    wait_until("it has left", lambda: comm.workers() == [], LONG)


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_clients_can_be_neither_pickled_nor_used_after_a_fork(comm: WorkerCommunicator) -> None:
    with pytest.raises(TypeError):
        pickle.dumps(comm)
    pid = os.fork()
    if not pid:
        try:
            comm.send_model_weights({})
        except ForkedProcess:
            os._exit(7)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_draining_daemon_sends_its_batch_and_leaves(
    comm: WorkerCommunicator, start: Callable[..., BaseProcess], number: signal.Signals
) -> None:
    process = start("spawn", 0, number)
    got = comm.collect_experiences(timeout=LONG)
    os.kill(process.pid or 0, number)
    end = time.monotonic() + LONG
    while process.is_alive() and time.monotonic() < end:
        got += comm.collect_experiences(timeout=0.1)
    assert process.exitcode == 0
    wait_until("it has left", lambda: comm.workers() == [], LONG)
    got += comm.collect_experiences()
    assert [batch["number"] for _, batch in got] == list(range(1, len(got) + 1))
    comm.collect_experiences()
    counts = comm.get_queue_info()["counts"][0]
    assert (counts.produced, counts.lost) == (len(got), {})


def test_a_terminated_daemon_is_away_and_its_successor_takes_over(
    comm: WorkerCommunicator, start: Callable[..., BaseProcess]
) -> None:
    first = start("spawn", 0)
    wait_until("its queue is full", lambda: comm.get_queue_info()["experience_queue_sizes"][0] == 10, LONG)
    first.terminate()
    first.join(LONG)
    wait_until("it is away", lambda: comm.workers()[0].state == "away", LONG)
    command = comm.send_control_command("reset")
    got = comm.collect_experiences(timeout=LONG)
    assert [batch["number"] for _, batch in got] == list(range(1, 11)), "what it sent is on the server"
    start("spawn", 0)
    wait_until("the successor sends", lambda: comm.collect_experiences(timeout=1.0), LONG)
    assert [worker.state for worker in comm.workers()] == ["alive"]
    assert str(command.wait(LONG)[0]) == "missed: away"
    comm.send_control_command("stop")


def test_ctrl_c_in_a_worker_without_a_drain_leaves_the_run(
    comm: WorkerCommunicator, start: Callable[..., BaseProcess]
) -> None:
    process = start("spawn", 0)
    comm.collect_experiences(timeout=LONG)
    os.kill(process.pid or 0, signal.SIGINT)
    wait_until("it has left", lambda: comm.collect_experiences() is not None and comm.workers() == [], LONG)
    process.join(LONG)
    assert process.exitcode not in (0, None)


def test_two_trainings_need_two_names(
    learner: Callable[..., WorkerCommunicator], server: Server, run: str
) -> None:
    comm = learner()
    comm.send_model_weights({"w": np.ones(1)})
    with WorkerCommunicator(1, run=f"{run}-other", **server.connection_settings()) as other:
        assert other.version == 0
        assert comm.send_model_weights({"w": np.ones(1)}).version == 2
    newer = learner()
    assert newer.version == 2, "the old name continues the old run"
    with pytest.raises(Fenced) as raised:
        comm.send_model_weights({"w": np.ones(1)})
    assert isinstance(raised.value, RuntimeError)
