"""Exceptions of signal handlers, at any point of any call: nothing confirmed is lost, nothing comes twice."""

from __future__ import annotations

import itertools
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import pytest
from conftest import FakeServer, RealServer, Server, wait_until
from interrupt_scene import Scene
from interrupts import Alarm, Interrupt, Points, interrupt_at

from rlbroker import (
    Command,
    DeadlineExceeded,
    PublishReceipt,
    QueueFull,
    SamplesPerInsert,
    WorkerClient,
    WorkerCommunicator,
)
from rlbroker.backend.deadline import Deadline

CLASSES = (WorkerCommunicator, WorkerClient, Command, PublishReceipt)

#: Without --full, one in so many points of a call is interrupted; prime numbers, so that loops are met at each place.
STRIDES = {"function": 29, "line": 149}

#: On a fake server, which is slower, functions are interrupted this rarely.
FAKE_STRIDE = 149

#: A learner and a worker are used for so many points. Some calls take longer the more has happened in the run.
POINTS_OF_A_SCENE = 50

#: No more than this many failures of one call are looked for.
ENOUGH_FAILURES = 20

#: Prepares a scene, yields the call that is interrupted and then repeated, and checks what it did.
Steps = Callable[[Scene], Iterator[Callable[[], Any]]]

#: The arguments of `interrupt_at`.
Arguments = tuple[int, Points, type[BaseException]]


@dataclass(frozen=True)
class Case:
    """A call that is interrupted.

    Attributes:
        covers: names of the public methods that it calls, such as `WorkerClient.poll`.
        learner: settings of the learner.
        worker: settings of the worker.
        exact: whether no batch may be dropped.
        in_main_thread: whether the call works in the main thread only.
        swallows: whether an interrupt may end in a command's outcome instead: in its handler, or just before it.
        rarely: one in so many points is tried, as each takes long.
    """

    steps: Steps
    covers: str
    learner: dict[str, Any] = field(default_factory=dict)
    worker: dict[str, Any] = field(default_factory=dict)
    exact: bool = True
    in_main_thread: bool = False
    swallows: bool = False
    rarely: int = 1


CASES: dict[str, Case] = {}


def case(covers: str, **settings: Any) -> Callable[[Steps], Steps]:
    def add(steps: Steps) -> Steps:
        CASES[steps.__name__] = Case(steps, covers, **settings)
        return steps

    return add


# Experiences: the worker


@case("WorkerClient.send_experiences")
def send(scene: Scene) -> Iterator[Callable[[], Any]]:
    yield scene.send


@case("WorkerClient.send_experiences", worker={"level": "learner"})
def send_at_level_learner(scene: Scene) -> Iterator[Callable[[], Any]]:
    yield scene.send


@case("WorkerClient.send_experiences", learner={"max_queue_size": 2})
def send_to_a_full_queue(scene: Scene) -> Iterator[Callable[[], Any]]:
    scene.send(2)

    def send_in_vain() -> None:
        with suppress(QueueFull):
            scene.send(timeout=0.02)

    yield send_in_vain


@case("WorkerClient.send_experiences", learner={"max_queue_size": 2})
def send_to_a_queue_that_gets_room(scene: Scene) -> Iterator[Callable[[], Any]]:
    scene.send(2)
    timer = threading.Timer(0.02, scene.collect, kwargs={"timeout": 1.0})
    timer.start()
    yield partial(scene.send, timeout=5.0)
    timer.join()


@case("WorkerClient.send_experiences", learner={"max_queue_size": 2, "when_full": "drop_newest"}, exact=False)
def send_and_drop_the_newest(scene: Scene) -> Iterator[Callable[[], Any]]:
    scene.send(2)
    yield scene.send


@case("WorkerClient.send_experiences", learner={"max_queue_size": 2, "when_full": "drop_oldest"}, exact=False)
def send_and_drop_the_oldest(scene: Scene) -> Iterator[Callable[[], Any]]:
    scene.send(2)
    yield scene.send


@case("WorkerClient.flush", worker={"level": "learner"})
def flush(scene: Scene) -> Iterator[Callable[[], Any]]:
    scene.send(2)
    yield partial(scene.client.flush, timeout=0.01)
    scene.collect_all()
    scene.expect_exact_counts()
    assert scene.client.flush() == 0


