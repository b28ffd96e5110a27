"""A model of one run: any order of sends, crashes, twins, lost replies and lost servers keeps the promises.

The clients are real, but their background threads do not run: the state machine calls their steps itself, one at a
time, so that Hypothesis can find, repeat and shorten a failing order. The expected state is kept beside them in plain
dictionaries and sets.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pytest
from conftest import ClusterServer, RealServer, Server, TrioServer
from crashed import end_at_once
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    precondition,
    rule,
    run_state_machine_as_test,
)
from lossy import Lossy

from rlbroker import ConnectionFailed, Fenced, Unconfirmed, WorkerClient, WorkerCommunicator
from rlbroker.backend.connection import Connection
from rlbroker.backend.threads import BackgroundThread
from rlbroker.config import Level
from rlbroker.control import control_reader
from rlbroker.learner import maintenance
from rlbroker.types import Outcome

RUNS = (f"model-{number}" for number in itertools.count(1))

worker_ids = st.integers(0, 1)
levels: st.SearchStrategy[Level] = st.sampled_from(["redis", "learner"])

#: Worker, incarnation and sequence of a batch.
BatchId = tuple[int, int, int]


class LossyClient(Lossy):
    """One client's connection to the server, on which a chosen reply is lost."""

    def __init__(self, server: Server) -> None:
        self._left = 0
        super().__init__(server.another_client(), self._is_due)

    def lose(self, number: int) -> None:
        """Lose the reply with this number: 1 for the next one, 0 for none."""
        self._left = number

    def _is_due(self) -> bool:
        self._left -= 1
        return self._left == 0


@dataclass
class Incarnation:
    """One incarnation of a worker.

    Attributes:
        sent: its batches.
        model: the dictionary that it loads weights into.
        obeyed: numbers of the commands that it obeyed.
        behind: whether it has not yet noticed that the server lost everything.
    """

    client: WorkerClient
    lossy: LossyClient
    level: Level
    sent: list[BatchId] = field(default_factory=list)
    model: dict[str, Any] = field(default_factory=dict)
    obeyed: list[int] = field(default_factory=list)
    behind: bool = False


