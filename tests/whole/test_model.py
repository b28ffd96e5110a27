"""A model of one run: any order of sends, crashes, twins, lost replies and lost servers keeps the promises.

The clients are real, and their background threads sleep: the machine takes their steps itself, one at a time, so
that Hypothesis can find, repeat and shorten what goes wrong. What should be true is kept beside them in plain
dictionaries and sets.
"""

from __future__ import annotations

import contextlib
import itertools
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pytest
from conftest import ClusterServer, RealServer, Server, TrioServer
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
from rlbroker.backend.deadline import Deadline
from rlbroker.backend.threads import BackgroundThread
from rlbroker.config import Level
from rlbroker.control import inbox
from rlbroker.types import Outcome

RUNS = (f"model-{number}" for number in itertools.count(1))

workers = st.integers(0, 1)
levels: st.SearchStrategy[Level] = st.sampled_from(["redis", "learner"])

#: Worker, incarnation and sequence of a batch.
Place = tuple[int, int, int]


class Line(Lossy):
    """One client's way to the server, on which a chosen reply is lost."""

    def __init__(self, server: Server) -> None:
        self._left = 0
        super().__init__(server.another_client(), self._is_due)

    def lose(self, number: int) -> None:
        """Lose this reply from now on, 1 for the next; 0 for none."""
        self._left = number

    def _is_due(self) -> bool:
        self._left -= 1
        return self._left == 0


@dataclass
class Incarnation:
    """One life of a worker.

    Attributes:
        sent: its batches.
        model: what it loads weights into.
        obeyed: numbers of the commands that it did.
        behind: whether it has not noticed yet that the server lost everything.
    """

    client: WorkerClient
    line: Line
    level: Level
    sent: list[Place] = field(default_factory=list)
    model: dict[str, Any] = field(default_factory=dict)
    obeyed: list[int] = field(default_factory=list)
    behind: bool = False


