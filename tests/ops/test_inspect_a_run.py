"""An operator reads the inside of a run and acts on it without its learner: on fakeredis and on a real server."""

from __future__ import annotations

import importlib.util
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer
from conftest import Server, wait_until

from rlbroker import Fenced, InvalidArgument, UnsupportedType, UsageError, WorkerClient, WorkerCommunicator
from rlbroker.backend.connection import Connection
from rlbroker.backend.keys import Keys
from rlbroker.codec.describe import Content
from rlbroker.codec.message import encode
from rlbroker.control.commands import CommandSender
from rlbroker.errors import WireError
from rlbroker.ops import send_command
from rlbroker.ops.cli import control_commands
from rlbroker.ops.inspect import control_records
from rlbroker.ops.inspect.dead_letters import find_letters
from rlbroker.ops.inspect.queues import peek_queue
from rlbroker.ops.inspect.stored_weights import read_stored_weights
from rlbroker.ops.inspect.weight_contents import download_weights, read_contents, write_weights

Learner = Callable[..., WorkerCommunicator]
Worker = Callable[..., WorkerClient]


@pytest.fixture
def connection(server: Server) -> Iterator[Connection]:
    connection = Connection(client=server.another_client(), timeout_seconds=5.0)
    yield connection
    connection.close()


def send(connection: Connection, keys: Keys, name: str = "reset", **options: Any) -> Any:
    return send_command.send_command(connection, keys, name, None, None, expires_seconds=None, **options)


# Commands


@pytest.mark.parametrize("also_without_learner", [False, True])
def test_a_run_that_no_learner_has_opened_takes_no_commands(
    server: Server, connection: Connection, keys: Keys, also_without_learner: bool
) -> None:
    server.client.sadd(keys.workers, 0)
    with pytest.raises(InvalidArgument, match="no learner has opened the run"):
        send(connection, keys, also_without_learner=also_without_learner)
    assert server.client.exists(keys.control) == 0


