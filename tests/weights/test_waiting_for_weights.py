"""Waiting for newer weights, and taking them as values: each version once, none that the caller has not."""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from conftest import wait_until
from interrupts import interrupt_at

from rlbroker import (
    Closed,
    DeadlineExceeded,
    InvalidArgument,
    UnsupportedType,
    WeightsMismatch,
    WorkerClient,
    WorkerCommunicator,
)
from rlbroker.weights import applier

Learner = Callable[..., WorkerCommunicator]
Worker = Callable[..., WorkerClient]


def later(call: Callable[[], Any], seconds: float = 0.2) -> threading.Timer:
    """Call in another thread, after a caller has begun to wait."""
    timer = threading.Timer(seconds, call)
    timer.start()
    return timer


# wait_for_weights


@pytest.mark.on_every_engine
def test_a_worker_gets_each_version_that_it_waits_for(learner: Learner, worker: Worker) -> None:
    comm, client = learner(), worker()
    model = {"number": 0}

    def answer() -> list[int]:
        seen = []
        while client.wait_for_weights(model):
            seen.append(model["number"])
            client.send_experiences({"x": np.zeros(1)})
        return seen

    with ThreadPoolExecutor(1) as pool:
        answers = pool.submit(answer)
        for number in range(1, 6):
            comm.send_model_weights({"number": number})
            [(_, batch)] = comm.collect_experiences(timeout=10.0)
            assert batch.version == number
        command = comm.send_control_command("stop")
        assert answers.result(timeout=10.0) == [1, 2, 3, 4, 5]
        assert command.wait()[0]


def test_newer_weights_that_are_there_already_are_loaded_at_once(learner: Learner, worker: Worker) -> None:
    comm, client = learner(), worker()
    comm.send_model_weights({"number": 1})
    wait_until("it has arrived", lambda: client._subscriber.ready)
    model: dict[str, Any] = {}
    began = time.monotonic()
    assert client.wait_for_weights(model)
    assert time.monotonic() - began < applier.CHECK_SECONDS
    assert (client.version, model) == (1, {"number": 1})


def test_only_versions_newer_than_the_given_one_are_loaded(learner: Learner, worker: Worker) -> None:
    comm, client = learner(), worker()
    model: dict[str, Any] = {}
    for number in (1, 2):
        comm.send_model_weights({"number": number})
    with pytest.raises(
        DeadlineExceeded, match=r"no weights newer than version 2 in the run .* within 0.5 s: is its"
    ):
        client.wait_for_weights(model, newer_than=2, timeout=0.5)
    assert (client.version, model) == (0, {})
    assert client.poll(model), "what was too old for one call is there for the next"
    later(lambda: comm.send_model_weights({"number": 3}))
    assert client.wait_for_weights(model, 10.0, newer_than=np.int64(2))
    assert (client.version, model) == (3, {"number": 3})


def test_a_second_model_gets_what_the_worker_runs_already(learner: Learner, worker: Worker) -> None:
    comm, client = learner(), worker()
    comm.send_model_weights({"number": 1})
    client.load_weights({})
    model: dict[str, Any] = {}
    assert client.wait_for_weights(model, newer_than=0, timeout=10.0)
    assert (client.version, model) == (1, {"number": 1})
    with pytest.raises(DeadlineExceeded):
        client.wait_for_weights(model, timeout=0.2)


def test_weights_that_did_not_fit_are_offered_again(learner: Learner, worker: Worker) -> None:
    comm, client = learner(), worker()
    comm.send_model_weights({"w": np.ones(3)})
    with pytest.raises(WeightsMismatch, match="not in the weights: b"):
        client.wait_for_weights({"b": np.zeros(3)})
    model = {"w": np.zeros(3)}
    assert client.wait_for_weights(model, timeout=10.0)
    assert model["w"].tolist() == [1, 1, 1]


@pytest.mark.parametrize("end", ["stop", "drain", "close"])
def test_a_worker_that_is_to_end_waits_no_longer(learner: Learner, worker: Worker, end: str) -> None:
    comm, client = learner(), worker()
    calls = {"stop": lambda: comm.send_control_command("stop"), "drain": client.drain, "close": client.close}
    timer = later(calls[end])
    with ThreadPoolExecutor(2) as pool:
        taking, loading = pool.submit(client.take_weights, 60.0), pool.submit(client.load_weights, {})
        assert client.wait_for_weights({}) is False
        assert (taking.result(), loading.result()) == (None, 0)
    timer.join()
    assert not client.running
    comm.send_model_weights({"number": 1})
    if end == "close":
        with pytest.raises(Closed):
            client.wait_for_weights({})
    else:
        assert client.wait_for_weights({}) is False
        assert client.take_weights(timeout=5.0) is None


