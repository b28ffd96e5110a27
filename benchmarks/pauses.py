"""How long rollouts and training pause: in `poll`, and in `send_model_weights` with `wait=False`."""

from __future__ import annotations

import contextlib
import itertools
import time
from multiprocessing.connection import Connection

import torch

from benchmarks.child_processes import receive, start_child
from benchmarks.measure import Row, interleaved, progress
from benchmarks.models import State, make_model, training_steps
from benchmarks.rlbroker_transport import open_learner, open_worker
from benchmarks.servers import scratch_name
from rlbroker import WorkerClient, WorkerCommunicator

#: The number of polls whose mean is one sample.
POLLS = 10_000

#: The limit for a `poll` without new weights.
IDLE_MICROSECONDS = 5.0


def run(url: str, *, quick: bool, repetitions: int) -> list[Row]:
    """Return the rows of the worker's `poll` and of the learner's `send_model_weights`."""
    megabytes = 4 if quick else 512
    progress(f"pauses: a worker polls while {megabytes} MB arrive")
    weights = training_steps(megabytes << 20, 2)
    with scratch_name(url) as name, open_learner(url, name, workers=1) as communicator:
        return [
            *_poll_rows(url, name, communicator, weights, megabytes, repetitions),
            _return_row(communicator, weights, megabytes, repetitions),
        ]


def _poll_rows(
    url: str,
    name: str,
    communicator: WorkerCommunicator,
    weights: list[State],
    megabytes: int,
    repetitions: int,
) -> list[Row]:
    versions = itertools.cycle(weights)
    communicator.send_model_weights(next(versions), compression_enabled=False)
    steps: list[float] = []
    with start_child(_watch, url, name, megabytes << 20) as pipe:
        receive(pipe, "open")

        def request(measurement: str) -> float:
            pipe.send(measurement)
            return float(receive(pipe, measurement))

        def poll_during_arrival() -> float:
            pipe.send("arriving")
            receive(pipe, "watching")
            communicator.send_model_weights(next(versions), compression_enabled=False)
            poll_ms, step_ms = receive(pipe, "arriving")
            steps.append(step_ms)
            return float(poll_ms)

        idle = [request("idle") for _ in range(repetitions + 1)][1:]
        found = interleaved({"arriving": poll_during_arrival, "copy": lambda: request("copy")}, repetitions)
    note = f"longest step of the rollout beside it: {max(steps[1:]):.0f} ms"
    longest = f"longest poll of a rollout loop while {megabytes} MB arrive"
    limit = [IDLE_MICROSECONDS]
    return [
        Row("poll with nothing new", "a fixed limit", "≤ 5 µs", idle, limit, "µs", False, 1.0),
        Row(
            longest,
            "the copy into the model alone",
            "the copy only (≤ 1.3×)",
            found["arriving"],
            found["copy"],
            "ms",
            False,
            1.3,
            note,
        ),
    ]


def _return_row(
    communicator: WorkerCommunicator, weights: list[State], megabytes: int, repetitions: int
) -> Row:
    work, against = f"send_model_weights(wait=False) of {megabytes} MB returns", "wait=True"
    versions = itertools.cycle(weights)

    def time_until_return(*, wait: bool) -> float:
        started = time.perf_counter()
        receipt = communicator.send_model_weights(next(versions), compression_enabled=False, wait=wait)
        seconds = time.perf_counter() - started
        receipt.wait(60.0)
        return 1e3 * seconds

    found = interleaved(
        {"ours": lambda: time_until_return(wait=False), "theirs": lambda: time_until_return(wait=True)},
        repetitions,
    )
    return Row(work, against, "before the bytes are out", found["ours"], found["theirs"], "ms", False, 1.0)


def _watch(pipe: Connection, url: str, run: str, size_bytes: int) -> None:
    model = make_model(size_bytes)
    with contextlib.closing(open_worker(url, run, 0)) as client:
        client.load_weights(model)
        pipe.send(("open", None))
        while (measurement := pipe.recv()) is not None:
            if measurement == "arriving":
                pipe.send(("watching", None))
                pipe.send((measurement, _longest_milliseconds(client, model)))
            else:
                idle = measurement == "idle"
                value = _idle_microseconds(client, model) if idle else _copy_milliseconds(model)
                pipe.send((measurement, value))


def _idle_microseconds(client: WorkerClient, model: torch.nn.Module) -> float:
    started = time.perf_counter()
    for _ in range(POLLS):
        client.poll(model)
    return 1e6 * (time.perf_counter() - started) / POLLS


def _copy_milliseconds(model: torch.nn.Module) -> float:
    """Return the time to copy a full set of weights into the model, from memory that was touched before."""
    values = {name: value.clone() for name, value in model.state_dict().items()}
    started = time.perf_counter()
    model.load_state_dict(values)
    return 1e3 * (time.perf_counter() - started)


def _longest_milliseconds(client: WorkerClient, model: torch.nn.Module) -> tuple[float, float]:
    """Step and poll until new weights are in the model; return the longest poll and the longest step."""
    observations, layer = torch.ones(64, 256), torch.ones(256, 256)
    poll_seconds = step_seconds = 0.0
    loaded = False
    while not loaded:
        started = time.perf_counter()
        torch.tanh(observations @ layer)
        stepped = time.perf_counter()
        loaded = client.poll(model)
        poll_seconds = max(poll_seconds, time.perf_counter() - stepped)
        step_seconds = max(step_seconds, stepped - started)
    return 1e3 * poll_seconds, 1e3 * step_seconds