# Experiences: the learner


@case("WorkerCommunicator.collect_experiences")
def collect_what_is_there(scene: Scene) -> Iterator[Callable[[], Any]]:
    scene.send(3)
    yield scene.collect


@case("WorkerCommunicator.collect_experiences")
def collect_nothing(scene: Scene) -> Iterator[Callable[[], Any]]:
    yield scene.collect


@case("WorkerCommunicator.collect_experiences")
def collect_and_wait(scene: Scene) -> Iterator[Callable[[], Any]]:
    scene.send(3)
    yield partial(scene.collect, timeout=2.0)
    scene.send()


@case("WorkerCommunicator.collect_experiences")
def collect_what_comes_later(scene: Scene) -> Iterator[Callable[[], Any]]:
    timer = threading.Timer(0.02, scene.send, args=(2,))
    timer.start()
    yield partial(scene.collect, timeout=0.1)
    timer.join()


@case("WorkerCommunicator.collect_experiences")
def collect_and_wait_in_vain(scene: Scene) -> Iterator[Callable[[], Any]]:
    yield partial(scene.collect, timeout=0.005)


@case("WorkerCommunicator.collect_experiences")
def collect_two_of_five(scene: Scene) -> Iterator[Callable[[], Any]]:
    scene.send(5)
    yield partial(scene.collect, max_batches=2)


@case("WorkerCommunicator.collect_experiences", learner={"acknowledge": "manual"})
def collect_without_acknowledging(scene: Scene) -> Iterator[Callable[[], Any]]:
    scene.send(5)
    yield partial(scene.collect, timeout=2.0, max_batches=3)


@case("WorkerCommunicator.collect_round")
def collect_a_round(scene: Scene) -> Iterator[Callable[[], Any]]:
    scene.send(3)
    yield partial(scene.collect_round, per_worker=3)
    scene.send(3)


@case("WorkerCommunicator.collect_round", exact=False)
def collect_a_round_behind_older_batches(scene: Scene) -> Iterator[Callable[[], Any]]:
    scene.send(2)
    scene.publish()
    scene.load()
    scene.send(3)
    yield partial(scene.collect_round, per_worker=2, version=scene.client.version)


@case("WorkerCommunicator.collect_round", exact=False)
def collect_a_newer_round_after_one_that_was_incomplete(scene: Scene) -> Iterator[Callable[[], Any]]:
    scene.send(2)
    scene.collect_round(per_worker=3, timeout=0.0)
    scene.publish()
    scene.load()
    scene.send(2)
    yield partial(scene.collect_round, per_worker=2)


@case("WorkerCommunicator.collect_round", exact=False)
def collect_after_an_interrupted_round(scene: Scene) -> Iterator[Callable[[], Any]]:
    scene.send(2)
    scene.collect_round(per_worker=3, timeout=0.0)
    scene.publish()
    scene.load()
    scene.send(2)
    calls: list[Callable[[], Any]] = [scene.collect, partial(scene.collect_round, per_worker=2)]
    yield lambda: calls.pop()()


@case("WorkerCommunicator.collect_round", learner={"acknowledge": "manual"})
def collect_a_round_in_vain(scene: Scene) -> Iterator[Callable[[], Any]]:
    scene.send(2)
    yield partial(scene.collect_round, per_worker=3, timeout=0.005)


@case("WorkerCommunicator.acknowledge", learner={"acknowledge": "manual"})
def acknowledge_pairs(scene: Scene) -> Iterator[Callable[[], Any]]:
    scene.send(3)
    scene.collect_all()
    yield scene.acknowledge


@case("WorkerCommunicator.acknowledge WorkerCommunicator.marks", learner={"acknowledge": "manual"})
def acknowledge_marks(scene: Scene) -> Iterator[Callable[[], Any]]:
    scene.send(3)
    scene.collect_all()
    yield lambda: scene.comm.acknowledge(scene.comm.marks())
    scene.held = []


