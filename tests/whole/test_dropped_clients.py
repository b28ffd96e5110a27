"""Clients that are dropped without `close`, at any moment and in any thread, leave nothing behind."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import RealServer, Server, wait_until

from rlbroker import Fenced, WorkerClient, WorkerCommunicator

Learner = Callable[..., WorkerCommunicator]
Worker = Callable[..., WorkerClient]
Make = Callable[[], Any]

#: Memory that the allocator may keep, in MB.
SLACK_MB = 12


@pytest.fixture
def make_worker(server: Server, run: str) -> Make:
    """Makes workers that nothing closes."""
    return lambda: WorkerClient(run=run, timeout=5.0, **server.connection_settings())


@pytest.fixture
def make_learner(server: Server, run: str) -> Make:
    """Makes learners that nothing closes."""
    return lambda: WorkerCommunicator(1, run=run, timeout=5.0, **server.connection_settings())


@contextmanager
def warned(name: str, call: str) -> Iterator[None]:
    with pytest.warns(ResourceWarning, match=rf"unclosed {name} of the run '.+'; call {call}\(\) at the end"):
        yield


def threads_of_clients() -> set[threading.Thread]:
    return {one for one in threading.enumerate() if one.name.startswith("rlbroker-")}


def memory_mb() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") >> 20


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def drop_worker(make: Make, number: int, comm: WorkerCommunicator) -> None:
    client = make()
    client.load_weights({})
    client.send_experiences({"number": number})
    comm.collect_experiences(timeout=5.0)


def drop_learner(make: Make, number: int) -> None:
    comm = make()
    comm.send_model_weights({"w": np.full(100_000, number)}, wait=False)
    comm.collect_experiences()


@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.parametrize("kind", ["learner", "worker"])
def test_clients_dropped_in_a_loop_leave_nothing_behind(
    kind: str,
    reachable: RealServer,
    learner: Learner,
    make_worker: Make,
    make_learner: Make,
    request: pytest.FixtureRequest,
) -> None:
    """The garbage collector is off: everything disappears with the last reference, and with the client's threads."""
    rounds = 200 if request.config.getoption("--full") else 20
    comm = learner() if kind == "worker" else None
    if comm:
        comm.send_model_weights({"w": np.zeros(100_000)})

    def drop(number: int) -> None:
        if comm:
            drop_worker(make_worker, number, comm)
        else:
            drop_learner(make_learner, number)

    def quiet() -> bool:
        return threads_of_clients() <= before and (comm is None or not comm.workers())

    before = threads_of_clients()
    gc.collect()
    gc.disable()
    try:
        for number in range(10):
            drop(number)
        before |= {one for one in threading.enumerate() if "encode" in one.name}
        wait_until("they have left", quiet, 30.0)
        clients = len(reachable.client.client_list())
        files, memory = open_files(), memory_mb()
        for number in range(rounds):
            drop(number)
            wait_until("most have left", lambda: len(threads_of_clients() - before) < 30, 30.0)
        wait_until("all have left", quiet, 30.0)
        wait_until(
            "their connections are closed", lambda: len(reachable.client.client_list()) <= clients + 1, 30.0
        )
        wait_until("their files are closed", lambda: open_files() <= files + 2, 30.0)
        assert memory_mb() <= memory + SLACK_MB
    finally:
        gc.enable()


def test_a_dropped_worker_leaves_the_run_and_warns(learner: Learner, make_worker: Make) -> None:
    comm, client = learner(), make_worker()
    assert len(comm.workers()) == 1
    with warned("WorkerClient", "close"):
        del client
    wait_until("it has left", lambda: not comm.workers())


def test_a_dropped_learner_ends_nothing_and_its_batches_are_delivered_again(
    learner: Learner, worker: Worker, make_learner: Make
) -> None:
    comm, client = make_learner(), worker()
    before = threads_of_clients()
    client.send_experiences({"x": 1})
    assert len(comm.collect_experiences(timeout=5.0)) == 1
    with warned("WorkerCommunicator", "cleanup"):
        del comm
        gc.collect()  # fakeredis keeps frames
    wait_until("its thread has ended", lambda: len(threads_of_clients()) < len(before))
    client.poll()
    assert client.running
    assert len(learner().collect_experiences(timeout=5.0)) == 1


