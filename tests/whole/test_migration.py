"""What `docs/migration.md` says to those who come from `multiprocessing` queues is true."""

from __future__ import annotations

import builtins
import inspect
import queue
import re
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Server, wait_until

import rlbroker
from rlbroker import Batch, Command, QueueFull, WeightsMismatch, WorkerClient, WorkerCommunicator
from rlbroker.errors import (
    Closed,
    ConnectionFailed,
    DeadlineExceeded,
    InvalidArgument,
    PeerError,
    RlbrokerError,
    UnknownWorker,
    UnsupportedType,
    UsageError,
)

Learner = Callable[..., WorkerCommunicator]
Worker = Callable[..., WorkerClient]

PAGE = (Path(__file__).parents[2] / "docs" / "migration.md").read_text()

#: Seconds for what takes milliseconds on an idle machine.
LONG = 20.0


def table_below(heading: str) -> list[list[str]]:
    """Return the rows of the page's table below a heading, without its head."""
    section = PAGE.partition(f"\n{heading}\n")[2].partition("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def obey(client: WorkerClient, command: Command) -> str:
    """Let a worker poll until it has answered a command; return its answer."""
    wait_until("the worker has answered", lambda: client.poll() or is_answered(client, command), LONG)
    return str(command.outcomes()[client.worker_id])


def is_answered(client: WorkerClient, command: Command) -> bool:
    return command.outcomes()[client.worker_id].state != "waiting"


# What to change


def test_the_worker_on_the_page_works(learner: Learner, run: str, server: Server) -> None:
    [code] = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    model, episodes, epsilons = torch.nn.Linear(2, 1), list[str](), list[float]()

    class Env:
        reset = staticmethod(partial(episodes.append, "reset"))
        set_epsilon = staticmethod(epsilons.append)

    names: dict[str, Any] = {
        "WorkerClient": lambda url, run, worker_id: WorkerClient(
            run=run, worker_id=worker_id, timeout=5.0, **server.connection_settings()
        ),
        "make_model": lambda: model,
        "make_env": Env,
        "rollout": lambda model, env: {"seen": float(model.weight.detach().sum()), "resets": len(episodes)},
    }
    exec(code, names)
    comm, published = learner(), torch.nn.Linear(2, 1)
    thread = threading.Thread(target=names["work"], args=(3, "", run), daemon=True)
    thread.start()
    try:
        comm.send_model_weights(published.state_dict())
        assert comm.collect_experiences(timeout=LONG)[0][0] == 3
        commands = [comm.send_control_command("set_epsilon", 0.1), comm.send_control_command("reset")]
        published.weight.data.fill_(7.0)
        comm.send_model_weights(published.state_dict())
        sees_all = {"seen": 14.0, "resets": 1}
        wait_until("the worker has obeyed", lambda: sees_all in dict_list(comm.collect_experiences()), LONG)
        assert [str(command.wait()[3]) for command in commands] == ["done", "done"]
    finally:
        comm.send_control_command("stop")
        thread.join(LONG)
    assert not thread.is_alive()
    assert (epsilons, episodes) == ([0.1], ["reset"])


def dict_list(pairs: list[tuple[int, Batch]]) -> list[dict[str, Any]]:
    return [dict(batch) for _, batch in pairs]


def test_a_worker_may_begin_with_its_own_weights_and_send_what_it_has_after_a_stop(
    learner: Learner, worker: Worker
) -> None:
    comm, client = learner(max_queue_size=2), worker()
    assert obey(client, comm.send_control_command("stop", worker_ids=[0])) == "done"
    assert not client.running
    assert [bool(client.send_experiences({"n": number})) for number in range(3)] == [True, True, False]
    assert [(batch["n"], batch.version) for _, batch in comm.collect_experiences(timeout=LONG)] == [
        (0, 0),
        (1, 0),
    ]
    assert comm.get_queue_info()["counts"][0].lost == {"stopped": 1}


# What stays


@pytest.mark.parametrize(
    ("call", "positional"),
    [
        ("__init__", ["num_workers", "max_queue_size", "timeout"]),
        ("send_model_weights", ["model_state_dict", "compression_enabled"]),
        ("send_control_command", ["command", "data", "worker_ids"]),
    ],
)
def test_positional_arguments_keep_their_names_and_places(call: str, positional: list[str]) -> None:
    parameters = list(inspect.signature(getattr(WorkerCommunicator, call)).parameters.values())[1:]
    takes_positions = [one.name for one in parameters if one.kind is one.POSITIONAL_OR_KEYWORD]
    assert takes_positions == positional


@pytest.mark.parametrize("call", ["collect_experiences", "get_queue_info", "cleanup"])
def test_calls_without_arguments_need_none(call: str) -> None:
    parameters = list(inspect.signature(getattr(WorkerCommunicator, call)).parameters.values())[1:]
    assert all(one.default is not one.empty for one in parameters)


def test_the_number_of_workers_and_the_timeout_stay_readable(server: Server, run: str) -> None:
    with WorkerCommunicator(3, 50, 2.5, run=run, **server.connection_settings()) as comm:
        assert (comm.num_workers, comm.timeout) == (3, 2.5)
        info = comm.get_queue_info()
        for sizes in (
            info["experience_queue_sizes"],
            info["model_queue_sizes"],
            info["control_queue_sizes"],
        ):
            assert sizes == [0, 0, 0]
        for name in ("num_workers", "timeout"):
            with pytest.raises(AttributeError):
                setattr(comm, name, 1)
    assert (comm.num_workers, comm.timeout) == (3, 2.5)


def test_a_message_of_queues_travels_as_it_is(learner: Learner, worker: Worker) -> None:
    comm, client = learner(), worker(1)
    experiences = {
        "obs": torch.rand(64, 46, 9, 9),
        "actions": torch.randint(13_527, (64,)),
        "rewards": torch.rand(64),
        "log_probs": -torch.rand(64),
        "values": torch.rand(64),
        "dones": torch.rand(64) < 0.1,
        "legal_masks": torch.rand(64, 1000) < 0.5,
    }
    message = {
        "worker_id": 77,  # whatever it claims to be
        "experiences": experiences,
        "batch_size": 64,
        "timestamp": time.time(),
        "steps_collected": 640,
        "games_played": 3,
    }
    assert client.send_experiences(message).rows == 64
    [(worker_id, batch)] = comm.collect_experiences(timeout=LONG)
    assert (worker_id, batch.worker_id, batch["worker_id"]) == (1, 1, 77)
    assert isinstance(batch, dict)
    assert (list(batch), batch.rows) == (list(message), 64)
    for key in message.keys() - {"experiences"}:
        assert (batch[key], type(batch[key])) == (message[key], type(message[key]))
    assert list(batch["experiences"]) == list(experiences)
    for key, sent in experiences.items():
        got = batch["experiences"][key]
        assert (got.dtype, got.device.type) == (sent.dtype, "cpu")
        assert torch.equal(got, sent)
        got[0] = 0  # writable


def test_queues_are_gone(learner: Learner) -> None:
    comm = learner()
    for name in ("experience_queues", "model_queues", "control_queues", "mp_context"):
        assert not hasattr(comm, name)
        assert f"`{name}`" in PAGE


# What differs, call by call


@pytest.mark.parametrize("arguments", [(0,), (-1,), (2, 0), (2, -1), (2, 10, None)], ids=str)
def test_the_constructor_refuses_what_queues_took(
    arguments: tuple[Any, ...], server: Server, run: str
) -> None:
    with pytest.raises(InvalidArgument):
        WorkerCommunicator(*arguments, run=run, **server.connection_settings())


def test_a_worker_loads_the_newest_weights_only_and_also_when_it_joins_later(
    learner: Learner, worker: Worker
) -> None:
    comm, early, weights = learner(), worker(0), dict[str, Any]()
    for number in range(1, 4):
        comm.send_model_weights({"w": np.full(3, number)})
    assert early.load_weights(weights, LONG) == 3
    assert not early.poll(weights)
    assert weights["w"].tolist() == [3, 3, 3]
    late = worker(1)
    assert late.load_weights(weights, LONG) == 3
    wait_until("the skipped versions are on record", lambda: comm.missed_updates()[0].total == 2, LONG)
    assert comm.missed_updates()[0].by_reason == {"superseded": 2}
    assert comm.missed_updates()[1].total == 0


def test_weights_of_any_dtype_stay_tied_and_may_change_after_the_call(
    learner: Learner, worker: Worker
) -> None:
    comm, client = learner(), worker()
    first, second = (torch.nn.Linear(3, 3, dtype=torch.bfloat16) for _ in range(2))
    second.weight = first.weight
    model, expected = torch.nn.Sequential(first, second), first.weight.detach().clone()
    comm.send_model_weights(model.state_dict(), True)
    with torch.no_grad():
        first.weight.zero_()
    weights: dict[str, Any] = {}
    client.load_weights(weights, LONG)
    assert weights["0.weight"].dtype is torch.bfloat16
    assert torch.equal(weights["0.weight"], expected)
    assert weights["0.weight"].data_ptr() == weights["1.weight"].data_ptr()


def test_weights_that_do_not_fit_raise_and_change_nothing(learner: Learner, worker: Worker) -> None:
    comm, client, model = learner(), worker(), torch.nn.Linear(3, 2)
    before = model.weight.detach().clone()
    comm.send_model_weights(torch.nn.Linear(4, 2).state_dict())
    with pytest.raises(WeightsMismatch):
        client.load_weights(model, LONG)
    assert torch.equal(model.weight, before)


def test_each_workers_batches_come_in_its_order_and_a_crash_before_the_next_collect_repeats_them(
    learner: Learner, worker: Worker
) -> None:
    comm = learner()
    clients = [worker(0), worker(1)]
    for number in range(3):
        for client in clients:
            client.send_experiences({"n": number})
    pairs: list[tuple[int, Batch]] = []
    while len(pairs) < 6:
        pairs += comm.collect_experiences(timeout=LONG) or pytest.fail("batches are missing")
    for client in clients:
        assert [b["n"] for worker_id, b in pairs if worker_id == client.worker_id] == [0, 1, 2]
    clients[0].send_experiences({"n": 3})
    [(_, last)] = comm.collect_experiences(timeout=LONG)
    with pytest.raises(KeyboardInterrupt), comm:
        raise KeyboardInterrupt
    successor = learner()
    assert [batch["n"] for _, batch in successor.collect_experiences(timeout=LONG)] == [last["n"]] == [3]


def test_a_sent_batch_may_be_overwritten(learner: Learner, worker: Worker) -> None:
    comm, client, buffer = learner(), worker(), np.zeros(8)
    client.send_experiences({"x": buffer})
    buffer[:] = 1.0
    [(_, batch)] = comm.collect_experiences(timeout=LONG)
    assert not batch["x"].any()


def test_a_full_queue_is_queue_full_or_drops_at_once(learner: Learner, worker: Worker) -> None:
    comm, client = learner(max_queue_size=1), worker(0)
    dropping = worker(1, when_full="drop_newest")
    client.send_experiences({"n": 1})
    with pytest.raises(queue.Full) as raised:
        client.send_experiences({"n": 2}, 0.3)
    assert isinstance(raised.value, QueueFull)
    assert dropping.send_experiences({"n": 1})
    assert not dropping.send_experiences({"n": 2})
    comm.collect_experiences(timeout=LONG)
    wait_until(
        "it is counted", lambda: comm.get_queue_info()["counts"][1].lost == {"dropped_newest": 1}, LONG
    )


def test_commands_go_to_present_workers_only(learner: Learner, worker: Worker) -> None:
    comm = learner()
    early = comm.send_control_command("set_epsilon", 1)
    assert not early
    assert early.wait() == {}
    assert not comm.send_control_command("set_epsilon", 1, [])
    client, got = worker(0), list[Any]()
    client.on_command("set_epsilon", got.append)
    command = comm.send_control_command("set_epsilon", {"value": 2, "range": (0, 1)}, [0, 7])
    assert obey(client, command) == "done"
    assert got == [{"value": 2, "range": (0, 1)}]
    assert str(command.outcomes()[7]) == "unknown: unknown worker"
    assert obey(client, comm.send_control_command("dance")) == "unknown"
    with pytest.raises(UnknownWorker):
        comm.send_control_command("stop", None, [7])
    with pytest.raises(InvalidArgument):
        comm.send_control_command("stop", None, [-1])


def test_an_exception_in_a_handler_does_not_end_the_worker(learner: Learner, worker: Worker) -> None:
    comm, client = learner(), worker()
    client.on_command("halve", lambda data: data / 2)
    assert obey(client, comm.send_control_command("halve", None)).startswith("failed: TypeError")
    assert client.running


@pytest.mark.parametrize(("data", "seconds"), [({}, 1.0), ({"duration": 0.3}, 0.3)], ids=str)
def test_a_pause_with_data_ends_by_itself(
    learner: Learner, worker: Worker, data: Any, seconds: float
) -> None:
    comm, client = learner(), worker()
    command = comm.send_control_command("pause", data)
    began = time.monotonic()
    assert obey(client, command) == "done"
    assert time.monotonic() - began >= seconds
    assert not client.paused


@pytest.mark.parametrize("ending", ["resume", "stop"])
def test_a_pause_without_data_lasts_until_resume_or_stop(
    learner: Learner, worker: Worker, ending: str
) -> None:
    comm, client, done = learner(), worker(), threading.Event()
    comm.send_control_command("pause")

    def poll() -> None:
        while not done.is_set():
            client.poll()

    thread = threading.Thread(target=poll, daemon=True)
    thread.start()
    try:
        wait_until("the worker pauses", lambda: client.paused, LONG)
        command = comm.send_control_command(ending, worker_ids=[0])
        assert str(command.wait(LONG)[0]) == "done"
    finally:
        done.set()
        thread.join(LONG)
    assert not thread.is_alive()
    assert client.running == (ending == "resume")


def test_queue_sizes_are_exact(learner: Learner, worker: Worker) -> None:
    comm, client = learner(), worker(2)
    client.on_command("noop", print)
    for number in range(3):
        client.send_experiences({"n": number})
    comm.send_model_weights({"w": np.ones(2)})
    comm.send_control_command("noop")
    info = comm.get_queue_info()
    assert info["experience_queue_sizes"] == [0, 0, 3]  # the highest id is 2
    assert info["model_queue_sizes"] == [0, 0, 1]
    assert info["control_queue_sizes"] == [0, 0, 1]
    assert info["counts"][2].waiting == 3


def test_cleanup_leaves_batches_to_the_next_learner_and_may_be_repeated(
    learner: Learner, worker: Worker
) -> None:
    comm, client = learner(), worker()
    client.send_experiences({"n": 1})
    report = comm.cleanup()
    assert not report
    assert report.waiting == {0: 1}
    assert comm.cleanup() == report
    with pytest.raises(Closed):
        comm.collect_experiences()
    assert [batch["n"] for _, batch in learner().collect_experiences(timeout=LONG)] == [1]


def test_cleanup_stops_present_and_later_workers_unless_the_run_goes_on(
    learner: Learner, worker: Worker
) -> None:
    comm, early = learner(timeout=1.0), worker(0)
    assert comm.cleanup(stop_workers=False).stopped == {}
    early.poll()
    assert early.running
    comm = learner(timeout=1.0)
    assert comm.cleanup().stopped.keys() == {0}
    for client in (early, worker(1)):
        wait_until("it stops", partial(has_stopped, client), LONG)


def has_stopped(client: WorkerClient) -> bool:
    return client.poll() or not client.running


def test_an_exception_in_the_block_stops_no_worker(learner: Learner, worker: Worker) -> None:
    comm, client = learner(), worker(0)
    with pytest.raises(ZeroDivisionError), comm:
        raise ZeroDivisionError
    command = learner().send_control_command("reset")
    assert obey(client, command) == "done"
    assert client.running


def test_stop_workers_reads_full_queues_and_keeps_what_it_read(learner: Learner, worker: Worker) -> None:
    comm, client = learner(max_queue_size=1), worker(0)
    sent: list[int] = []

    def work() -> None:
        while client.running:
            if client.send_experiences({"n": len(sent)}, LONG):
                sent.append(len(sent))
            client.poll()

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    wait_until("its queue is full", lambda: comm.get_queue_info()["experience_queue_sizes"][0] == 1, LONG)
    assert {worker: str(one) for worker, one in comm.stop_workers(LONG).items()} == {0: "done"}
    thread.join(LONG)
    got: list[int] = []
    while pairs := comm.collect_experiences():
        got += [batch["n"] for _, batch in pairs]
    assert got == sent


# What the calls return and raise


def test_what_the_calls_return(learner: Learner, worker: Worker) -> None:
    comm = learner()
    receipt = comm.send_model_weights({"w": np.ones(3)})
    assert receipt, "it is true without a worker"
    assert (receipt.version, receipt.seconds > 0) == (1, True)
    client = worker()
    command = comm.send_control_command("reset")
    assert command
    assert obey(client, command) == "done"
    sent = client.send_experiences({"w": np.ones(3)})
    assert sent
    assert (sent.sequence, sent.version) == (1, 0)
    assert client.poll({}) or client.load_weights({}, LONG)
    assert comm.collect_experiences(timeout=LONG)
    assert comm.collect_experiences() == []
    client.close()
    assert comm.cleanup()


def test_the_pages_errors_are_the_builtins_that_it_says() -> None:
    rows = table_below("## What raises instead of returning False or logging")
    assert len(rows) > 10
    for _, _, mine, kin in rows:
        names = re.findall(r"`(\w+)`", mine)
        bases = [
            queue.Full if name == "queue.Full" else getattr(builtins, name)
            for name in re.findall(r"`([\w.]+)`", kin)
        ]
        names *= len(bases) if len(names) == 1 else 1  # one error that is several builtins
        for name, base in zip(names, bases, strict=True):
            assert issubclass(getattr(rlbroker, name), base)


def test_what_an_old_except_clause_still_catches() -> None:
    found = [getattr(rlbroker, name) for name in rlbroker.__all__]
    errors = [one for one in found if isinstance(one, type) and issubclass(one, RlbrokerError)]
    missed = {one for one in errors if not issubclass(one, (RuntimeError, OSError, ValueError))}
    branches = {RlbrokerError, UsageError, PeerError}
    assert missed - branches == {UnsupportedType, UnknownWorker}


def test_what_cannot_travel_is_refused_with_its_path(learner: Learner, worker: Worker) -> None:
    comm, client = learner(), worker()
    for value in ({1, 2}, object(), print):
        with pytest.raises(UnsupportedType, match=r"\['a'\]"):
            client.send_experiences({"a": value})
        with pytest.raises(UnsupportedType, match=r"\['a'\]"):
            comm.send_model_weights({"a": value})


def test_waits_for_a_learner_that_never_comes_end(worker: Worker) -> None:
    client = worker(timeout=1.0)
    with pytest.raises(DeadlineExceeded):
        client.send_experiences({"n": 1})
    with pytest.raises(DeadlineExceeded):
        client.load_weights({}, 0.5)


def test_a_server_that_cannot_be_reached_is_an_error_of_the_constructor() -> None:
    with pytest.raises(ConnectionFailed) as raised:
        WorkerCommunicator(1, 10, 0.3, redis_url="redis://127.0.0.1:1/0")
    assert isinstance(raised.value, OSError)