@case("WorkerCommunicator.restore", learner={"acknowledge": "manual"})
def restore(scene: Scene) -> Iterator[Callable[[], Any]]:
    scene.send(2)
    scene.collect_all()
    marks = scene.comm.marks()
    scene.send(2)
    scene.comm.cleanup(stop_workers=False)
    scene.comm = scene.open_learner()
    yield lambda: scene.comm.restore(marks)
    scene.collect_all()


@case(
    "WorkerCommunicator.may_sample",
    learner={"samples_per_insert": SamplesPerInsert(1.0, min_size=1, error_buffer=1e9)},
)
def may_sample(scene: Scene) -> Iterator[Callable[[], Any]]:
    yield scene.comm.may_sample


@case(
    "WorkerCommunicator.dead_letters WorkerCommunicator.retry_dead_letters WorkerCommunicator.purge_dead_letters"
)
def dead_letters(scene: Scene) -> Iterator[Callable[[], Any]]:
    scene.damage(2)
    scene.collect()

    def retry_one_and_purge_the_other() -> None:
        letters = scene.comm.dead_letters()
        scene.comm.retry_dead_letters(letters[:1])
        scene.comm.purge_dead_letters(letters[1:])

    yield retry_one_and_purge_the_other
    scene.collect()
    scene.comm.purge_dead_letters()
    assert scene.comm.dead_letters() == []


# Weights


@case("WorkerCommunicator.send_model_weights")
def publish(scene: Scene) -> Iterator[Callable[[], Any]]:
    yield scene.publish


@case("WorkerCommunicator.send_model_weights")
def publish_uncompressed(scene: Scene) -> Iterator[Callable[[], Any]]:
    yield partial(scene.publish, compression_enabled=False)


@case("WorkerCommunicator.send_model_weights PublishReceipt.version")
def publish_in_the_background(scene: Scene) -> Iterator[Callable[[], Any]]:
    yield partial(scene.publish, wait=False)


@case(
    "PublishReceipt.wait PublishReceipt.done PublishReceipt.version PublishReceipt.kind PublishReceipt.base "
    "PublishReceipt.raw_bytes PublishReceipt.stored_bytes PublishReceipt.chunks PublishReceipt.seconds "
    "PublishReceipt.ratio"
)
def receipt_of_weights(scene: Scene) -> Iterator[Callable[[], Any]]:
    receipt = scene.comm.send_model_weights({"large": np.zeros(20_000)}, wait=False)

    def read() -> None:
        receipt.wait()
        assert receipt.done
        assert receipt.version == scene.comm.version
        assert receipt.kind == "full" or receipt.base
        sizes = receipt.raw_bytes, receipt.stored_bytes, receipt.chunks, receipt.seconds, receipt.ratio
        assert min(sizes) > 0

    yield read
    scene.publish()


@case("WorkerClient.poll WorkerClient.version")
def poll_with_weights(scene: Scene) -> Iterator[Callable[[], Any]]:
    scene.wait_for_weights()
    yield scene.poll


@case("WorkerClient.poll", worker={"host_cache": False})
def poll_with_weights_from_the_server(scene: Scene) -> Iterator[Callable[[], Any]]:
    scene.wait_for_weights()
    yield scene.poll


@case("WorkerClient.poll")
def poll_with_nothing(scene: Scene) -> Iterator[Callable[[], Any]]:
    yield scene.poll


@case("WorkerClient.load_weights")
def load_the_latest(scene: Scene) -> Iterator[Callable[[], Any]]:
    scene.publish()
    yield scene.load


@case("WorkerClient.load_weights")
def load_again(scene: Scene) -> Iterator[Callable[[], Any]]:
    scene.load()
    scene.model = {}

    def load() -> None:
        scene.client.load_weights(scene.model)

    yield load
    scene.expect_whole_weights()


@case("WorkerClient.load_weights")
def load_first(scene: Scene) -> Iterator[Callable[[], Any]]:
    scene.client.close()
    scene.client = scene.join()
    scene.model = {}
    scene.applied = 0

    def load() -> None:
        scene.client.load_weights(scene.model)

    yield load
    scene.expect_whole_weights()


