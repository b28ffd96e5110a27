"""One bad handler, command, entry or key concerns nothing else, and is named."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Server, wait_until

from rlbroker import Command, WorkerClient, WorkerCommunicator
from rlbroker.backend.keys import Keys
from rlbroker.errors import InvalidArgument, UnknownWorker, UnsupportedType

Learner = Callable[..., WorkerCommunicator]
Worker = Callable[..., WorkerClient]


class Unshowable(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no text")

    __repr__ = __str__


class NotText(Exception):
    def __str__(self) -> str:
        return 3  # type: ignore[return-value]


class Classless(Exception):
    @property  # type: ignore[misc]
    def __class__(self) -> Any:
        raise RuntimeError("no class")


class RaisingMapping(dict[Any, Any]):
    def __getattr__(self, name: str) -> Any:
        return self[name]


class RaisingKey:
    def __repr__(self) -> str:
        raise RuntimeError("no repr")


def outcome_of(comm: WorkerCommunicator, client: WorkerClient, command: Command) -> str:
    """Let the worker poll until the learner has the command's final outcome."""
    wait_until(
        "it is acknowledged",
        lambda: [client.poll()] and command.outcomes()[client.worker_id].state != "waiting",
    )
    return str(command.outcomes()[client.worker_id])


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (ValueError("caf\udce9.txt"), r"failed: ValueError: caf\udce9.txt"),
        (Unshowable(), "failed: Unshowable: its text cannot be shown"),
        (NotText(), "failed: NotText: its text cannot be shown"),
        (Classless, "failed: Classless"),
        (ValueError("x" * 5_000_000), "failed: ValueError: xxx"),
        (
            ExceptionGroup("two", [ValueError("first"), Unshowable(), ValueError("\udcff")]),
            r"failed: ExceptionGroup: two (3 sub-exceptions): ValueError: first; "
            r"Unshowable: its text cannot be shown; ValueError: \udcff",
        ),
    ],
    ids=["surrogate", "unshowable", "not-text", "classless", "megabytes", "group"],
)
def test_whatever_a_handler_raises_its_command_is_failed_with_readable_text(
    learner: Learner, worker: Worker, error: Exception | type[Exception], text: str
) -> None:
    comm, client = learner(), worker()

    def fail(data: Any) -> None:
        raise error

    client.on_command("fail", fail)
    found = outcome_of(comm, client, comm.send_control_command("fail"))
    assert found.startswith(text)
    assert len(found) < 600
    assert outcome_of(comm, client, comm.send_control_command("reset")) == "done"
    comm.send_model_weights({"x": 1})
    assert client.load_weights({}) == 1
    client.close()
    assert comm.missed_updates()[0].commands == 1


def test_a_handler_may_call_the_client(learner: Learner, worker: Worker) -> None:
    comm, client = learner(), worker()
    comm.send_model_weights({"x": 1})
    model, order = dict[str, int](), list[Any]()

    def reload(data: Any) -> None:
        order.append("begun")
        client.poll()
        client.load_weights(model, timeout=5.0)
        client.send_experiences({"from": "handler"})
        order.append("ended")

    client.on_command("reload", reload)
    client.on_command("note", order.append)
    first, second = comm.send_control_command("reload"), comm.send_control_command("note", "second")
    wait_until("both have arrived", lambda: len(client._inbox._commands) == 2)
    assert outcome_of(comm, client, second) == "done"
    assert str(first.outcomes()[0]) == "done"
    assert (order, model) == (["begun", "ended", "second"], {"x": 1})


def test_a_handler_may_close_its_client(learner: Learner, worker: Worker) -> None:
    comm, client = learner(), worker()
    client.on_command("leave", lambda data: client.close())
    command = comm.send_control_command("leave")
    wait_until("it has arrived", lambda: client._inbox.waiting)
    client.poll()
    assert not client.running
    assert str(command.wait(5.0)[0]) == "missed: left"


@pytest.mark.parametrize("name", ["\udcff", "a\ud800b"], ids=["alone", "inside"])
def test_a_command_whose_name_is_no_text_is_refused(learner: Learner, worker: Worker, name: str) -> None:
    comm = learner()
    with pytest.raises(InvalidArgument, match="name"):
        comm.send_control_command(name)
    with pytest.raises(UnsupportedType, match="name"):
        worker().on_command(["x"], print)  # type: ignore[arg-type]  # wrong on purpose


def test_a_command_whose_data_cannot_travel_is_refused(learner: Learner, worker: Worker) -> None:
    comm, client = learner(), worker()
    itself: list[Any] = []
    itself.append(itself)
    deep: list[Any] = []
    for _ in range(5000):
        deep = [deep]
    for data in (itself, deep, {"x": itself}, {"x": "\udcff"}):
        with pytest.raises(UnsupportedType):
            comm.send_control_command("reset", data)
    assert outcome_of(comm, client, comm.send_control_command("reset")) == "done"


def test_other_workers_get_a_command_of_which_one_recipient_is_unknown(
    learner: Learner, worker: Worker, server: Server, keys: Keys
) -> None:
    comm, client = learner(), worker(4)
    worker(5).close()
    command = comm.send_control_command("reset", worker_ids=[4, 5, 7])
    assert command
    assert command.worker_ids == (4,)
    assert outcome_of(comm, client, command) == "done"
    assert {worker: str(one) for worker, one in command.wait(5.0).items()} == {
        4: "done",
        5: "unknown: unknown worker",
        7: "unknown: unknown worker",
    }
    assert server.client.hget(keys.outcomes(command.id), "7") == b"unknown: unknown worker"
    assert not command.wait(0.0)[7]
    server.client.flushall()
    wait_until("it is restored", lambda: server.client.hget(keys.outcomes(command.id), "7"))
    assert command.wait(5.0)[7].detail == "unknown worker"


