"""A learner or a worker whose calls are interrupted all the time. Prints what it did as JSON.

Both handlers raise, but only while rlbroker runs: the program's own notes stay whole.
"""

from __future__ import annotations

import faulthandler
import json
import random
import signal
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from types import FrameType
from typing import Any

import numpy as np
from interrupts import PACKAGE, Alarm

from rlbroker import QueueFull, WorkerClient, WorkerCommunicator


def _in_rlbroker(frame: FrameType | None) -> bool:
    while frame is not None and not frame.f_code.co_filename.startswith(PACKAGE):
        frame = frame.f_back
    return frame is not None


def interrupt(number: int, frame: FrameType | None) -> None:
    if _in_rlbroker(frame):
        raise KeyboardInterrupt if number == signal.SIGINT else Alarm


def weights_of(number: int) -> dict[str, Any]:
    return {"number": np.array([number]), "first": np.full(500, number), "second": np.full((30, 30), -number)}


class Program:
    """Calls at random until its time is over.

    Attributes:
        done: how often each call ended.
        interrupted: how often each was interrupted.
        errors: tracebacks of all other exceptions.
    """

    def __init__(self, seed: str) -> None:
        self.random = random.Random(seed)
        self.done, self.interrupted = Counter[str](), Counter[str]()
        self.errors: list[str] = []

    def run(self, calls: dict[Callable[[], Any], int], seconds: float) -> None:
        """Do calls, each as often as its weight says, for a time that begins when the program says that it is ready."""
        signal.signal(signal.SIGINT, interrupt)
        signal.signal(signal.SIGALRM, interrupt)
        print("ready", flush=True)
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            (call,) = self.random.choices(list(calls), list(calls.values()))
            try:
                call()
                self.done[call.__name__] += 1
            except (KeyboardInterrupt, Alarm):
                self.interrupted[call.__name__] += 1
            except Exception:  # noqa: BLE001 - the test shows each of them
                self.errors.append(f"{call.__name__}: {traceback.format_exc()}")
                if len(self.errors) > 20:
                    break
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGALRM, signal.SIG_IGN)
        print("calm", flush=True)

    def report(self, **facts: Any) -> None:
        print(
            json.dumps({"done": self.done, "interrupted": self.interrupted, "errors": self.errors, **facts}),
            flush=True,
        )


def learn(run: str, seconds: float) -> None:
    program = Program(f"learner of {run}")
    got: list[int] = []
    published: list[list[int]] = []
    numbers = iter(range(1, 1_000_000))

    with WorkerCommunicator(1, run=run, timeout=5.0) as comm:

        def collect(timeout: float = 0.0, max_batches: int | None = None) -> int:
            pairs = comm.collect_experiences(timeout, max_batches)
            got.extend(int(batch["number"]) for _, batch in pairs)
            return len(pairs)

        def collect_and_wait() -> None:
            collect(0.01)

        def collect_two() -> None:
            collect(0.0, 2)

        def publish() -> None:
            number = next(numbers)
            published.append([number, comm.send_model_weights(weights_of(number)).version])

        def command() -> None:
            comm.send_control_command("count", next(numbers))

        def look() -> None:
            comm.get_queue_info()
            comm.missed_updates()
            comm.workers()

        program.run(
            {collect: 10, collect_and_wait: 10, collect_two: 5, publish: 3, command: 3, look: 2}, seconds
        )
        quiet = 0
        while quiet < 5:  # until the worker has left, and nothing is on its way
            quiet = 0 if collect(0.1) or comm.workers() else quiet + 1
        counts = comm.get_queue_info()["counts"][0]
        program.report(
            got=got,
            published=published,
            delivered=counts.delivered,
            lost=dict(counts.lost),
            left=counts.waiting + counts.in_hand,
            pending=comm.get_queue_info()["control_queue_sizes"],
        )


def work(run: str, seconds: float) -> None:
    program = Program(f"worker of {run}")
    confirmed: list[int] = []
    obeyed: list[int] = []
    loaded: list[list[int]] = []
    numbers = iter(range(1, 1_000_000))
    model: dict[str, Any] = {}

    with WorkerClient(run=run, worker_id=0, timeout=5.0) as worker:
        worker.on_command("count", obeyed.append)

        def send() -> None:
            number = next(numbers)
            with suppress(QueueFull):  # on a busy machine, a stormed learner ends few calls
                if worker.send_experiences({"number": np.array(number), "data": np.zeros(50)}):
                    confirmed.append(number)

        def look_at_weights() -> None:
            if worker.version:
                number = int(model["number"][0])
                expected = weights_of(number)
                assert all(np.array_equal(model[name], expected[name]) for name in expected), "mixed weights"
                loaded.append([number, worker.version])

        def poll() -> None:
            worker.poll(model)
            look_at_weights()  # after two interrupts of one call, they may be whole only after the next

        def flush() -> None:
            worker.flush(0.01)

        program.run({send: 20, poll: 10, flush: 2}, seconds)
        poll()
        assert worker.flush() == 0
    program.report(confirmed=confirmed, obeyed=obeyed, loaded=loaded)


if __name__ == "__main__":
    faulthandler.enable()
    {"learner": learn, "worker": work}[sys.argv[1]](sys.argv[2], float(sys.argv[3]))
