"""A worker that drains finishes its batch, sends it and leaves: nothing is lost, and no learner waits for it."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from conftest import Reachable, wait_until

from rlbroker import InvalidArgument, QueueFull, UsageError, WorkerClient, WorkerCommunicator
from rlbroker.backend.keys import Keys
from rlbroker.local.embedded_server import RedisServer

SCRIPT = Path(__file__).parents[1] / "support" / "process_drained.py"

Learner = Callable[..., WorkerCommunicator]
Worker = Callable[..., WorkerClient]


class Process:
    """A worker in a process of its own, which can be asked to drain by a signal."""

    def __init__(self, url: str, run: str, worker_id: int, timeout: float) -> None:
        self.popen = subprocess.Popen(
            [sys.executable, str(SCRIPT), run, str(worker_id), str(timeout)],
            env={**os.environ, "RLBROKER_REDIS_URL": url},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def wait_for_line(self, line: str) -> None:
        """Wait until the process prints this line."""
        assert self.popen.stdout is not None
        for printed in self.popen.stdout:
            if printed == line + "\n":
                return
        raise AssertionError(f"the process ended without {line!r}: {self.popen.communicate()[1]}")

    def let_it_send(self, wish: str = "") -> None:
        """Let the process send its batch, or do something else before."""
        assert self.popen.stdin is not None
        self.popen.stdin.write(wish + "\n")
        self.popen.stdin.flush()

    def drain(self, number: signal.Signals = signal.SIGTERM) -> None:
        """Send a signal, and wait until it has arrived."""
        self.popen.send_signal(number)
        mask = 1 << (number - 1)
        status = Path(f"/proc/{self.popen.pid}/status")
        # The first signal restores the previous handler, and these signals had none.
        wait_until(
            "the signal has arrived",
            lambda: not int(re.findall(r"SigCgt:\s*(\w+)", status.read_text())[0], 16) & mask,
        )

    def end(self) -> int:
        return self.popen.wait(timeout=30)


@pytest.fixture
def start(run: str) -> Iterator[Callable[..., Process]]:
    with ExitStack() as stack:

        def start_process(url: str, worker_id: int = 0, timeout: float = 10.0) -> Process:
            process = Process(url, run, worker_id, timeout)
            stack.enter_context(process.popen)
            stack.callback(process.popen.kill)
            return process

        yield start_process


@pytest.fixture
def comm(reachable: Reachable, run: str) -> Iterator[WorkerCommunicator]:
    """A learner whose workers' queues hold one batch."""
    with WorkerCommunicator(1, 1, redis_url=reachable.url, run=run) as comm:
        yield comm


def delivered(comm: WorkerCommunicator) -> int:
    """Return the number of delivered batches; check that no other was produced and that no worker is a member."""
    while comm.collect_experiences():
        pass
    counts = comm.get_queue_info()["counts"][0]
    assert counts.produced == counts.delivered + sum(counts.lost.values())
    assert comm.workers() == []
    return int(counts.delivered)


@pytest.mark.on_every_engine
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_batch_that_was_begun_is_delivered(
    comm: WorkerCommunicator, reachable: Reachable, start: Callable[..., Process], number: signal.Signals
) -> None:
    comm.send_model_weights({})
    process = start(reachable.url)
    process.wait_for_line("began 1")
    process.drain(number)
    comm.send_model_weights({})  # it will not apply this one
    process.let_it_send()
    process.wait_for_line("left")
    assert process.end() == 0
    assert delivered(comm) == 1
    wait_until("what it missed is settled", lambda: comm.missed_updates()[0].total)
    assert [(one.first, one.last, one.why) for one in comm.missed_updates()[0].records] == [(2, 2, "left")]


def test_a_draining_worker_waits_for_room_in_a_full_queue(
    comm: WorkerCommunicator, reachable: Reachable, start: Callable[..., Process]
) -> None:
    comm.send_model_weights({})
    process = start(reachable.url)
    for number in (1, 2):
        process.wait_for_line(f"began {number}")
        process.let_it_send()
    wait_until("the first fills the queue", lambda: comm.get_queue_info()["experience_queue_sizes"] == [1])
    process.drain()
    assert len(comm.collect_experiences()) == 1
    process.wait_for_line("left")
    assert process.end() == 0
    assert delivered(comm) == 2


def test_draining_ends_a_pause(
    comm: WorkerCommunicator, reachable: Reachable, start: Callable[..., Process]
) -> None:
    comm.send_model_weights({})
    process = start(reachable.url)
    process.wait_for_line("began 1")
    pause = comm.send_control_command("pause")
    process.let_it_send("obey")  # or it might poll before the command is there, and begin a batch
    process.wait_for_line("polls")
    assert str(pause.wait(10.0)[0]) == "done"
    process.drain()
    process.wait_for_line("left")
    assert process.end() == 0
    assert delivered(comm) == 1