def test_a_dropped_worker_first_confirms_its_batches(
    server: Server, run: str, learner: Learner, keys: Any
) -> None:
    comm = learner()
    client = WorkerClient(run=run, timeout=5.0, level="learner", **server.connection_settings())
    client.send_experiences({"x": 1})
    with warned("WorkerClient", "close"):
        del client
    wait_until("it has left", lambda: not comm.workers())
    assert len(comm.collect_experiences(timeout=5.0)) == 1


class Agent:
    """A program whose client calls it back."""

    def __init__(self, client: WorkerClient) -> None:
        self.client = client
        client.on_command("note", self.note)

    def note(self, data: Any) -> None:
        pass


def test_a_worker_whose_handlers_refer_to_it_is_dropped_with_them(
    learner: Learner, make_worker: Make
) -> None:
    comm, agent = learner(), Agent(make_worker())
    assert len(comm.workers()) == 1
    with warned("WorkerClient", "close"):
        del agent
        gc.collect()
    wait_until("it has left", lambda: not comm.workers())


class Trainer:
    """A program that writes scalars of its learner."""

    def __init__(self, comm: WorkerCommunicator) -> None:
        self.comm = comm
        comm.log_to(self, step=lambda: self.comm.version)

    def add_scalar(self, tag: str, value: float, step: int, /) -> None:
        pass


def test_a_learner_whose_scalars_refer_to_it_is_dropped_with_them(make_learner: Make) -> None:
    before = threads_of_clients()
    trainer = Trainer(make_learner())
    with warned("WorkerCommunicator", "cleanup"):
        del trainer
        gc.collect()
    wait_until("its threads have ended", lambda: threads_of_clients() <= before)


def test_a_client_is_dropped_after_it_raised_an_error(
    reachable: Server, learner: Learner, make_worker: Make
) -> None:
    learner()
    old = [make_worker()]
    new = make_worker_of(old[0])

    def fenced() -> bool:
        try:
            old[0].poll()
        except Fenced:
            return True
        return False

    gc.disable()
    try:
        wait_until("the old one is fenced", fenced)
        with warned("WorkerClient", "close"):
            old.clear()
    finally:
        gc.enable()
    new.close()


def make_worker_of(old: WorkerClient) -> WorkerClient:
    """Return a worker that fences another one."""
    connection = old._connection._base.client
    return WorkerClient(run=old.run, worker_id=old.worker_id, redis_client=connection, timeout=5.0)


def test_a_client_may_be_dropped_in_its_own_thread_and_under_a_lock(
    learner: Learner, make_worker: Make
) -> None:
    """The garbage collector runs anywhere."""
    comm = learner()
    agent = Agent(make_worker())
    collected = threading.Event()

    def collect() -> dict[str, Any]:
        with agent_lock:
            gc.collect()
        collected.set()
        return {}

    agent_lock = threading.Lock()
    agent.client._heartbeat._describe = collect
    gc.disable()
    try:
        # The warning is shown by the thread that collects.
        with warned("WorkerClient", "close"):
            del agent
            assert collected.wait(10.0)
    finally:
        gc.enable()
    wait_until("it has left", lambda: not comm.workers())


def test_a_signal_that_a_dropped_worker_watched_has_its_previous_effect(
    learner: Learner, make_worker: Make
) -> None:
    comm, client = learner(), make_worker()
    got: list[int] = []
    previous = signal.signal(signal.SIGUSR1, lambda number, _: got.append(number))
    try:
        client.drain_on(signal.SIGUSR1)
        with warned("WorkerClient", "close"):
            del client
        wait_until("it has left", lambda: not comm.workers())
        wait_until("its thread has ended", lambda: not _has_thread("heartbeat"))
        signal.raise_signal(signal.SIGUSR1)
        assert got == [signal.SIGUSR1]
    finally:
        signal.signal(signal.SIGUSR1, previous)


def _has_thread(name: str) -> bool:
    return any(name in one.name for one in threads_of_clients())


