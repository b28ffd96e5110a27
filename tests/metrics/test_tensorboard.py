"""Scalars for TensorBoard: `log_to` writes every tag, stops at `cleanup`, and survives errors of the writer."""

from __future__ import annotations

import itertools
import logging
import queue
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from types import FrameType
from typing import Any

import numpy as np
import pytest
from conftest import Server, wait_until
from test_history import a_sample
from test_run_history import history, record, stop_background

from rlbroker import InvalidArgument, WorkerClient, WorkerCommunicator
from rlbroker.backend.keys import Keys
from rlbroker.metrics import tensorboard
from rlbroker.metrics.history import Interval
from rlbroker.metrics.tensorboard import TAGS, ScalarLog, ScalarTarget, compute_scalars

Learner = Callable[..., WorkerCommunicator]
Worker = Callable[..., WorkerClient]


class Writer:
    def __init__(self) -> None:
        self.written: list[tuple[str, float, int]] = []

    def add_scalar(self, tag: str, value: float, step: int) -> None:
        self.written.append((tag, value, step))


def writing_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "rlbroker-scalars"]


@pytest.mark.unit
def test_every_tag_is_documented_and_written() -> None:
    before = a_sample(1.0)
    after = a_sample(2.0, published=1, alive=1, collected=1, staleness={3: 1})
    assert compute_scalars(Interval(before, after)).keys() == TAGS.keys()
    assert compute_scalars(Interval(before, after))["rlbroker/staleness_p95"] == 3.0


def test_scalars_are_written_until_cleanup(learner: Learner, worker: Worker) -> None:
    comm, client = stop_background(learner()), worker(0)
    by_rows, by_step = Writer(), Writer()
    comm.log_to(by_rows, every_seconds=0.1)
    comm.log_to(by_step, step=lambda: 77, every_seconds=0.1)
    record(comm)
    client.send_experiences({"steps": np.zeros(5)})
    assert comm.collect_experiences(timeout=5.0)
    record(comm)
    wait_until("both have written", lambda: by_rows.written and by_step.written)
    comm.cleanup()
    assert not writing_threads()
    found = {tag: (value, step) for tag, value, step in by_rows.written}
    assert found["rlbroker/staleness_mean"] == (0.0, 5)
    assert found["rlbroker/steps_per_second"][0] > 0
    assert {step for _, _, step in by_step.written} == {77}


@pytest.mark.unit
def test_nothing_is_written_after_the_end() -> None:
    writer = Writer()
    target = ScalarTarget(writer, None)
    log = ScalarLog(target, every_seconds=1.0)
    log.offer(a_sample(1.0))
    log.offer(a_sample(2.0))
    wait_until("the first interval is written", lambda: writer.written)
    log.end(5.0)
    before = len(writer.written)
    log.offer(a_sample(3.0))
    assert not writing_threads()
    assert len(writer.written) == before


@pytest.mark.unit
def test_an_interrupted_end_can_be_repeated() -> None:
    """An interrupt may come within the queue, too, which is not rlbroker's code."""
    for point in itertools.count(1):
        target = ScalarTarget(Writer(), None)
        log, count = ScalarLog(target, every_seconds=1.0), 0

        def trace(frame: FrameType, event: str, _: Any, point: int = point) -> Any:
            nonlocal count
            if frame.f_code.co_filename not in (tensorboard.__file__, queue.__file__):
                return None
            count += event == "line"
            if event == "line" and count == point:
                raise KeyboardInterrupt
            return trace

        sys.settrace(trace)
        with suppress(KeyboardInterrupt):
            log.end(5.0)
        sys.settrace(None)
        with ThreadPoolExecutor(1) as threads:
            threads.submit(log.end, 5.0).result(10.0)
        assert not writing_threads()
        if count < point:
            break


def test_a_learner_that_does_not_lead_logs_scalars_and_writes_no_history(
    learner: Learner, server: Server, keys: Keys
) -> None:
    collects = learner(learner_name="other", publishes=False)
    wait_until("it has sent a heartbeat", lambda: server.client.hget(keys.meta, "seen:other"))
    stop_background(collects)
    writer = Writer()
    collects.log_to(writer, every_seconds=0.1)
    for _ in range(2):
        collects._maintenance.record()
    wait_until("it has logged scalars", lambda: writer.written)
    assert history(collects) == []


def test_an_error_of_the_writer_ends_the_writing_and_nothing_else(
    learner: Learner, caplog: pytest.LogCaptureFixture
) -> None:
    class Broken:
        def add_scalar(self, *_: Any) -> None:
            raise OSError("disk full")

    comm = stop_background(learner())
    comm.log_to(Broken(), every_seconds=0.1)
    with caplog.at_level(logging.ERROR, "rlbroker"):
        for _ in range(2):
            record(comm)
        wait_until("the writing has ended", lambda: not writing_threads())
        record(comm)
    assert caplog.text.count("stopped writing scalars to Broken") == 1
    assert comm.send_model_weights({"weights": np.zeros(1)})


def test_an_object_that_cannot_write_scalars_is_refused(learner: Learner) -> None:
    comm = learner()
    with pytest.raises(InvalidArgument, match="add_scalar"):
        comm.log_to(object())  # type: ignore[arg-type]
    with pytest.raises(InvalidArgument, match="step"):
        comm.log_to(Writer(), step=7)  # type: ignore[arg-type]
    with pytest.raises(InvalidArgument, match="every_seconds"):
        comm.log_to(Writer(), every_seconds=0)