def test_draining_ends_the_wait_for_the_first_version(
    comm: WorkerCommunicator, reachable: Reachable, start: Callable[..., Process]
) -> None:
    process = start(reachable.url)
    process.wait_for_line("joined")
    process.drain()
    process.wait_for_line("left")
    assert process.end() == 0
    assert delivered(comm) == 0


def test_a_draining_worker_gives_up_on_an_unreachable_server_after_its_timeout(
    run: str, start: Callable[..., Process]
) -> None:
    with RedisServer() as server, WorkerCommunicator(1, redis_url=server.url, run=run, timeout=1.0) as comm:
        comm.send_model_weights({})
        process = start(server.url, timeout=1.0)
        process.wait_for_line("began 1")
        assert server.pid is not None
        os.kill(server.pid, signal.SIGKILL)
        process.drain()
        process.let_it_send()
        _, problem = process.popen.communicate(timeout=30)
        assert process.popen.returncode == 1
        assert "ConnectionFailed" in problem  # the caller knows that its batch did not arrive


def test_a_second_signal_ends_a_worker_at_once(
    comm: WorkerCommunicator, reachable: Reachable, start: Callable[..., Process]
) -> None:
    comm.send_model_weights({})
    process = start(reachable.url)
    process.wait_for_line("began 1")
    process.drain()
    process.popen.terminate()
    assert process.end() == -signal.SIGTERM


def test_a_draining_worker_waits_until_the_learner_has_acknowledged_its_batches(
    learner: Learner, worker: Worker, caplog: pytest.LogCaptureFixture
) -> None:
    comm, client = learner(1, acknowledge="manual"), worker(level="learner")
    client.send_experiences({})
    pairs = comm.collect_experiences(timeout=5.0)
    client.drain()
    closing = threading.Thread(target=client.close)
    closing.start()
    wait_until("closing has begun", lambda: client._life.closing)
    assert closing.is_alive()
    comm.acknowledge(pairs)
    closing.join(10.0)
    assert not closing.is_alive()
    assert "not reached level" not in caplog.text


def test_a_stop_ends_a_draining_workers_wait_for_room(learner: Learner, worker: Worker) -> None:
    """After a stop no learner collects any more, so waiting for room would be in vain."""
    comm, client = learner(1, max_queue_size=1), worker()
    client.send_experiences({})
    client.drain()
    comm.send_control_command("stop")
    wait_until("it arrived", lambda: client._inbox.contains("stop"))
    assert not client.send_experiences({})


def test_a_draining_worker_waits_for_room_no_longer_than_its_timeout(
    learner: Learner, worker: Worker
) -> None:
    learner(1, max_queue_size=1)
    client = worker()
    client.send_experiences({})
    client.drain()
    with pytest.raises(QueueFull):
        client.send_experiences({}, timeout=0.1)


def test_a_draining_worker_applies_no_new_weights(learner: Learner, worker: Worker) -> None:
    comm, client = learner(1), worker()
    comm.send_model_weights({})
    wait_until("the weights are ready", lambda: client._subscriber.ready)
    assert client.running
    client.drain()
    assert (client.running, client.draining, client.poll({}), client.version) == (False, True, False, 0)


def test_signal_handlers_are_restored(worker: Worker) -> None:
    before, term_before = signal.getsignal(signal.SIGUSR1), signal.getsignal(signal.SIGTERM)
    with worker() as client:
        client.drain_on(signal.SIGUSR1, signal.SIGTERM)
        client.drain_on(signal.SIGUSR1)  # a second call changes nothing
        assert signal.getsignal(signal.SIGUSR1) != before
        signal.raise_signal(signal.SIGUSR1)
        assert client.draining
        assert signal.getsignal(signal.SIGUSR1) == before
    assert signal.getsignal(signal.SIGTERM) == term_before


def test_only_the_main_thread_can_handle_signals(worker: Worker) -> None:
    client, errors = worker(), list[Exception]()

    def watch() -> None:
        try:
            client.drain_on(signal.SIGUSR1)
        except UsageError as error:
            errors.append(error)

    thread = threading.Thread(target=watch)
    thread.start()
    thread.join()
    assert "only the main thread" in str(errors[0])
    with pytest.raises(InvalidArgument, match="is not a signal"):
        client.drain_on(signal.SIGKILL)


def test_a_drained_worker_leaves_at_once(reachable: Reachable, run: str, keys: Keys) -> None:
    """The learner does not have to wait for its lease to expire."""
    with WorkerClient(redis_url=reachable.url, run=run) as client:
        client.drain()
    entries = reachable.client.xrange(keys.acknowledgements(0))
    assert [fields[b"event"] for _, fields in entries] == [b"joined", b"left"]
