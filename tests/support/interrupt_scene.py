"""A learner and a worker in one process, with a record of all that was sent, published and commanded."""

from __future__ import annotations

import gc
import queue
import sys
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any

import numpy as np
from conftest import Server, wait_until

from rlbroker import Command, PublishReceipt, RoundIncomplete, WorkerClient, WorkerCommunicator
from rlbroker.backend.keys import Keys
from rlbroker.types import Batch

#: Longer than anything that a scene waits for: clients have a timeout of 3 s.
HANG_SECONDS = 12.0

#: A client opens connections when it needs them: no more than this many after its first calls.
NEW_CONNECTIONS = 4


class Caller:
    """A thread that does calls, so that one that hangs can be left behind."""

    def __init__(self) -> None:
        self._calls: queue.SimpleQueue[Callable[[], Any] | None] = queue.SimpleQueue()
        self._results: queue.SimpleQueue[BaseException | None] = queue.SimpleQueue()
        self.thread = threading.Thread(target=self._work, daemon=True)
        self.thread.start()

    def do(self, call: Callable[[], Any]) -> None:
        """Call in this thread, and raise what the call raises; fail if it does not end."""
        self._calls.put(call)
        try:
            error = self._results.get(timeout=HANG_SECONDS)
        except queue.Empty:
            stack = traceback.extract_stack(sys._current_frames()[self.thread.ident or 0])
            places = [f"{line.filename.rpartition('/')[2]}:{line.lineno} {line.name}" for line in stack[-6:]]
            raise AssertionError("hangs at " + " > ".join(places)) from None
        if error is not None:
            raise error

    def end(self) -> None:
        self._calls.put(None)

    def _work(self) -> None:
        while call := self._calls.get():
            try:
                call()
            except BaseException as error:  # noqa: BLE001 - raised in the other thread
                self._results.put(error)
            else:
                self._results.put(None)
            del call


def batch_of(number: int) -> dict[str, Any]:
    """Return the batch of a number."""
    data = np.random.default_rng(number).standard_normal((4, 20))
    return {"number": np.array([number]), "data": data, "deep": {"text": "x", "list": [data[0], 1.5, None]}}