def test_commands_are_obeyed_while_a_call_waits(learner: Learner, worker: Worker) -> None:
    comm, client = learner(), worker()
    commands = []

    def send() -> None:
        commands.append(comm.send_control_command("reset"))
        commands[0].wait()
        comm.send_model_weights({"number": 1})

    timer = later(send)
    assert client.wait_for_weights({}, timeout=10.0)
    timer.join()
    assert commands[0].wait()[0]
    assert client.reset_requested()


def test_a_long_wait_is_in_the_log(
    learner: Learner,
    worker: Worker,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    run: str,
) -> None:
    comm, client = learner(), worker()
    comm.send_model_weights({"number": 1})
    client.load_weights({})
    monkeypatch.setattr(applier, "LOG_SECONDS", 0.2)
    later(lambda: comm.send_model_weights({"number": 2}), 1.0)
    with caplog.at_level(logging.WARNING, "rlbroker"):
        assert client.wait_for_weights({})
    lines = [line for line in caplog.messages if "still waiting" in line]
    assert 2 <= len(lines) <= 5
    assert lines[0].startswith(f"still waiting for weights newer than version 1 in the run {run!r} on ")
    assert lines[0].endswith(": is its learner running, and has it published?")


def test_the_second_argument_is_the_timeout(worker: Worker) -> None:
    with pytest.raises(DeadlineExceeded, match=r"came within 0\.1 s"):
        worker().wait_for_weights({}, 0.1)


def test_what_cannot_be_waited_for_is_refused(worker: Worker) -> None:
    client = worker()
    for arguments in ({"newer_than": -1}, {"newer_than": "1"}, {"timeout": 0}, {"timeout": "1"}):
        with pytest.raises(InvalidArgument):
            client.wait_for_weights({}, **arguments)
    with pytest.raises(UnsupportedType):
        client.wait_for_weights(3)  # type: ignore[arg-type]
    for timeout in (None, -1, "1"):
        with pytest.raises(InvalidArgument, match="timeout must be a number of seconds"):
            client.take_weights(timeout)  # type: ignore[arg-type]


# take_weights


def weights_of(number: int) -> dict[str, Any]:
    """Return weights with large and small leaves of each kind, nested and tied, that change in part."""
    tensor = torch.arange(50_000, dtype=torch.float32)
    tensor[:100] = number
    return {
        "module": {"weight": tensor, "tied": tensor, "low": torch.full((7,), number, dtype=torch.bfloat16)},
        "array": np.full((300, 100), number, np.float64),
        "small": np.array([number]),
        "list": [np.full(3, number), 1.5, None, "text", b"bytes"],
        "flags": np.array([True, False]),
        "scalar": np.float32(number),
    }


def leaves(tree: Any) -> list[Any]:
    if isinstance(tree, dict):
        return [leaf for value in tree.values() for leaf in leaves(value)]
    if isinstance(tree, list):
        return [leaf for value in tree for leaf in leaves(value)]
    return [tree]


def assert_same(tree: Any, other: Any) -> None:
    assert len(leaves(tree)) == len(leaves(other))
    for leaf, expected in zip(leaves(tree), leaves(other), strict=True):
        assert type(leaf) is type(expected)
        if isinstance(expected, torch.Tensor):
            assert leaf.dtype == expected.dtype
            assert torch.equal(leaf, expected)
        elif isinstance(expected, np.ndarray | np.generic):
            assert (leaf.dtype, leaf.shape, leaf.tobytes()) == (
                expected.dtype,
                expected.shape,
                expected.tobytes(),
            )
        else:
            assert leaf == expected


@pytest.mark.on_every_engine
def test_each_version_is_taken_once_and_counts_as_applied(learner: Learner, worker: Worker) -> None:
    comm, client = learner(), worker()
    assert client.take_weights() is None
    receipts = [comm.send_model_weights(weights_of(number)) for number in (1, 2)]
    taken = client.take_weights(timeout=10.0)
    while taken and taken[0] < 2:
        taken = client.take_weights(timeout=10.0)
    assert taken
    version, tree = taken
    assert version == client.version == 2
    assert_same(tree, weights_of(2))
    assert tree["module"]["weight"] is tree["module"]["tied"]
    assert client.take_weights() is None
    assert client.take_weights(timeout=0.05) is None
    assert receipts[1].wait_applied()[0]
    client.send_experiences({"x": np.zeros(1)})
    [(_, batch)] = comm.collect_experiences(timeout=10.0)
    assert batch.version == 2
    assert not client.poll({}), "what was taken is loaded again"