@case("WorkerClient.load_weights")
def load_in_vain(scene: Scene) -> Iterator[Callable[[], Any]]:
    other = WorkerClient(run=f"{scene.run}-empty", **scene.server.connection_settings())

    def load() -> None:
        with suppress(DeadlineExceeded):
            other.load_weights({}, timeout=0.03)

    yield load
    other.close()


@case("WorkerClient.wait_for_weights")
def wait_for_newer_weights(scene: Scene) -> Iterator[Callable[[], Any]]:
    before = scene.client.version
    scene.publish()

    def wait() -> None:
        assert scene.client.wait_for_weights(scene.model, 5.0, newer_than=before)
        scene.expect_whole_weights()

    yield wait


@case("WorkerClient.wait_for_weights")
def wait_for_weights_in_vain(scene: Scene) -> Iterator[Callable[[], Any]]:
    def wait() -> None:
        with suppress(DeadlineExceeded):
            scene.client.wait_for_weights(scene.model, 0.03, newer_than=scene.comm.version)

    yield wait


def take(scene: Scene, taken: list[int], **settings: Any) -> None:
    """Take weights, and note what came, before rlbroker is called again and interrupted."""
    if found := scene.client.take_weights(**settings):
        version, scene.model = found
        taken.append(version)
        scene.expect_whole_weights()


@case("WorkerClient.take_weights")
def take_weights(scene: Scene) -> Iterator[Callable[[], Any]]:
    scene.wait_for_weights()
    taken: list[int] = []
    yield partial(take, scene, taken)
    assert taken == [scene.comm.version], f"{taken} were taken"


@case("WorkerClient.take_weights")
def take_weights_that_come_later(scene: Scene) -> Iterator[Callable[[], Any]]:
    timer = threading.Timer(0.02, scene.publish)
    timer.start()
    taken: list[int] = []
    yield partial(take, scene, taken, timeout=0.3)
    timer.join()
    take(scene, taken, timeout=0.0 if taken else 5.0)
    assert taken == [scene.comm.version], f"{taken} were taken"


@case("PublishReceipt.wait_applied")
def wait_until_weights_are_applied(scene: Scene) -> Iterator[Callable[[], Any]]:
    receipt = scene.publish()
    scene.load()
    yield receipt.wait_applied
    assert receipt.wait_applied()[scene.client.worker_id].state == "applied"


@case("PublishReceipt.wait_applied")
def wait_until_weights_are_applied_in_vain(scene: Scene) -> Iterator[Callable[[], Any]]:
    receipt = scene.publish()
    yield partial(receipt.wait_applied, 0.02, [scene.client.worker_id])
    scene.load()
    assert receipt.wait_applied()[scene.client.worker_id].state == "applied"


# Commands


@case("WorkerCommunicator.send_control_command Command.outcomes")
def send_a_command(scene: Scene) -> Iterator[Callable[[], Any]]:
    yield lambda: scene.comm.send_control_command("count", scene.next_number()).outcomes()


@case("WorkerCommunicator.send_control_command")
def send_a_command_to_one_worker(scene: Scene) -> Iterator[Callable[[], Any]]:
    worker_ids = [scene.client.worker_id]
    yield lambda: scene.comm.send_control_command("count", scene.next_number(), worker_ids, expires=60.0)


@case("Command.wait")
def wait_for_a_command(scene: Scene) -> Iterator[Callable[[], Any]]:
    command = scene.command("count", scene.next_number())
    scene.poll()
    yield command.wait


@case("Command.wait")
def wait_for_a_command_in_vain(scene: Scene) -> Iterator[Callable[[], Any]]:
    command = scene.command("count", scene.next_number())
    yield partial(command.wait, timeout=0.02)
    scene.poll()
    assert all(outcome.state == "done" for outcome in command.wait().values())


def expect_true_outcome(scene: Scene, command: Command, obeyed: int) -> None:
    """Check that a command has an outcome which says how often its handler has returned, as far as that is known."""
    outcome = command.wait(timeout=5.0)[scene.client.worker_id]
    assert outcome.state != "waiting", "an obeyed command has no outcome"
    expected = (1,) if outcome else (0, 1) if "interrupted" in str(outcome) else (0,)
    assert obeyed in expected, f"{outcome}, and obeyed {obeyed} times"


