"""An interrupt at any point of a call loses no batch, gives none twice, and leaves the next call working."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import count
from typing import Any

import numpy as np
import pytest
from conftest import RealServer
from interrupts import Alarm, Interrupt, Points, interrupt_at

from rlbroker import Batch, SamplesPerInsert, WorkerClient, WorkerCommunicator
from rlbroker.experience.rate_limiter import RateLimiter

#: Without --full, one in so many lines is interrupted in the longest calls; a prime number.
LINE_STRIDE = 19

#: How often at most to look for what an interrupted call left.
TRIES = 20

pytestmark = [
    # A generator that is closed cannot raise: there, the error of an interrupt is only reported.
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.parametrize("points", ["function", "line"]),
    pytest.mark.parametrize("error", [KeyboardInterrupt, Alarm]),
]


@pytest.fixture
def run_settings(real_server: RealServer, run: str) -> dict[str, Any]:
    return {"redis_url": real_server.url, "run": run, "timeout": 5.0}


@pytest.fixture
def client(run_settings: dict[str, Any]) -> Iterator[WorkerClient]:
    with WorkerClient(worker_id=0, **run_settings) as made:
        yield made


def in_another_thread(call: Callable[[], Any]) -> Any:
    """Return the result of a call in another thread, which gets no lock that this thread has left behind."""
    with ThreadPoolExecutor(1) as threads:
        return threads.submit(call).result(10.0)


@pytest.fixture
def stride(points: Points, full: bool) -> int:
    """One in so many points is interrupted."""
    return 1 if full or points == "function" else LINE_STRIDE


def each_point(
    points: Points, error: type[BaseException], call: Callable[[Interrupt], None], stride: int = 1
) -> Iterator[tuple[int, str]]:
    """Interrupt the call at its points in turn; yield the point and its place after each call."""
    for point in count(1, stride):
        with interrupt_at(point, points, error) as interrupt:
            call(interrupt)
        yield point, interrupt.place
        if not interrupt.place:
            return


class Receiver:
    """Collects what a worker sends, and checks that each batch comes once and in order."""

    def __init__(self, comm: WorkerCommunicator) -> None:
        self.comm, self.numbers = comm, list[int]()

    def take(self, pairs: list[tuple[int, Batch]]) -> None:
        self.numbers += [batch["number"] for _, batch in pairs]

    def collect_up_to(self, last: int, place: str) -> None:
        """Collect until a number has come, the first time in another thread."""
        for tries in range(TRIES):
            if self.numbers and self.numbers[-1] >= last:
                break
            if tries:
                self.take(self.comm.collect_experiences(timeout=1.0))
            else:
                self.take(in_another_thread(lambda: self.comm.collect_experiences(timeout=1.0)))
        assert self.numbers == list(range(last + 1)), f"{place}: {self.numbers[-10:]} of {last}"

    def check_counts(self, sent: int) -> None:
        """Check the server's counts and the learner's own ones after everything was collected."""
        self.comm.collect_experiences()
        if self.comm._pending.count_by_worker()[0]:
            self.comm.acknowledge(self.comm.marks())
        counts = self.comm.get_queue_info()["counts"][0]
        assert (counts.delivered, counts.produced) == (sent, sent), counts
        assert (counts.waiting, counts.in_hand, counts.lost, counts.duplicates) == (0, 0, {}, 0)
        assert self.comm._pending.count_by_worker() == {0: 0}
        marks = self.comm.marks()
        assert marks["inserts"] == sent
        assert marks["batches"]["0"]["except"] == []


@pytest.mark.parametrize("acknowledge", ["next", "manual"])
@pytest.mark.parametrize(("timeout", "max_batches"), [(0.0, None), (0.5, 2)])
def test_an_interrupted_collect_gives_its_batches_to_the_next_one(
    points: Points,
    error: type[BaseException],
    client: WorkerClient,
    run_settings: dict[str, Any],
    acknowledge: Any,
    timeout: float,
    max_batches: int | None,
    stride: int,
) -> None:
    with WorkerCommunicator(1, acknowledge=acknowledge, **run_settings) as comm:
        receiver, sent = Receiver(comm), 0

        def collect(_: Interrupt) -> None:
            receiver.take(comm.collect_experiences(timeout=timeout, max_batches=max_batches))

        def send() -> None:
            nonlocal sent
            for _ in range(3):
                client.send_experiences({"number": sent})
                sent += 1

        send()
        for point, place in each_point(points, error, collect, stride):
            receiver.collect_up_to(sent - 1, place)
            if point % 20 < stride and acknowledge == "manual":
                comm.acknowledge(comm.marks())
            send()
        receiver.collect_up_to(sent - 1, "the end")
        receiver.check_counts(sent)


def test_an_interrupted_acknowledgement_is_counted_once(
    points: Points, error: type[BaseException], client: WorkerClient, run_settings: dict[str, Any]
) -> None:
    with WorkerCommunicator(1, acknowledge="manual", **run_settings) as comm:
        receiver, sent = Receiver(comm), 0
        for point in count(1):
            client.send_experiences({"number": sent})
            sent += 1
            pairs = comm.collect_experiences(timeout=5.0)
            receiver.take(pairs)
            assert len(pairs) == 1
            with interrupt_at(point, points, error) as interrupt:
                comm.acknowledge(pairs)
            in_another_thread(partial(comm.acknowledge, pairs))
            if not interrupt.place:
                break
        receiver.check_counts(sent)


def test_interrupted_marks_cover_what_was_returned(
    points: Points, error: type[BaseException], client: WorkerClient, run_settings: dict[str, Any]
) -> None:
    with WorkerCommunicator(1, acknowledge="manual", **run_settings) as comm:
        for number in range(5):
            client.send_experiences({"number": number})
        assert len(comm.collect_experiences(timeout=5.0, max_batches=3)) == 3
        whole = comm.marks()

        def mark(_: Interrupt) -> None:
            comm.marks()

        for _, place in each_point(points, error, mark):
            assert in_another_thread(comm.marks) == whole, place


@pytest.mark.parametrize("level", ["redis", "learner"])
def test_an_interrupted_send_gives_its_batch_one_number_or_none(
    points: Points, error: type[BaseException], run_settings: dict[str, Any], level: Any, stride: int
) -> None:
    """Also with arrays, whose memory the caller changes after the interrupt."""
    with (
        WorkerCommunicator(1, max_queue_size=20, **run_settings) as comm,
        WorkerClient(worker_id=0, level=level, compression=False, **run_settings) as client,
    ):
        batches: list[Batch] = []
        confirmed: list[int] = []  # the sequence of each receipt
        tried = 0
        array = np.zeros(20_000, np.int64)

        def send(_: Interrupt) -> None:
            confirmed.append(client.send_experiences({"number": tried, "array": array}).sequence)

        for tried in count():
            array[:] = tried
            with interrupt_at(1 + tried * stride, points, error) as interrupt:
                send(interrupt)
            array[:] = -1
            if not tried % 2:
                in_another_thread(partial(client.flush, 0))
            batches += [batch for _, batch in comm.collect_experiences()]
            if not interrupt.place:
                break
        client.send_experiences({"number": tried + 1, "array": array})
        while not batches or batches[-1]["number"] <= tried:
            batches += [batch for _, batch in comm.collect_experiences(timeout=5.0)]
        numbers = [batch["number"] for batch in batches]
        assert max(Counter(numbers).values()) == 1
        assert numbers == sorted(numbers)
        assert [batch.sequence for batch in batches] == list(range(1, len(batches) + 1))
        assert set(confirmed) <= {batch.sequence for batch in batches}
        assert all((batch["array"] == batch["number"]).all() for batch in batches[:-1])
        comm.collect_experiences()
        counts = comm.get_queue_info()["counts"][0]
        assert (counts.delivered, counts.produced) == (len(batches), len(batches))
        assert client.flush(5.0) == 0
        client._sender.writer.refresh()
        size = client._sender.writer.size
        assert (size.waiting, size.in_hand, size.queued_bytes) == (0, 0, 0)


def test_an_interrupted_flush_stores_the_batch_once(
    points: Points, error: type[BaseException], run_settings: dict[str, Any]
) -> None:
    """Each time, a send was interrupted in the middle, so that there is something to flush."""
    with (
        WorkerCommunicator(1, **run_settings) as comm,
        WorkerClient(worker_id=0, **run_settings) as client,
    ):
        numbers, sent = list[int](), 0

        def flush(_: Interrupt) -> None:
            client.flush(0)

        for _, place in each_point(points, error, flush):
            before = client._sender.sent
            for point in count(30):
                with interrupt_at(point, "function"):
                    client.send_experiences({"number": sent})
                if client._sender.sent > before:
                    break
            sent += 1
            assert in_another_thread(lambda: client.flush(5.0)) == 0, place
            numbers += [batch["number"] for _, batch in comm.collect_experiences()]
        while len(numbers) < sent:
            numbers += [batch["number"] for _, batch in comm.collect_experiences(timeout=5.0)]
        assert numbers == list(range(sent))


def test_an_interrupted_sample_is_not_counted(points: Points, error: type[BaseException]) -> None:
    """Each sample that may be drawn is counted, and no other."""
    limiter, drawn = RateLimiter(SamplesPerInsert(1.0, 1, 1_000.0)), list[bool]()
    limiter.inserts = 1

    def draw(_: Interrupt) -> None:
        drawn.append(limiter.may_sample(1))

    for _, place in each_point(points, error, draw):
        drawn.append(in_another_thread(partial(limiter.may_sample, 1)))
        assert limiter.samples == sum(drawn), place