class Run(RuleBasedStateMachine):
    """One run, and what should be true of it."""

    server: Server

    @initialize()
    def begin(self) -> None:
        self.name = next(RUNS)
        self.numbers = itertools.count(1)
        self.lives: dict[int, Incarnation] = {}
        self.replaced: list[Incarnation] = []
        self.former: list[WorkerCommunicator] = []
        #: The learner's buffer, and what its last checkpoint holds of it, with the marks.
        self.buffer: list[tuple[Place, int]] = []
        self.saved: tuple[list[tuple[Place, int]], Any] = ([], None)
        self.produced: dict[Place, int] = {}
        self.may_be_lost: set[Place] = set()
        self.weights: dict[int, int] = {}
        self.version = 0
        #: By worker: versions that it has to apply or to miss.
        self.owed: Counter[int] = Counter()
        self.commands: list[tuple[Any, int, list[int]]] = []
        #: By number of a command: outcomes that a learner saw before it crashed; no later one has to know them.
        self.ended_before: dict[int, dict[int, Outcome]] = {}
        self.learner_behind = False
        #: False once all have forgotten who knew: then sums cannot be right, and old lives are not recognised.
        self.remembered = True
        self.losses = 0
        self.learner = self.new_learner()
        self.worker_starts(0, "learner")
        self.worker_starts(1, "redis")

    # Learner

    def new_learner(self) -> WorkerCommunicator:
        self.learner_line = Line(self.server)
        return WorkerCommunicator(
            2,
            run=self.name,
            redis_client=self.learner_line.client,
            acknowledge="manual",
            take_over_seconds=3600.0,
            timeout=5.0,
        )

    def learner_steps(self) -> None:
        """What the learner's background thread does, until it has done all."""
        for _ in range(4):
            self.learner._next_sign_of_life = Deadline(0)
            self.again(self.learner._run_once)
        self.learner_behind = False
        self.see_version()

    def see_version(self) -> None:
        """Versions up to the latest are owed by whoever is a member."""
        for worker in self.lives:
            self.owed[worker] += self.learner.version - self.version
        # One that was not published by us is the latest again, which the server had lost.
        self.weights.setdefault(self.learner.version, self.weights.get(self.version, 0))
        self.version = self.learner.version

    @rule(lose=st.booleans())
    def publish(self, lose: bool) -> None:
        self.learner_steps()
        self.learner_line.lose(int(lose))
        number = next(self.numbers)
        version = self.learner.send_model_weights({"number": number}).version
        assert version > self.version or not self.remembered, "a number of a version was used twice"
        self.weights[version] = number
        self.see_version()

    @rule()
    def send_command(self) -> None:
        self.learner_steps()
        number = next(self.numbers)
        command = self.learner.send_control_command("note", number)
        known = {worker for worker, life in self.lives.items() if not life.behind or self.remembered}
        assert known <= set(command.worker_ids) <= self.lives.keys()
        self.commands.append((command, number, sorted(command.worker_ids)))

    @rule(lose=st.booleans(), count=st.integers(1, 5))
    def collect(self, lose: bool, count: int) -> None:
        self.learner_line.lose(int(lose))
        with contextlib.suppress(ConnectionFailed):  # then the next call gives them
            for _, batch in self.learner.collect_experiences(max_batches=count):
                self.buffer.append(((batch.worker_id, batch.incarnation, batch.sequence), batch["number"]))

    @rule()
    def save_checkpoint(self) -> None:
        self.saved = list(self.buffer), self.learner.marks()

    @precondition(lambda self: self.saved[1])
    @rule(lose=st.booleans())
    def acknowledge_checkpoint(self, lose: bool) -> None:
        self.learner_line.lose(int(lose))
        self.learner.acknowledge(self.saved[1])

    @rule()
    def learner_looks_after_run(self) -> None:
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
        if self.learner.version < self.version:  # nobody held the weights that the server had lost
            self.remembered = False
            self.version = self.learner.version
        self.learner_steps()

    @precondition(lambda self: self.former and not self.learner_behind)
    @rule()
    def former_learner_wakes(self) -> None:
        with pytest.raises(Fenced):
            self.former[-1].send_model_weights({"number": -1})
        self.former[-1]._next_sign_of_life = Deadline(0)
        with pytest.raises(Fenced):
            self.again(self.former[-1]._run_once)

    # Workers

    @rule(worker=workers, level=levels)
    def worker_starts(self, worker: int, level: Level) -> None:
        """Also where one is there: that was a crash, or it is a twin."""
        if worker in self.lives:
            self.replaced.append(self.ended(worker))
        line = Line(self.server)
        client = WorkerClient(
            worker_id=worker, run=self.name, redis_client=line.client, level=level, timeout=5.0
        )
        life = Incarnation(client, line, level)
        client.on_command("note", life.obeyed.append)
        self.lives[worker] = life
        if not self.learner_behind:
            self.learner_steps()  # whom the learner has not seen yet, it cannot remember

    def ended(self, worker: int) -> Incarnation:
        life = self.lives.pop(worker)
        if life.behind:
            self.may_be_lost.update(life.sent)
            self.remembered = False
        return life

    @precondition(lambda self: self.lives)
    @rule(data=st.data(), lose=st.integers(0, 3))
    def worker_sends(self, data: st.DataObject, lose: int) -> None:
        life = self.some_life(data)
        if life.client._heartbeat._settings is None:  # it came when the run was lost
            self.learner_steps()
            self.worker_steps(life)
        life.line.lose(lose)
        number = next(self.numbers)
        try:
            receipt = life.client.send_experiences({"number": number})
        except Unconfirmed as error:
            receipt = error.receipt
        life.behind = False
        place = (receipt.worker_id, receipt.incarnation, receipt.sequence)
        assert place not in self.produced, "a place was given twice"
        self.produced[place] = number
        life.sent.append(place)

    @precondition(lambda self: self.lives)
    @rule(data=st.data(), lose=st.booleans())
    def worker_polls(self, data: st.DataObject, lose: bool) -> None:
        life = self.some_life(data)
        before = life.client.version
        self.again(life.client._subscriber._look)
        self.again(life.client._inbox._step)
        life.line.lose(int(lose))
        if life.client.poll(life.model):
            assert life.client.version > before
        if life.client.version and self.remembered:
            assert life.model["number"] == self.weights[life.client.version]

    @precondition(lambda self: self.lives)
    @rule(data=st.data(), lose=st.booleans())
    def worker_beats(self, data: st.DataObject, lose: bool) -> None:
        life = self.some_life(data)
        life.line.lose(int(lose))
        self.worker_steps(life)

    @precondition(lambda self: self.lives)
    @rule(data=st.data())
    def worker_leaves(self, data: st.DataObject) -> None:
        worker = data.draw(st.sampled_from(sorted(self.lives)))
        self.worker_steps(self.lives[worker])
        self.ended(worker).client.close()
        self.learner_steps()  # which sees it; otherwise it would take it for a member after a loss

    @precondition(lambda self: self.lives and not self.learner_behind)
    @rule(data=st.data())
    def worker_is_struck(self, data: st.DataObject) -> None:
        """It was silent for too long; what it does then is refused."""
        worker = data.draw(st.sampled_from(sorted(self.lives)))
        if self.lives[worker].behind:
            self.worker_steps(self.lives[worker])
        self.server.client.hset(self.learner._keys.life(worker), "seen", 0)
        self.server.client.hset(self.learner._keys.meta, "back_at", 0)
        self.learner._housekeeping()
        with pytest.raises(Fenced):
            self.again(self.lives[worker].client._heartbeat._step)
        self.ended(worker)
        self.learner_steps()

    @precondition(lambda self: self.replaced and self.remembered and not self.learner_behind)
    @rule()
    def replaced_worker_wakes(self) -> None:
        life = self.replaced.pop()
        assert life.client._sender is not None
        life.client._sender.mark_stale()
        if life.client._heartbeat._settings is not None:  # until it has them, it waits with sending
            with pytest.raises(Fenced):
                life.client.send_experiences({"number": -1})
        with pytest.raises(Fenced):
            self.again(life.client._heartbeat._step)

    def worker_steps(self, life: Incarnation) -> None:
        """What a worker's background threads do, until it is known again."""
        for step in (life.client._heartbeat._step, life.client._heartbeat._step, life.client._inbox._step):
            self.again(step)
        life.behind = False

    def again(self, step: Callable[[], None]) -> None:
        """As background threads do: what a fault of the network ends is tried again."""
        thread = BackgroundThread("once", lambda: None)

        def once() -> None:
            step()
            thread.request_stop()

        thread._step = once
        thread._work()
        thread.check()

    def some_life(self, data: st.DataObject) -> Incarnation:
        return self.lives[data.draw(st.sampled_from(sorted(self.lives)))]

    # The server

    @precondition(lambda self: self.losses < 2)  # more of them only hide what else goes on
    @rule(breaks=st.booleans())
    def server_loses_everything(self, breaks: bool) -> None:
        """It was restarted, and connections broke; or it was flushed, and nobody noticed yet."""
        self.losses += 1
        seen = self.learner._roster._lives.of
        for worker, one in self.lives.items():  # one that joined after another loss is nobody's memory yet
            self.remembered &= worker in seen and seen[worker].incarnation == one.client.incarnation
        self.server.client.flushall()
        saved = {place for place, _ in self.saved[0]}
        for place in self.produced:
            life = self.lives.get(place[0])
            kept = life is not None and life.level == "learner" and place in life.sent
            if not kept and place not in saved:
                self.may_be_lost.add(place)
                self.remembered &= (
                    life is not None and place in life.sent
                )  # the dead cannot say how many they sent
        for life in (*self.lives.values(), *self.replaced):
            life.behind = True
            if breaks:
                life.line.break_connections()
        self.learner_behind = True
        if breaks:
            self.learner_line.break_connections()

    # The end

    def teardown(self) -> None:
        if not hasattr(self, "learner"):
            return
        try:
            self.finish()
        finally:
            for one in (self.learner, *self.former):
                one._connection.servers.close()
                one._publisher._uploader.close()
            for life in (*self.lives.values(), *self.replaced):
                life.client._connection.servers.close()
                life.client._subscriber._fetcher.close()

    def finish(self) -> None:
        """All come to their end, and then the sums are right."""
        self.learner_steps()
        for worker in sorted(self.lives):
            life = self.lives[worker]
            self.worker_steps(life)
            life.client.poll()
            self.again(life.client._inbox._step)
        for _ in range(3):
            while pairs := self.learner.collect_experiences(0.0):
                for _, batch in pairs:
                    place = (batch.worker_id, batch.incarnation, batch.sequence)
                    self.buffer.append((place, batch["number"]))
                self.learner.acknowledge(pairs)
            self.learner._collector._discovery.make_due()
        self.learner.acknowledge(self.learner.marks())
        for worker in sorted(self.lives):
            self.ended(worker).client.close()
        self.learner_steps()
        self.check_experiences()
        self.check_ledger()

    def check_experiences(self) -> None:
        places = [place for place, _ in self.buffer]
        assert len(set(places)) == len(places), "inserted twice"
        assert dict(self.buffer).items() <= self.produced.items(), "inserted and never produced"
        for life in {place[:2] for place in places}:
            sequences = [sequence for *of, sequence in places if tuple(of) == life]
            assert sequences == sorted(sequences), "out of order"
        missing = self.produced.keys() - set(places)
        assert missing <= self.may_be_lost, f"lost without a reason: {sorted(missing - self.may_be_lost)}"
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
        assert self.server.client.hlen(self.learner._keys.pending) == 0, "a command without an end"
        for found, _, targets in outcomes:
            assert sorted(found) == targets
            if self.remembered:
                assert all(_final(outcome) for outcome in found.values()), found
        for life in self.lives.values():
            assert len(set(life.obeyed)) == len(life.obeyed), "a command was done twice"
        if self.remembered:
            accounts = self.learner._ledger.accounts(range(2))
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
    monkeypatch.setattr(inbox, "READ_SECONDS", 0.002)
    # Servers end blocking commands at their ticks.
    if isinstance(server, RealServer):
        hertz = server.client.config_get("hz")["hz"]
        request.addfinalizer(partial(server.client.config_set, "hz", hertz))
        server.client.config_set("hz", 500)
    elif isinstance(server, ClusterServer | TrioServer):
        for node in server.engine.nodes:
            request.addfinalizer(partial(node.ask, "CONFIG", "SET", "hz", 10))
            node.ask("CONFIG", "SET", "hz", 500)
    full = request.config.getoption("--full")

    def machine() -> Run:
        run = Run()
        run.server = server
        return run

    run_state_machine_as_test(
        machine,  # type: ignore[arg-type] # any callable that gives a machine will do
        settings=settings(
            max_examples=1000 if full else 40,
            derandomize=not full,  # the long run looks for new ones
            stateful_step_count=30,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