@pytest.mark.parametrize("host_cache", [True, False])
def test_a_taken_tree_is_the_callers_own(learner: Learner, worker: Worker, host_cache: bool) -> None:
    """Later versions, deltas to it, another process's image, other trees and models share nothing with it."""
    comm, client = learner(host_cache=host_cache), worker(host_cache=host_cache)
    other = worker(host_cache=host_cache)
    trees = []
    for number in range(1, 6):
        comm.send_model_weights(weights_of(number))
        taken = client.take_weights(timeout=10.0)
        assert taken
        assert taken[0] == number
        trees.append(taken[1])
    model: dict[str, Any] = {}
    client.load_weights(model)
    model_of_another: dict[str, Any] = {}
    other.load_weights(model_of_another)
    for number, tree in enumerate(trees, start=1):
        assert_same(tree, weights_of(number))
    for tree in trees:  # writing to it disturbs nothing
        for leaf in leaves(tree):
            if isinstance(leaf, np.ndarray):
                assert leaf.flags.writeable
                leaf[...] = 0
            elif isinstance(leaf, torch.Tensor):
                leaf.zero_()
    assert_same(model, weights_of(5))
    assert_same(model_of_another, weights_of(5))
    comm.send_model_weights(weights_of(6))  # a delta to version 5, where that is worthwhile
    taken = client.take_weights(timeout=10.0)
    assert taken
    assert_same(taken[1], weights_of(6))
    again: dict[str, Any] = {}
    other.load_weights(again)
    assert_same(again, weights_of(6))


def test_functional_torch_code_takes_its_parameters(learner: Learner, worker: Worker) -> None:
    comm, client = learner(), worker()
    module = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Linear(8, 2))
    comm.send_model_weights(module.state_dict(), dtype="bfloat16")
    taken = client.take_weights(timeout=10.0)
    assert taken
    params = {name: value.requires_grad_() for name, value in taken[1].items()}
    inputs = torch.ones(3, 4)
    rounded = {name: value.bfloat16().float() for name, value in module.state_dict().items()}
    found = torch.func.functional_call(module, params, (inputs,))
    assert torch.equal(found, torch.func.functional_call(module, rounded, (inputs,)))
    found.sum().backward()
    assert all(value.grad is not None for value in params.values())


def test_taking_obeys_commands_as_polling_does(learner: Learner, worker: Worker) -> None:
    comm, client = learner(), worker()
    comm.send_model_weights({"number": 1})
    comm.send_control_command("reset")
    comm.send_control_command("pause", {"duration": 0.2})
    wait_until("both have arrived", lambda: len(client._inbox._commands) == 2 and client._subscriber.ready)
    began = time.monotonic()
    assert client.take_weights() == (1, {"number": 1})
    assert time.monotonic() - began >= 0.2
    assert client.reset_requested()
    comm.send_model_weights({"number": 2})
    comm.send_control_command("stop")
    wait_until("both have arrived again", lambda: client._inbox.waiting and client._subscriber.ready)
    assert client.take_weights() is None
    assert not client.running


def test_a_tree_that_an_interrupt_kept_back_is_dropped_once_a_newer_one_was_loaded(
    learner: Learner, worker: Worker
) -> None:
    comm, client = learner(), worker()
    kept_back = 0
    for point in itertools.count(1):
        version = comm.send_model_weights({"number": 1}).version
        wait_until("it has arrived", lambda: client._subscriber.ready)
        with interrupt_at(point, "function") as interrupt:
            client.take_weights()
        if not interrupt.place:
            break
        kept_back += client.version == version
        newer = comm.send_model_weights({"number": 2}).version
        assert client.load_weights({}, timeout=10.0) == newer
        assert client.take_weights() is None, interrupt.place
    assert kept_back


def test_two_threads_never_take_the_same_tree(learner: Learner, worker: Worker) -> None:
    comm, client = learner(), worker()
    taken: list[tuple[int, dict[str, Any]]] = []

    def take() -> None:
        while client.running:
            if found := client.take_weights(timeout=0.05):
                taken.append(found)

    threads = [threading.Thread(target=take) for _ in range(3)]
    for thread in threads:
        thread.start()
    for number in range(1, 31):
        comm.send_model_weights({"number": number}).wait_applied()
    client.drain()
    for thread in threads:
        thread.join()
    assert sorted(version for version, _ in taken) == [
        tree["number"] for _, tree in sorted(taken, key=lambda one: one[0])
    ]
    assert len({version for version, _ in taken}) == len(taken) == len({id(tree) for _, tree in taken})
    assert max(version for version, _ in taken) == 30


def test_two_threads_that_wait_for_the_same_version_both_get_it(learner: Learner, worker: Worker) -> None:
    """As after a cancelled `asyncio.to_thread`: its thread waits on, and the next call waits for the same."""
    comm, client = learner(), worker()
    models: list[dict[str, Any]] = [{}, {}]
    with ThreadPoolExecutor(2) as pool:
        calls = [pool.submit(client.wait_for_weights, one, newer_than=0, timeout=20.0) for one in models]
        timer = later(lambda: comm.send_model_weights({"w": np.ones(3)}))
        assert [call.result() for call in calls] == [True, True]
        timer.join()
    assert [model["w"].tolist() for model in models] == [[1.0] * 3] * 2