class Run(RuleBasedStateMachine):
    """One run, and its expected state."""

    server: Server

    @initialize()
    def begin(self) -> None:
        self.name = next(RUNS)
        self.numbers = itertools.count(1)
        self.workers: dict[int, Incarnation] = {}
        self.replaced: list[Incarnation] = []
        self.former: list[WorkerCommunicator] = []
        self.clients: list[WorkerCommunicator | WorkerClient] = []
        #: The learner's buffer, and the buffer and the marks in its last checkpoint.
        self.buffer: list[tuple[BatchId, int]] = []
        self.saved: tuple[list[tuple[BatchId, int]], Any] = ([], None)
        self.produced: dict[BatchId, int] = {}
        self.may_be_lost: set[BatchId] = set()
        self.weights: dict[int, int] = {}
        self.version = 0
        #: By worker: how many versions it has to apply or to miss.
        self.owed: Counter[int] = Counter()
        self.commands: list[tuple[Any, int, list[int]]] = []
        #: By number of a command: final outcomes that a learner saw before it crashed; a later one may not know them.
        self.ended_before: dict[int, dict[int, Outcome]] = {}
        self.learner_behind = False
        #: False once no process remembers a fact that the server lost: then sums may be wrong, and old incarnations
        #: may be accepted.
        self.remembered = True
        self.losses = 0
        self.learner = self.new_learner()
        self.worker_starts(0, "learner")
        self.worker_starts(1, "redis")

    # Learner

    def new_learner(self) -> WorkerCommunicator:
        self.learner_lossy = LossyClient(self.server)
        learner = WorkerCommunicator(
            2,
            run=self.name,
            redis_client=self.learner_lossy.client,
            acknowledge="manual",
            take_over_seconds=3600.0,
            timeout=5.0,
        )
        self.clients.append(learner)
        return learner

    def learner_steps(self) -> None:
        """Do the steps of the learner's background thread until it has nothing left to do."""
        for _ in range(4):
            self.again(self.learner._maintenance.run_once)
        self.learner_behind = False
        self.see_version()

    def see_version(self) -> None:
        """Note that all members have to apply or miss the versions up to the latest."""
        for worker in self.workers:
            self.owed[worker] += self.learner.version - self.version
        # A version that no rule published is the latest one, published again because the server had lost it.
        self.weights.setdefault(self.learner.version, self.weights.get(self.version, 0))
        self.version = self.learner.version

    @rule(lose=st.booleans())
    def publish(self, lose: bool) -> None:
        self.learner_steps()
        self.learner_lossy.lose(int(lose))
        number = next(self.numbers)
        version = self.learner.send_model_weights({"number": number}).version
        assert version > self.version or not self.remembered, "a version was used twice"
        self.weights[version] = number
        self.see_version()

    @rule()
    def send_command(self) -> None:
        self.learner_steps()
        number = next(self.numbers)
        command = self.learner.send_control_command("note", number)
        known = {
            worker
            for worker, incarnation in self.workers.items()
            if not incarnation.behind or self.remembered
        }
        assert known <= set(command.worker_ids) <= self.workers.keys()
        self.commands.append((command, number, sorted(command.worker_ids)))

    @rule(lose=st.booleans(), count=st.integers(1, 5))
    def collect(self, lose: bool, count: int) -> None:
        self.learner_lossy.lose(int(lose))
        with contextlib.suppress(ConnectionFailed):  # then the next call returns them
            for _, batch in self.learner.collect_experiences(max_batches=count):
                self.buffer.append(((batch.worker_id, batch.incarnation, batch.sequence), batch["number"]))

    @rule()
    def save_checkpoint(self) -> None:
        self.saved = list(self.buffer), self.learner.marks()

    @precondition(lambda self: self.saved[1])
    @rule(lose=st.booleans())
    def acknowledge_checkpoint(self, lose: bool) -> None:
        self.learner_lossy.lose(int(lose))
        self.learner.acknowledge(self.saved[1])

    @rule()
    def learner_works_in_background(self) -> None:
        self.learner_steps()

    @rule()
    def learner_crashes(self) -> None:
        if self.learner_behind:
            self.remembered = False
        for command, number, _ in self.commands:
            ended = {one: outcome for one, outcome in command.outcomes().items() if _final(outcome)}
            self.ended_before[number] = ended | self.ended_before.get(number, {})
        self.former.append(self.learner)
        self.learner = self.new_learner()
        buffer, marks = self.saved
        self.buffer = list(buffer)
        if marks:
            self.learner.restore(marks)
        if self.learner.version < self.version:  # no process had the weights that the server lost
            self.remembered = False
            self.version = self.learner.version
        self.learner_steps()

    @precondition(lambda self: self.former and not self.learner_behind)
    @rule()
    def former_learner_resumes(self) -> None:
        with pytest.raises(Fenced):
            self.former[-1].send_model_weights({"number": -1})
        with pytest.raises(Fenced):
            self.again(self.former[-1]._maintenance.run_once)

    # Workers

    @rule(worker=worker_ids, level=levels)
    def worker_starts(self, worker: int, level: Level) -> None:
        """Start a worker, even if one with its id exists: that one crashed, or has a twin now."""
        if worker in self.workers:
            self.replaced.append(self.remove_worker(worker))
        lossy = LossyClient(self.server)
        client = WorkerClient(
            worker_id=worker, run=self.name, redis_client=lossy.client, level=level, timeout=5.0
        )
        self.clients.append(client)
        incarnation = Incarnation(client, lossy, level)
        client.on_command("note", incarnation.obeyed.append)
        self.workers[worker] = incarnation
        if not self.learner_behind:
            self.learner_steps()  # the learner remembers only workers that it has seen

    def remove_worker(self, worker: int) -> Incarnation:
        incarnation = self.workers.pop(worker)
        if incarnation.behind:
            self.may_be_lost.update(incarnation.sent)
            self.remembered = False
        return incarnation

    @precondition(lambda self: self.workers)
    @rule(data=st.data(), lose=st.integers(0, 3))
    def worker_sends(self, data: st.DataObject, lose: int) -> None:
        incarnation = self.draw_worker(data)
        if not incarnation.client._heartbeat.knows_run:  # it joined while the run was lost
            self.learner_steps()
            self.worker_steps(incarnation)
        incarnation.lossy.lose(lose)
        number = next(self.numbers)
        try:
            receipt = incarnation.client.send_experiences({"number": number})
        except Unconfirmed as error:
            receipt = error.receipt
        incarnation.behind = False
        batch_id = (receipt.worker_id, receipt.incarnation, receipt.sequence)
        assert batch_id not in self.produced, "a sequence was used twice"
        self.produced[batch_id] = number
        incarnation.sent.append(batch_id)

    @precondition(lambda self: self.workers)
    @rule(data=st.data(), lose=st.booleans())
    def worker_polls(self, data: st.DataObject, lose: bool) -> None:
        incarnation = self.draw_worker(data)
        before = incarnation.client.version
        self.again(incarnation.client._subscriber._poll)
        self.again(incarnation.client._inbox._step)
        incarnation.lossy.lose(int(lose))
        if incarnation.client.poll(incarnation.model):
            assert incarnation.client.version > before
        if incarnation.client.version and self.remembered:
            assert incarnation.model["number"] == self.weights[incarnation.client.version]

    @precondition(lambda self: self.workers)
    @rule(data=st.data(), lose=st.booleans())
    def worker_beats(self, data: st.DataObject, lose: bool) -> None:
        incarnation = self.draw_worker(data)
        incarnation.lossy.lose(int(lose))
        self.worker_steps(incarnation)

    @precondition(lambda self: self.workers)
    @rule(data=st.data())
    def worker_leaves(self, data: st.DataObject) -> None:
        worker = data.draw(st.sampled_from(sorted(self.workers)))
        self.worker_steps(self.workers[worker])
        self.remove_worker(worker).client.close()
        self.learner_steps()  # so that it notices; else it would restore the worker as a member after a loss

    @precondition(lambda self: self.workers and not self.learner_behind)
    @rule(data=st.data())
    def worker_is_forgotten(self, data: st.DataObject) -> None:
        """A worker was silent for too long. It is fenced when it continues."""
        worker = data.draw(st.sampled_from(sorted(self.workers)))
        if self.workers[worker].behind:
            self.worker_steps(self.workers[worker])
        self.server.client.hset(self.learner._keys.life(worker), "seen", 0)
        self.server.client.hset(self.learner._keys.meta, "back_at", 0)
        self.learner._maintenance.housekeep()
        with pytest.raises(Fenced):
            self.again(self.workers[worker].client._heartbeat._step)
        self.remove_worker(worker)
        self.learner_steps()

    @precondition(lambda self: self.replaced and self.remembered and not self.learner_behind)
    @rule()
    def replaced_worker_resumes(self) -> None:
        incarnation = self.replaced.pop()
        incarnation.client._sender.mark_stale()
        if incarnation.client._heartbeat.knows_run:  # before, it waits for the settings instead
            with pytest.raises(Fenced):
                incarnation.client.send_experiences({"number": -1})
        with pytest.raises(Fenced):
            self.again(incarnation.client._heartbeat._step)

    def worker_steps(self, incarnation: Incarnation) -> None:
        """Do the steps of a worker's background threads until the server knows it again."""
        for step in (
            incarnation.client._heartbeat._step,
            incarnation.client._heartbeat._step,
            incarnation.client._inbox._step,
        ):
            self.again(step)
        incarnation.behind = False

    def again(self, step: Callable[[], bool | None]) -> None:
        """Do a step as a background thread does: retry it after a network fault."""
        thread = BackgroundThread("once", lambda: None)

        def once() -> None:
            step()
            thread.request_stop()

        thread._step = once
        thread._work()
        thread.check()

    def draw_worker(self, data: st.DataObject) -> Incarnation:
        return self.workers[data.draw(st.sampled_from(sorted(self.workers)))]

    # The server

    @precondition(lambda self: self.losses < 2)  # more of them only hide other failures
    @rule(breaks=st.booleans())
    def server_loses_everything(self, breaks: bool) -> None:
        """Restart the server, which breaks connections; or flush it, which no client notices at once."""
        self.losses += 1
        seen = self.learner._roster._incarnations.by_worker
        for worker, one in self.workers.items():  # one that joined after another loss may not have been seen
            self.remembered &= worker in seen and seen[worker].number == one.client.incarnation
        self.server.client.flushall()
        saved = {batch_id for batch_id, _ in self.saved[0]}
        for batch_id in self.produced:
            incarnation = self.workers.get(batch_id[0])
            kept = incarnation is not None and incarnation.level == "learner" and batch_id in incarnation.sent
            if not kept and batch_id not in saved:
                self.may_be_lost.add(batch_id)
                # A dead worker cannot report how many batches it sent.
                self.remembered &= incarnation is not None and batch_id in incarnation.sent
        for incarnation in (*self.workers.values(), *self.replaced):
            incarnation.behind = True
            if breaks:
                incarnation.lossy.break_connections()
        self.learner_behind = True
        if breaks:
            self.learner_lossy.break_connections()

    # The end

    def teardown(self) -> None:
        if not hasattr(self, "learner"):
            return
        try:
            self.finish()
        finally:
            for client in self.clients:
                end_at_once(client)

    def finish(self) -> None:
        """Let all clients finish their work; then the sums must be right."""
        self.learner_steps()
        for worker in sorted(self.workers):
            incarnation = self.workers[worker]
            self.worker_steps(incarnation)
            incarnation.client.poll()
            self.again(incarnation.client._inbox._step)
        for _ in range(3):
            while pairs := self.learner.collect_experiences(0.0):
                for _, batch in pairs:
                    batch_id = (batch.worker_id, batch.incarnation, batch.sequence)
                    self.buffer.append((batch_id, batch["number"]))
                self.learner.acknowledge(pairs)
            self.learner._collector._discovery.make_due()
        self.learner.acknowledge(self.learner.marks())
        for worker in sorted(self.workers):
            self.remove_worker(worker).client.close()
        self.learner_steps()
        self.check_experiences()
        self.check_ledger()

    def check_experiences(self) -> None:
        batch_ids = [batch_id for batch_id, _ in self.buffer]
        assert len(set(batch_ids)) == len(batch_ids), "a batch was inserted twice"
        assert dict(self.buffer).items() <= self.produced.items(), "a batch was inserted and never produced"
        for incarnation in {batch_id[:2] for batch_id in batch_ids}:
            sequences = [sequence for *of, sequence in batch_ids if tuple(of) == incarnation]
            assert sequences == sorted(sequences), "batches were inserted out of order"
        missing = self.produced.keys() - set(batch_ids)
        assert missing <= self.may_be_lost, (
            f"batches were lost without a reason: {sorted(missing - self.may_be_lost)}"
        )
        counts = self.learner.get_queue_info()["counts"]
        for count in counts.values():
            assert count.waiting == count.in_hand == 0
        if self.remembered:
            vanished = sum(count.lost.get("vanished", 0) for count in counts.values())
            delivered = sum(count.delivered for count in counts.values())
            assert delivered + vanished == len(self.produced), counts

    def check_ledger(self) -> None:
        outcomes = [
            (command.outcomes() | self.ended_before.get(number, {}), number, targets)
            for command, number, targets in self.commands
        ]
        assert self.server.client.hlen(self.learner._keys.pending) == 0, "a command has no final outcome"
        for found, _, targets in outcomes:
            assert sorted(found) == targets
            if self.remembered:
                assert all(_final(outcome) for outcome in found.values()), found
        for incarnation in self.workers.values():
            assert len(set(incarnation.obeyed)) == len(incarnation.obeyed), "a command was obeyed twice"
        if self.remembered:
            accounts = self.learner._ledger.read_outcomes(range(2))
            for worker, account in accounts.items():
                known = account.applied_total + sum(account.missed.values())
                assert known == self.owed[worker], f"{account}, owed {self.owed[worker]}"