def test_a_command_to_unknown_workers_only_is_refused(learner: Learner, worker: Worker) -> None:
    comm = learner()
    worker(4)
    with pytest.raises(UnknownWorker, match=r"worker 7, 8 are not members .* members are: 4"):
        comm.send_control_command("reset", worker_ids=[7, 8])


@pytest.mark.parametrize("data", [{}, {"reason": "evaluation"}])
def test_a_pause_without_a_duration_lasts_a_second(learner: Learner, worker: Worker, data: Any) -> None:
    comm, client = learner(), worker()
    command = comm.send_control_command("pause", data)
    wait_until("it has arrived", lambda: client._inbox.waiting)
    client.poll()
    assert not client.paused
    assert command.wait(5.0)[0]


@pytest.mark.parametrize(
    "duration", [-1, float("nan"), float("inf"), True, "1", b"1", [1], {"duration": {}}, np.ones(2), 2**60]
)
def test_a_pause_with_a_bad_duration_fails(learner: Learner, worker: Worker, duration: Any) -> None:
    comm, client = learner(), worker()
    command = comm.send_control_command("pause", duration)
    assert outcome_of(comm, client, command).startswith("failed: InvalidArgument: ")
    assert not client.paused


def test_foreign_entries_hide_no_record(
    learner: Learner, worker: Worker, server: Server, keys: Keys, caplog: pytest.LogCaptureFixture
) -> None:
    comm, client = learner(), worker()
    command = comm.send_control_command("dance")
    assert outcome_of(comm, client, command) == "unknown"
    texts = dict.fromkeys(("what", "command", "why", "detail"), "x")
    numbers = {"worker": "0", "incarnation": "1", "from": "0", "to": "0", "at": "0"}
    binary = dict.fromkeys(
        ("name", "arguments", "expires_seconds", "data", "workers", "incarnations"), b"\xff"
    )
    entries: list[dict[Any, Any]] = [
        {"x": "1"},
        {b"\xff": b"\xfe"},
        {**texts, **numbers, "incarnation": "9" * 5000},
        {**texts, **numbers, "at": "nan"},
        {**texts, **numbers, "worker": "-1"},
    ]
    for fields in entries:
        server.client.xadd(keys.missed, fields)
        server.client.xadd(keys.control, {"event": "command", "command": b"\xff\xfe", **binary})
        server.client.xadd(keys.control, {**fields, "event": b"\xff"})
    with caplog.at_level(logging.WARNING):
        records = comm.missed_updates()[0].records
    assert [one.why for one in records] == ["unknown"]
    assert keys.missed in caplog.text
    comm.cleanup(stop_workers=False)
    comm = learner()
    assert outcome_of(comm, client, comm.send_control_command("reset")) == "done"
    server.client.flushall()
    wait_until("it is restored", lambda: comm.workers())
    wait_until(
        "the record is back", lambda: [one.why for one in comm.missed_updates()[0].records] == ["unknown"]
    )


def test_foreign_acknowledgements_hold_up_no_other(
    learner: Learner, worker: Worker, server: Server, keys: Keys
) -> None:
    comm, good, bad = learner(), worker(), worker()
    for number, fields in enumerate(
        (
            {b"\xff": b"\xfe"},
            {"event": "version", "version": "9" * 5000, "outcome": "applied"},
            {"event": "version", "version": "-1", "outcome": b"\xff"},
            {"event": "command", "command": b"\xff\0:7", "outcome": "done", "name": b"\xff"},
            {"event": "joined", "version": "nan", "again": "1"},
        ),
        start=1,
    ):
        server.client.xadd(keys.acknowledgements(bad.worker_id), fields, id=f"{bad.incarnation}-{number}")
    command = comm.send_control_command("reset", worker_ids=[good.worker_id])
    assert outcome_of(comm, good, command) == "done"
    wait_until("they are settled", lambda: server.client.xlen(keys.acknowledgements(bad.worker_id)) == 0)
    assert comm.missed_updates()[bad.worker_id].total == 0


@pytest.mark.parametrize("make", [lambda: Classless(), lambda: {RaisingKey(): 1}], ids=["class", "repr"])
def test_an_object_whose_own_code_raises_is_refused_by_each_call_that_sends(
    learner: Learner, worker: Worker, make: Callable[[], Any]
) -> None:
    comm, client, bad = learner(), worker(), make()
    for tree in (bad, {"a": bad}):
        for send in (
            client.send_experiences,
            comm.send_model_weights,
            lambda tree: comm.send_control_command("reset", tree),
        ):
            with pytest.raises(UnsupportedType):
                send(tree)
    ids: Any = [bad]
    with pytest.raises(InvalidArgument):
        comm.send_control_command("reset", worker_ids=ids)
    with pytest.raises(InvalidArgument):
        client.send_experiences({"x": 1}, rows=bad)
    sent: Any = RaisingMapping(x=1)
    comm.send_model_weights(sent)
    client.send_experiences(sent)
    assert outcome_of(comm, client, comm.send_control_command("reset", sent)) == "done"
    assert [dict(batch) for _, batch in comm.collect_experiences(timeout=5.0)] == [{"x": 1}]


def test_worker_ids_may_be_a_tensor(learner: Learner, worker: Worker) -> None:
    comm, client = learner(), worker()
    for ids in (torch.tensor([client.worker_id]), np.array([client.worker_id])):
        command = comm.send_control_command("reset", worker_ids=ids)
        assert outcome_of(comm, client, command) == "done"
    wrong: Any
    for wrong in (torch.tensor([True]), torch.tensor([0.0]), torch.tensor(0), np.array([True])):
        with pytest.raises(InvalidArgument, match="worker_id"):
            comm.send_control_command("reset", worker_ids=wrong)