def weights_of(number: int) -> dict[str, Any]:
    """Return the weights of a number: mostly those of the number before, so that deltas are worthwhile."""
    first = np.random.default_rng(number).standard_normal(200).astype(np.float32)
    return {"number": np.array([number]), "first": first, "second": np.full(5_000, number // 3, np.float32)}


def same_bits(one: Any, other: Any) -> bool:
    """Return whether two trees of dictionaries, lists, arrays and plain values are equal to the bit."""
    if isinstance(one, dict):
        return list(one) == list(other) and all(same_bits(one[key], other[key]) for key in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(same_bits, one, other))
    if isinstance(one, np.ndarray):
        return (one.dtype, one.shape, one.tobytes()) == (other.dtype, other.shape, other.tobytes())
    return type(one) is type(other) and bool(one == other)


class Scene:
    """A learner, a worker, and what must be true of them. All numbers are used once, for batches and weights.

    Attributes:
        sent: by number of each batch that may be in the run, whether the worker has a receipt for it.
        got: how often each batch was collected.
        held: pairs that were collected and are not acknowledged, with `acknowledge="manual"`.
        model: a dictionary that the worker loads weights into.
        versions: the numbers of published weights, by version.
        obeyed: how often the handler of each command has returned.
    """

    def __init__(
        self, server: Server, run: str, learner: dict[str, Any], worker: dict[str, Any], exact: bool
    ) -> None:
        self.server, self.run, self._exact = server, run, exact
        self._learner, self._worker = learner, worker
        self.first, self.second = Caller(), Caller()
        self._numbers = iter(range(1, 1_000_000))
        self.sent: dict[int, bool] = {}
        self.got: Counter[int] = Counter()
        self._damaged = self._connections = 0
        self._threads = set[threading.Thread]()
        self.held: list[tuple[int, Batch]] = []
        self.manual = learner.get("acknowledge") == "manual"
        self.model: Any = {}
        self.versions: dict[int, int] = {}
        self.applied = 0
        self.obeyed: Counter[int] = Counter()
        self.comm = self.open_learner()
        self.client = self.join()

    # Opening and closing

    def open_learner(self) -> WorkerCommunicator:
        settings = {"run": self.run, "timeout": 3.0, **self.server.connection_settings(), **self._learner}
        return WorkerCommunicator(1, **settings)

    def join(self) -> WorkerClient:
        settings = {"run": self.run, "timeout": 3.0, **self.server.connection_settings(), **self._worker}
        client = WorkerClient(**settings)
        client.on_command("count", lambda number: self.obeyed.update([number]))
        return client

    def close(self) -> None:
        """Close all clients."""
        self.client.close()
        if self._damaged:
            self._other.close()
        self.comm.cleanup()

    def end(self) -> None:
        """End the threads of the callers."""
        self.first.end()
        self.second.end()

    def rejoin(self) -> None:
        """Close the worker, and join again."""
        self.client.close()
        self.client = self.join()
        self.applied = 0

    def reopen(self) -> None:
        """Continue with a new learner and a new worker, after the end of the run."""
        self.comm.cleanup()
        self.comm = self.open_learner()
        self.rejoin()

    def abandon(self) -> None:
        """Close what can be closed of a scene in which something failed."""
        for end in (self.client.close, partial(self.comm.cleanup, stop_workers=False)):
            with suppress(BaseException):
                self.second.do(end)
        self.end()

    def count_connections(self) -> int:
        """Return the number of connections of the server; 0 for a fake."""
        return len(self.server.client.client_list()) if self.server.kind == "real" else 0

    def note_what_is_open(self) -> None:
        """Note the threads and connections that may stay when a client is closed."""
        self._threads = set(threading.enumerate())
        self._connections = self._connections or self.count_connections()

    def expect_nothing_else_open(self) -> None:
        """Check that no threads and no connections of closed clients are left. The open client may have new ones."""
        gc.collect()
        end = time.monotonic() + 3.0
        while True:
            left = [one.name for one in set(threading.enumerate()) - self._threads]
            more = self.count_connections() - self._connections
            if not left and more <= NEW_CONNECTIONS:
                return
            assert time.monotonic() < end, f"threads {left} and {more} connections are left"
            time.sleep(0.01)

    # Experiences

    def send(self, times: int = 1, **settings: Any) -> None:
        """Send batches, and note which of them have a receipt."""
        for _ in range(times):
            number = self.next_number()
            self.sent[number] = False
            receipt = self.client.send_experiences(batch_of(number), **settings)
            self.sent[number] = bool(receipt)

    def collect(self, **settings: Any) -> int:
        """Collect, and note what came, before rlbroker is called again and interrupted."""
        return self._note(self.comm.collect_experiences(**settings))

    def collect_round(self, **settings: Any) -> None:
        """Gather a round, and note what came; one that is incomplete leaves its batches to later calls."""
        with suppress(RoundIncomplete):
            self._note(
                self.comm.collect_round(workers=[self.client.worker_id], **{"timeout": 0.2, **settings})
            )

    def _note(self, pairs: list[tuple[int, Batch]]) -> int:
        self.got.update(int(batch["number"][0]) for _, batch in pairs)
        if self.manual:
            self.held += pairs
        for worker_id, batch in pairs:
            number = int(batch["number"][0])
            assert worker_id == self.client.worker_id
            assert same_bits(dict(batch), batch_of(number)), f"batch {number} has other values"
        return len(pairs)

    def acknowledge(self) -> None:
        """Acknowledge all that is held."""
        self.comm.acknowledge(self.held)
        self.held = []

    def damage(self, times: int) -> None:
        """Put batches that do not decode into the queue of another worker."""
        if not self._damaged:
            self._other = WorkerClient(run=self.run, worker_id=1, **self.server.connection_settings())
        for _ in range(times):
            self._damaged += 1
            fields: Any = {
                "version": 0,
                "rows": 1,
                "raw_bytes": 1,
                "stored_bytes": 7,
                "sent_at": 0,
                "data": b"damaged",
            }
            entry_id = f"{self._other.incarnation}-{self._damaged}"
            self.server.client.xadd(Keys(self.run).experiences(1), fields, id=entry_id)

    def missing(self) -> set[int]:
        """Return the numbers of confirmed batches that were not collected."""
        return {number for number, confirmed in self.sent.items() if confirmed and not self.got[number]}

    def collect_all(self) -> None:
        """Collect every batch that was confirmed."""
        end = time.monotonic() + 3.0
        while self._exact and self.missing():
            self.collect(timeout=0.5)
            assert time.monotonic() < end, f"batches {sorted(self.missing())} are lost"
        self.collect()
        twice = sorted(number for number, times in self.got.items() if times > 1)
        assert not twice, f"batches {twice} came twice"
        assert set(self.got) <= set(self.sent)

    def expect_exact_counts(self) -> None:
        """Check that what was collected is delivered, and nothing is in anyone's hands."""
        if self.manual:
            self.acknowledge()
        self.collect()  # acknowledges those before
        self.collect()
        if self.manual:
            self.acknowledge()
        counts = self.comm.get_queue_info()["counts"][self.client.worker_id]
        got = sum(self.got.values())
        assert (counts.waiting, counts.in_hand, counts.delivered) == (0, 0, got), f"{got} were got: {counts}"
        lost, confirmed = sum(counts.lost.values()), sum(self.sent.values())
        assert confirmed <= got + lost <= len(self.sent), (
            f"{confirmed} were confirmed, {got} were got: {counts}"
        )
        assert "trimmed" not in counts.lost, f"none was deleted: {counts}"
        if self._exact:
            assert not counts.lost, f"none was lost: {counts}"

    # Weights

    def publish(self, **settings: Any) -> PublishReceipt:
        """Publish the next weights, and note their version once it is known."""
        number = self.next_number()
        before = max(self.versions, default=0)
        receipt = self.comm.send_model_weights(weights_of(number), **settings)
        assert receipt.version > before, f"version {receipt.version} after {before}"
        self.versions[receipt.version] = number
        return receipt

    def poll(self) -> None:
        self.client.poll(self.model)
        self.expect_whole_weights()

    def load(self) -> None:
        self.client.load_weights(self.model, timeout=5.0)
        self.expect_whole_weights()

    def expect_whole_weights(self) -> None:
        """Check that the model has one version's weights, and not older ones than before."""
        version = self.client.version
        assert version >= self.applied, f"the worker runs {version} after {self.applied}"
        self.applied = version
        if not self.model:
            assert not version, f"version {version} is applied, and the model is empty"
            return
        number = int(self.model["number"][0])
        assert same_bits(self.model, weights_of(number)), "the model has weights of two versions"
        known = self.versions.get(version, number)
        assert number == known, f"version {version} is applied, but not loaded"

    def wait_for_weights(self) -> None:
        """Publish, and wait until the worker has the version ready for its next poll."""
        self.publish()
        subscriber = self.client._subscriber
        wait_until(
            "the weights are ready",
            lambda: subscriber.ready and subscriber.newest_seen[0] == self.comm.version,
        )

    # Commands

    def command(self, name: str, data: Any = None) -> Command:
        """Send a command, and wait until the worker has it ready for its next poll."""
        command = self.comm.send_control_command(name, data, [self.client.worker_id])
        wait_until("the command is ready", lambda: self.client._inbox.waiting)
        return command

    def next_number(self) -> int:
        return next(self._numbers)

    # Everything

    def check(self) -> None:
        """Check in another thread that both clients work, and that all that was promised is true."""
        self.collect_all()
        self.send()
        self.collect_all()
        self.expect_exact_counts()
        self.expect_whole_weights()
        receipt = self.publish()
        self.load()
        assert self.client.version == receipt.version
        number = self.next_number()
        command = self.comm.send_control_command("count", number, [self.client.worker_id])
        end = time.monotonic() + 5.0
        while command.outcomes()[self.client.worker_id].state == "waiting":
            self.client.poll(self.model)
            assert time.monotonic() < end, "the command is not obeyed"
        outcome = command.wait(timeout=5.0)[self.client.worker_id]
        assert outcome.state == "done", f"the command is {outcome}"
        assert self.obeyed[number] == 1, "a done command was not obeyed"
        twice = sorted(number for number, times in self.obeyed.items() if times > 1)
        assert not twice, f"commands {twice} were obeyed twice"
        pending = self.comm.get_queue_info()["control_queue_sizes"][self.client.worker_id]
        assert not pending, f"{pending} commands are left without an outcome"
        missed = self.comm.missed_updates()[self.client.worker_id]
        assert missed.behind == 0, f"versions without an outcome: {missed}"