def _final(outcome: Outcome) -> bool:
    return outcome.state != "waiting"


@pytest.mark.timeout(1800)
def test_any_order_of_events_keeps_the_promises(
    server: Server, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    monkeypatch.setattr(BackgroundThread, "start", lambda self: None)
    monkeypatch.setattr(BackgroundThread, "pause", lambda self, seconds: None)
    monkeypatch.setattr(Connection, "block_seconds", 0.002)
    monkeypatch.setattr(control_reader, "READ_SECONDS", 0.002)
    monkeypatch.setattr(maintenance, "HEARTBEAT_SECONDS", 0.0)  # each step of the learner sends one
    # A server ends a blocking command at its next tick.
    if isinstance(server, RealServer):
        hertz = server.client.config_get("hz")["hz"]
        request.addfinalizer(partial(server.client.config_set, "hz", hertz))
        server.client.config_set("hz", 500)
    elif isinstance(server, ClusterServer | TrioServer):
        for node in server.engine.nodes:
            request.addfinalizer(partial(node.ask, "CONFIG", "SET", "hz", 10))
            node.ask("CONFIG", "SET", "hz", 500)
    # pytest keeps what is logged, with its errors, their frames and all clients that these refer to.
    monkeypatch.setattr(logging.getLogger("rlbroker"), "disabled", True)
    full = request.config.getoption("--full")

    def machine() -> Run:
        run = Run()
        run.server = server
        return run

    run_state_machine_as_test(
        machine,  # type: ignore[arg-type] # any callable that returns a machine is accepted
        settings=settings(
            max_examples=1000 if full else 40,
            derandomize=not full,  # only the long run searches for new orders
            stateful_step_count=30,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