def test_a_forked_child_that_drops_a_client_does_not_end_it(
    reachable: Server, learner: Learner, worker: Worker
) -> None:
    comm, client = learner(), worker()
    code = (
        "import os, sys\n"
        "from rlbroker import WorkerClient, WorkerCommunicator\n"
        "url, run = sys.argv[1:]\n"
        "comm = WorkerCommunicator(1, redis_url=url, run=run + '-forked')\n"
        "client = WorkerClient(redis_url=url, run=run + '-forked')\n"
        "pid = os.fork()\n"
        "if not pid:\n"
        "    del client, comm\n"
        "    sys.exit(0)\n"
        "assert os.waitpid(pid, 0)[1] == 0\n"
        "assert [one.worker_id for one in comm.workers()] == [0]\n"
        "client.send_experiences({'x': 1})\n"
        "assert len(comm.collect_experiences(timeout=5.0)) == 1\n"
        "client.close()\n"
        "comm.cleanup()\n"
    )
    assert run_script(code, reachable, comm.run) == ("", "")
    assert client.running


def run_script(code: str, server: Any, run: str, *options: str) -> tuple[str, str]:
    """Return what a program prints; it must end by itself, and without an error."""
    done = subprocess.run(
        [sys.executable, "-X", "dev", *options, "-c", code, server.url, run],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout, done.stderr


BEGIN = """
import atexit, sys, threading
from rlbroker import WorkerClient, WorkerCommunicator
url, run = sys.argv[1:]
comm = WorkerCommunicator(1, redis_url=url, run=run)
client = WorkerClient(redis_url=url, run=run)
comm.send_model_weights({"w": 1}, wait=False).version
client.load_weights({})
client.send_experiences({"x": 1})
comm.collect_experiences(timeout=5.0)
"""

ENDS = {
    "never": "",
    "in atexit": "atexit.register(comm.cleanup); atexit.register(client.close)",
    "by a global's __del__": """
class Holder:
    def __init__(self, end):
        self.end = end
    def __del__(self):
        self.end()
holders = Holder(client.close), Holder(comm.cleanup)
""",
    "by the __del__ of a cycle": """
class Holder:
    def __init__(self, end):
        self.end, self.me = end, self
    def __del__(self):
        self.end()
sys.holders = Holder(client.close), Holder(comm.cleanup)
del client, comm
""",
    "in a thread that ends last": """
def end():
    threading.main_thread().join()
    client.close(), comm.cleanup()
threading.Thread(target=end).start()
""",
    "never in a daemon thread": """
import time
def work():
    while True:
        client.send_experiences({"x": 1})
        comm.collect_experiences()
threading.Thread(target=work, daemon=True).start()
time.sleep(0.3)
""",
    "after an error": "client.send_experiences({'x': 1}); sys.exit(0)",
}


@pytest.mark.parametrize("how", ENDS)
def test_a_process_exits_silently_and_soon_however_its_clients_are_closed(
    how: str, reachable: Server, run: str
) -> None:
    assert run_script(BEGIN + ENDS[how], reachable, run) == ("", "")


def test_a_client_dropped_before_the_exit_warns_once(reachable: Server, run: str) -> None:
    _, errors = run_script(BEGIN + "del client; comm.cleanup()", reachable, run)
    assert errors.count("ResourceWarning") == 1
    assert "call close() at the end" in errors


def test_a_constructor_that_fails_leaves_nothing_behind(
    reachable: RealServer, learner: Learner, run: str
) -> None:
    learner(signing_key="k" * 32)
    before, clients = threads_of_clients(), len(reachable.client.client_list())
    for _ in range(3):
        with pytest.raises(ValueError, match="level"):
            WorkerClient(redis_url=reachable.url, run=run, level="none")  # type: ignore[arg-type]
        with pytest.raises(Exception, match=r"replica|append|AOF|fsync"):
            WorkerClient(redis_url=reachable.url, run=run, level="replica", timeout=2.0)
    wait_until("its threads have ended", lambda: threads_of_clients() <= before)
    wait_until("its connections are closed", lambda: len(reachable.client.client_list()) <= clients + 2)


def test_closing_again_after_the_end_changes_nothing(learner: Learner, worker: Worker) -> None:
    comm, client = learner(), worker()
    report = comm.cleanup()
    client.close()
    began = time.monotonic()
    assert comm.cleanup() is report
    client.close()
    assert time.monotonic() - began < 5.0