def test_a_command_is_sent_although_a_new_learner_opens_the_run_meanwhile(
    connection: Connection, keys: Keys, learner: Learner, worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    learner()
    worker()
    send_unfenced, calls = CommandSender.send, itertools.count()

    def fenced_once(*arguments: Any, **options: Any) -> Any:
        if not next(calls):
            raise Fenced("a newer learner publishes in this run")
        return send_unfenced(*arguments, **options)

    monkeypatch.setattr(CommandSender, "send", fenced_once)
    assert send(connection, keys).worker_ids == (0,)


def test_answers_are_read_before_a_learner_settles_them(
    connection: Connection, keys: Keys, learner: Learner, worker: Worker
) -> None:
    comm, client = learner(), worker()
    comm._thread.stop(5.0)  # no learner settles answers
    command = send(connection, keys)
    assert send_command.read_outcomes(connection, keys, command)[0].state == "waiting"

    def answered() -> bool:
        client.poll({})
        return send_command.read_outcomes(connection, keys, command)[0].state == "done"

    wait_until("the answer is read", answered)
    assert command.outcomes()[0].state == "waiting"
    assert [dict(sent.outcomes) for sent in control_records.list_commands(connection, keys, count=5)] == [
        send_command.read_outcomes(connection, keys, command)
    ]


def test_commands_are_found_among_many_notices_of_versions(
    connection: Connection, keys: Keys, learner: Learner, worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(control_records, "ENTRIES_AT_ONCE", 3)
    comm, _ = learner(), worker()
    for name in ("first", "second", "third"):
        send(connection, keys, name)
        for _ in range(4):
            comm.send_model_weights({})
    commands = control_records.list_commands(connection, keys, count=9)
    assert [command.name for command in commands] == ["first", "second", "third"]
    assert [one.name for one in control_records.list_commands(connection, keys, count=2)] == [
        "second",
        "third",
    ]


def test_arguments_that_are_not_json_are_refused() -> None:
    with pytest.raises(typer.BadParameter, match="not JSON"):
        control_commands.parse_arguments("{level")
    with pytest.raises(typer.BadParameter, match="not JSON"):
        control_commands.parse_arguments("[" * 100_000)


# Batches


def test_no_more_batches_are_read_than_requested(
    connection: Connection, keys: Keys, learner: Learner, worker: Worker
) -> None:
    learner()
    client = worker()
    for number in range(5):
        client.send_experiences({"number": number})
    queue = peek_queue(connection, keys, 0, count=2)
    assert (queue.waiting, [batch.batch_id for batch in queue.batches]) == (
        5,
        [f"{client.incarnation}-{number}" for number in (1, 2)],
    )
    queue = peek_queue(connection, keys, 0, count=2, newest=True)
    assert [batch.batch_id for batch in queue.batches] == [
        f"{client.incarnation}-{number}" for number in (4, 5)
    ]


def test_any_content_of_a_queue_can_be_read(server: Server, connection: Connection, keys: Keys) -> None:
    server.client.set(keys.experiences(0), "not a stream")
    assert peek_queue(connection, keys, 0, count=9).batches == ()
    nonsense = {"version": "-1", "rows": "many", "sent_at": "nan", "data": b"\xff"}
    server.client.xadd(keys.experiences(1), nonsense)  # and there is no group
    server.client.xadd(keys.experiences(1), {"\xff": "", "sent_at": "1e999", "entry": "1-"})
    first, second = peek_queue(connection, keys, 1, count=9).batches
    assert (first.version, first.staleness, first.rows, first.age_seconds) == (None, None, None, None)
    assert (second.age_seconds, second.held_by, second.stored_bytes) == (None, "", 0)
    assert all("too short for a message" in batch.problem for batch in (first, second))


def test_a_retried_batch_keeps_the_id_under_which_it_was_sent(
    server: Server, connection: Connection, keys: Keys
) -> None:
    fields = {"entry": "17-3", "version": 1, "data": encode({"x": np.zeros(2)})}
    server.client.xadd(keys.again(0), fields)
    (batch,) = peek_queue(connection, keys, 0, count=1).batches
    assert (batch.batch_id, batch.retried, batch.contents[0].name) == ("17-3", True, "x")


@pytest.mark.parametrize("name", ["3", "3/", "3/7", "x/1-2", "3/1-2-x", "3/1-2/4"])
def test_an_invalid_dead_batch_id_is_refused(connection: Connection, keys: Keys, name: str) -> None:
    with pytest.raises(InvalidArgument, match="ids look like 3/"):
        find_letters(connection, keys, ids=[name])


# Weights


def test_before_the_first_version_no_weights_are_stored(connection: Connection, keys: Keys) -> None:
    stored = read_stored_weights(connection, keys)
    assert (stored.manifest, stored.forms, stored.versions) == (None, (), [])


def test_a_version_is_downloaded_through_its_deltas(
    connection: Connection, keys: Keys, learner: Learner
) -> None:
    comm, weights = (
        learner(),
        {"w": np.random.default_rng(1).random(40_000, np.float32), "flag": np.array([True, False])},
    )
    before = weights["w"][2]
    for step in range(3):
        weights["w"][step] = step
        comm.send_model_weights(weights)
    stored = read_stored_weights(connection, keys)
    assert stored.manifest is not None
    assert [(summary.form.base, summary.state) for summary in stored.forms] == [
        (0, "needed"),
        (1, "needed"),
        (2, "latest"),
    ]
    received: list[int] = []
    for version in (3, 2):
        path = stored.path(version)
        assert [form.version for form in path] == list(range(1, version + 1))
        chunk_bytes = stored.manifest.chunk_bytes
        contents, arrays = download_weights(
            connection, keys, path, chunk_bytes=chunk_bytes, received=received.append
        )
        assert [content.name for content in contents] == ["w", "flag"]
        weights["w"][2] = 2 if version == 3 else before
        np.testing.assert_array_equal(arrays[0], weights["w"], strict=True)
        np.testing.assert_array_equal(arrays[1], weights["flag"], strict=True)
    with pytest.raises(WireError):
        stored.path(4)
    assert 0 < sum(received) < 2 * sum(summary.form.stored_bytes for summary in stored.forms)


def test_a_header_that_was_replaced_is_refused(
    server: Server, connection: Connection, keys: Keys, learner: Learner
) -> None:
    comm = learner()
    for size in (1, 2):
        comm.send_model_weights({"w": np.zeros(size)})
    stored = read_stored_weights(connection, keys)
    first, second = (keys.chunk(summary.form.upload, 0) for summary in stored.forms)
    assert [content.shape for content in read_contents(connection, keys, stored.path(2))] == [(2,)]
    server.client.set(second, server.client.get(first))
    with pytest.raises(WireError, match="does not match the manifest"):
        read_contents(connection, keys, stored.path(2))


def make_leaf(name: str, array: np.ndarray[Any, Any], number: int = 0) -> Content:
    return Content((name,), "array", array.dtype.str, array.shape, array.nbytes, None, number)


def write(file: Path, contents: list[Content], *arrays: np.ndarray[Any, Any], force: bool = False) -> Any:
    return write_weights(file, contents, arrays, facts={"run": "pong"}, force=force)


def test_a_value_that_a_file_cannot_hold_is_named_and_no_file_is_left(tmp_path: Path) -> None:
    wide, file = np.zeros(2, np.complex128), tmp_path / "weights.safetensors"
    with pytest.raises(UnsupportedType, match=r"'w' is complex128, .* write a file that ends in \.npz"):
        write(file, [make_leaf("w", wide)], wide)
    nested = Content(("a", "b"), "int", value=1)
    with pytest.raises(UnsupportedType, match=r"two values are called 'a\.b'"):
        write(file, [nested, make_leaf("a.b", wide)], wide)
    with pytest.raises(InvalidArgument, match="must end in"):
        write(tmp_path / "weights.pt", [])
    with pytest.raises(InvalidArgument, match="there is no directory"):
        write(tmp_path / "missing" / "weights.npz", [])
    assert list(tmp_path.iterdir()) == []
    write(file.with_suffix(".npz"), [make_leaf("file", wide), make_leaf("x/y", wide)], wide)
    with np.load(file.with_suffix(".npz")) as archive:
        assert [*archive] == ["file", "x/y"]


def test_a_failed_write_leaves_the_existing_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, array = tmp_path / "weights.npz", np.zeros(2)
    write(file, [make_leaf("w", array)], array)
    before = file.read_bytes()

    def fail(*arguments: Any, **options: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np.lib.format, "write_array", fail)
    with pytest.raises(OSError, match="No space left"):
        write(file, [make_leaf("w", array)], array, force=True)
    assert file.read_bytes() == before
    assert list(tmp_path.iterdir()) == [file]


def test_a_missing_safetensors_is_reported_with_the_command_that_installs_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"pip install 'rlbroker\[safetensors\]'"):
        write(tmp_path / "weights.safetensors", [])