@case("WorkerClient.poll WorkerClient.on_command", swallows=True)
def poll_with_a_command(scene: Scene) -> Iterator[Callable[[], Any]]:
    number = scene.next_number()
    command = scene.command("count", number)
    yield scene.poll
    expect_true_outcome(scene, command, scene.obeyed[number])


@case("WorkerClient.poll", swallows=True)
def poll_with_a_command_whose_handler_calls(scene: Scene) -> Iterator[Callable[[], Any]]:
    done = []

    def handle(_: Any) -> None:
        scene.client.reset_requested()
        done.append(1)

    scene.client.on_command("call", handle)
    command = scene.command("call")
    yield scene.poll
    expect_true_outcome(scene, command, len(done))


@case("WorkerClient.poll WorkerClient.paused")
def poll_with_a_pause(scene: Scene) -> Iterator[Callable[[], Any]]:
    command = scene.command("pause", {"duration": 0.02})
    yield scene.poll
    outcome = command.wait(timeout=5.0)[scene.client.worker_id]
    assert outcome.state in ("done", "failed"), f"an obeyed command is {outcome}"
    assert not scene.client.paused


@case("WorkerClient.poll WorkerClient.running")
def poll_with_a_stop(scene: Scene) -> Iterator[Callable[[], Any]]:
    command = scene.command("stop")
    yield scene.poll
    assert not scene.client.running, "a worker that got a stop runs on"
    assert command.wait(timeout=5.0)[scene.client.worker_id], "a worker that stopped has not said so"
    scene.rejoin()


@case("WorkerCommunicator.stop_workers WorkerClient.running", rarely=11)
def stop_workers(scene: Scene) -> Iterator[Callable[[], Any]]:
    scene.send(3)
    yield partial(scene.comm.stop_workers, timeout=0.02)
    wait_until("the worker has the stop", lambda: scene.client._inbox.waiting)
    scene.poll()
    assert not scene.client.running
    assert all(scene.comm.stop_workers(timeout=5.0).values()), "a worker that stopped has not said so"
    scene.collect_all()
    scene.reopen()


@case("WorkerClient.close", rarely=11)
def close_after_the_end(scene: Scene) -> Iterator[Callable[[], Any]]:
    stopped: list[Any] = []
    scene.client.on_command("stop", stopped.append)
    command = scene.comm.send_control_command("stop")
    wait_until("the worker has the stop", lambda: scene.client._inbox.waiting)
    scene.client._heartbeat._run._stop_due = Deadline(0)  # the next heartbeat takes a second
    yield scene.client.close
    assert len(stopped) <= 1
    outcome = command.wait(timeout=5.0)[0]
    assert outcome.state == ("done" if stopped else "failed"), f"the stop is {outcome}, handled: {stopped}"
    scene.reopen()


@case("WorkerClient.reset_requested")
def reset(scene: Scene) -> Iterator[Callable[[], Any]]:
    scene.command("reset")
    scene.poll()
    requested = []
    yield lambda: requested.append(scene.client.reset_requested())
    assert requested.count(True) == 1, f"reset_requested() returned {requested}"


@case("WorkerClient.on_command")
def on_command(scene: Scene) -> Iterator[Callable[[], Any]]:
    obeyed: list[Any] = []
    yield lambda: scene.client.on_command("other", obeyed.append)
    scene.command("other", 1)
    scene.poll()
    assert obeyed == [1]


@case("WorkerClient.drain WorkerClient.draining")
def drain(scene: Scene) -> Iterator[Callable[[], Any]]:
    yield scene.client.drain
    assert scene.client.draining
    scene.rejoin()


@case("WorkerClient.drain_on", in_main_thread=True)
def drain_on(scene: Scene) -> Iterator[Callable[[], Any]]:
    before = signal.getsignal(signal.SIGUSR1)
    yield partial(scene.client.drain_on, signal.SIGUSR1)
    os.kill(os.getpid(), signal.SIGUSR1)
    time.sleep(0)
    assert scene.client.draining
    scene.rejoin()
    assert signal.getsignal(signal.SIGUSR1) == before


# The state of the run


@case("WorkerCommunicator.workers")
def workers(scene: Scene) -> Iterator[Callable[[], Any]]:
    yield scene.comm.workers


@case("WorkerCommunicator.missed_updates")
def missed_updates(scene: Scene) -> Iterator[Callable[[], Any]]:
    for _ in range(2):
        scene.publish()
    scene.load()
    yield scene.comm.missed_updates


@case("WorkerCommunicator.get_queue_info")
def get_queue_info(scene: Scene) -> Iterator[Callable[[], Any]]:
    scene.command("count", scene.next_number())
    scene.poll()
    yield scene.comm.get_queue_info


class Writer:
    def add_scalar(self, tag: str, value: float, step: int) -> None:
        """Write nothing."""


@case("WorkerCommunicator.log_to")
def log_to(scene: Scene) -> Iterator[Callable[[], Any]]:
    yield partial(scene.comm.log_to, Writer(), every_seconds=60.0)


@case(
    "WorkerCommunicator.run WorkerCommunicator.num_workers WorkerCommunicator.timeout "
    "WorkerCommunicator.epoch WorkerCommunicator.version WorkerClient.run "
    "WorkerClient.worker_id WorkerClient.incarnation WorkerClient.version WorkerClient.running "
    "WorkerClient.draining WorkerClient.paused"
)
def properties(scene: Scene) -> Iterator[Callable[[], Any]]:
    comm, client = scene.comm, scene.client
    numbers = [comm.num_workers, comm.timeout, comm.epoch, comm.version, client.worker_id, client.version]

    def read() -> None:
        found = [comm.num_workers, comm.timeout, comm.epoch, comm.version, client.worker_id, client.version]
        assert found == numbers
        assert client.run == comm.run
        assert (client.running, client.paused, client.draining) == (True, False, False)
        assert client.incarnation > 0

    yield read


# Beginning and end


@case("WorkerCommunicator.__init__ WorkerCommunicator.__enter__", rarely=41)
def open_a_learner(scene: Scene) -> Iterator[Callable[[], Any]]:
    scene.comm.cleanup(stop_workers=False)
    scene.note_what_is_open()
    opened: list[WorkerCommunicator] = []

    def open_one() -> None:
        for one in opened:
            one.cleanup(stop_workers=False)
        opened[:] = [scene.open_learner().__enter__()]

    yield open_one
    opened[0].cleanup(stop_workers=False)
    scene.expect_nothing_else_open()
    scene.comm = scene.open_learner()


@case("WorkerCommunicator.cleanup WorkerCommunicator.__exit__", rarely=4)
def cleanup(scene: Scene) -> Iterator[Callable[[], Any]]:
    scene.comm.cleanup(stop_workers=False)
    scene.note_what_is_open()
    scene.comm = scene.open_learner()
    scene.publish(wait=False)
    scene.send(2)
    scene.collect_all()
    scene.client.close()
    yield partial(scene.comm.__exit__, None, None, None)
    scene.expect_nothing_else_open()
    assert scene.comm.cleanup().complete, "the interrupted cleanup was never finished"
    scene.reopen()


@case("WorkerClient.__init__ WorkerClient.__enter__", rarely=13)
def join(scene: Scene) -> Iterator[Callable[[], Any]]:
    scene.client.close()
    scene.note_what_is_open()
    joined: list[WorkerClient] = []

    def join_once() -> None:
        for one in joined:
            one.close()
        joined[:] = [scene.join().__enter__()]

    yield join_once
    joined[0].close()
    scene.expect_nothing_else_open()
    scene.client = scene.join()
    scene.applied = 0
    assert [one.worker_id for one in scene.comm.workers()] == [scene.client.worker_id] == [0]


@case("WorkerClient.close WorkerClient.__exit__", rarely=3)
def close(scene: Scene) -> Iterator[Callable[[], Any]]:
    scene.client.close()
    scene.note_what_is_open()
    scene.client = scene.join()
    scene.applied = 0
    scene.send()
    yield partial(scene.client.__exit__, None, None, None)
    scene.expect_nothing_else_open()
    assert scene.comm.workers() == [], "a closed worker is on the roster"
    scene.client = scene.join()


# The tests


def interrupt_once(case: Case, scene: Scene, interrupt: Interrupt, arguments: Arguments) -> None:
    """Interrupt a call at one point, and go on with the client. `interrupt` gets the place; none if it ended before."""
    running = case.steps(scene)
    call = next(running)
    returned = False
    with interrupt_at(*arguments) as interrupted:
        try:
            call()
            returned = True
        finally:
            interrupt.place, interrupt.ignored = interrupted.place, interrupted.ignored
    call()
    assert next(running, None) is None
    if returned and not case.swallows and not interrupt.ignored:
        assert not interrupt.place, "the interrupt was swallowed"


class Attempts:
    """Interrupts a call at one point after the other, with a new scene after a failure and after some points."""

    def __init__(self, case: Case, open_scene: Callable[[], Scene]) -> None:
        self._case, self._open_scene = case, open_scene
        self._scene: Scene | None = None
        self._points = 0
        self.failures: list[str] = []

    def interrupt(self, arguments: Arguments) -> bool:
        """Interrupt the call at a point, and note what was not as promised. Return whether there may be more points."""
        interrupt = Interrupt()
        try:
            scene = self._prepare()
            once = partial(interrupt_once, self._case, scene, interrupt, arguments)
            if self._case.in_main_thread:
                once()
            else:
                scene.first.do(once)
            scene.second.do(scene.check)
        except BaseException as failure:  # noqa: BLE001 - a late KeyboardInterrupt is a failure, too
            point, points, error = arguments
            self.failures.append(
                f"{points} {point}, {error.__name__} at {interrupt.place}: {type(failure).__name__}: {failure}"
            )
            if self._scene:
                self._scene.abandon()
            self._scene = None
            return True
        return bool(interrupt.place)

    def end(self) -> None:
        if self._scene:
            self._scene.second.do(self._scene.close)
            self._scene.end()
        self._scene = None

    def _prepare(self) -> Scene:
        if self._points % POINTS_OF_A_SCENE == 0:
            self.end()
        self._points += 1
        if self._scene is None:
            self._scene = self._open_scene()
            self._scene.second.do(self._scene.check)
        return self._scene


def interrupt_everywhere(name: str, server: Server, run: str, points: Points, stride: int) -> None:
    """Interrupt a call at its points, one after the other; fail with all that was not as promised afterwards."""
    case, runs = CASES[name], (f"{run}-{number}" for number in itertools.count())

    def open_scene() -> Scene:
        return Scene(server, next(runs), case.learner, case.worker, case.exact)

    attempts = Attempts(case, open_scene)
    for point in itertools.count(1, stride * case.rarely):
        reached = [attempts.interrupt((point, points, error)) for error in (KeyboardInterrupt, Alarm)]
        if not all(reached) or len(attempts.failures) >= ENOUGH_FAILURES:
            break
    attempts.end()
    assert not attempts.failures, "\n".join(["", *attempts.failures])


@pytest.mark.parametrize("points", ["function", "line"])
@pytest.mark.parametrize("name", CASES)
@pytest.mark.timeout(1800)
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_an_interrupted_call_leaves_nothing_half_done(
    real_server: RealServer, run: str, name: str, points: Points, full: bool
) -> None:
    """The same thread repeats the call, and another one goes on: all that was confirmed arrives, all once."""
    interrupt_everywhere(name, real_server, run, points, 1 if full else STRIDES[points])


@pytest.mark.parametrize("name", CASES)
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_an_interrupted_call_leaves_nothing_half_done_on_a_fake_server(run: str, name: str) -> None:
    interrupt_everywhere(name, FakeServer(), run, "function", FAKE_STRIDE)


@pytest.mark.unit
def test_every_public_call_is_interrupted_somewhere() -> None:
    public = {f"{one.__name__}.{name}" for one in CLASSES for name in dir(one) if not name.startswith("_")}
    covered = {name for case in CASES.values() for name in case.covers.split()}
    assert public <= covered, f"without a test of interrupts: {sorted(public - covered)}"
