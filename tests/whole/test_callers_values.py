"""What callers pass: a URL in any place shows no password, numbers of numpy are taken, and no wait is without end."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fakeredis
import numpy as np
import pytest
import redis
from secrets_in_errors import SECRET, texts
from typer.testing import CliRunner

from rlbroker import (
    InvalidArgument,
    RlbrokerError,
    SamplesPerInsert,
    UnsupportedType,
    WorkerClient,
    WorkerCommunicator,
)
from rlbroker.ops.cli.app import app

URL = f"redis://me:{SECRET}@host/0"

#: A URL in the forms in which it may be given by mistake.
MISPLACED: list[Any] = [
    URL,
    URL.encode(),
    Path(URL),
    [URL],
    {"url": URL},
    redis.Redis.from_url(URL),
    f"redis://host?password={SECRET}",
]
NAMES = ["text", "bytes", "path", "list", "dictionary", "client", "query"]

LEARNER_SETTINGS = [
    "num_workers", "max_queue_size", "timeout", "redis_url", "run", "redis_client", "acknowledge", "when_full",
    "max_queue_bytes", "max_staleness", "max_deliveries", "samples_per_insert", "learner_name", "take_over_seconds",
    "lease_seconds", "forget_seconds", "host_cache", "signing_key", "shards",
]  # fmt: skip
WORKER_SETTINGS = [
    "redis_url", "run", "worker_id", "redis_client", "timeout", "when_full", "level", "host_cache", "signing_key",
]  # fmt: skip

#: Calls of a learner, of which one argument is wrong.
LEARNER_CALLS: dict[str, Callable[[WorkerCommunicator, Any], Any]] = {
    "weights": lambda comm, value: comm.send_model_weights(value),
    "a weight": lambda comm, value: comm.send_model_weights({value: object()} if hashable(value) else value),
    "dtype": lambda comm, value: comm.send_model_weights({"w": np.zeros(3, np.float32)}, dtype=value),
    "collect timeout": lambda comm, value: comm.collect_experiences(timeout=value),
    "round version": lambda comm, value: comm.collect_round(version=value),
    "round workers": lambda comm, value: comm.collect_round(workers=value),
    "per_worker": lambda comm, value: comm.collect_round(per_worker=value),
    "round timeout": lambda comm, value: comm.collect_round(timeout=value),
    "max_batches": lambda comm, value: comm.collect_experiences(max_batches=value),
    "acknowledge": lambda comm, value: comm.acknowledge(value),
    "marks": lambda comm, value: comm.restore(value),
    "a run's marks": lambda comm, value: comm.restore({**comm.marks(), "run": value}),
    "a mark": lambda comm, value: comm.restore({**comm.marks(), "version": value}),
    "marked batches": lambda comm, value: comm.restore({**comm.marks(), "batches": value}),
    "may_sample": lambda comm, value: comm.may_sample(value),
    "dead_letters": lambda comm, value: comm.dead_letters(value),
    "retry": lambda comm, value: comm.retry_dead_letters(value),
    "purge": lambda comm, value: comm.purge_dead_letters(value),
    "command": lambda comm, value: comm.send_control_command(
        value if not isinstance(value, str) else value * 90
    ),
    "command data": lambda comm, value: comm.send_control_command(
        "x", {"a": {value: object()}} if hashable(value) else object()
    ),
    "worker_ids": lambda comm, value: comm.send_control_command("x", worker_ids=value),
    "a worker id": lambda comm, value: comm.send_control_command("x", worker_ids=[value]),
    "expires": lambda comm, value: comm.send_control_command("x", expires=value),
    "wait": lambda comm, value: comm.send_control_command("x").wait(timeout=value),
    "applied timeout": lambda comm, value: comm.send_model_weights({}).wait_applied(timeout=value),
    "applied ids": lambda comm, value: comm.send_model_weights({}).wait_applied(timeout=0, worker_ids=value),
    "an applied id": lambda comm, value: comm.send_model_weights({}).wait_applied(
        timeout=0, worker_ids=[value]
    ),
    "writer": lambda comm, value: comm.log_to(value),
    "step": lambda comm, value: comm.log_to(Writer(), step=value),
    "every_seconds": lambda comm, value: comm.log_to(Writer(), every_seconds=value),
}

WORKER_CALLS: dict[str, Callable[[WorkerClient, Any], Any]] = {
    "model": lambda worker, value: worker.load_weights(value, timeout=0.1),
    "load timeout": lambda worker, value: worker.load_weights({}, timeout=value),
    "waiting model": lambda worker, value: worker.wait_for_weights(value, timeout=0.1),
    "newer_than": lambda worker, value: worker.wait_for_weights({}, 0.1, newer_than=value),
    "wait timeout": lambda worker, value: worker.wait_for_weights({}, timeout=value),
    "take timeout": lambda worker, value: worker.take_weights(value),
    "poll": lambda worker, value: worker.poll(value),
    "batch": lambda worker, value: worker.send_experiences(value),
    "a value of a batch": lambda worker, value: worker.send_experiences(
        {value: object()} if hashable(value) else value
    ),
    "send timeout": lambda worker, value: worker.send_experiences({"x": 1}, timeout=value),
    "flush": lambda worker, value: worker.flush(value),
    "handler": lambda worker, value: worker.on_command(value if hashable(value) else "x", "no handler"),  # type: ignore[arg-type]
    "signal": lambda worker, value: worker.drain_on(value),
}


class Writer:
    def add_scalar(self, tag: str, value: float, step: int) -> None:
        pass


def hashable(value: Any) -> bool:
    return isinstance(value, str | bytes | Path)


def misplaced(setting: str, value: Any) -> dict[str, Any]:
    """Return the settings of a client, one of which has a value that does not belong there."""
    if setting in ("redis_url", "redis_client") and not isinstance(value, bytes | Path | list | dict):
        pytest.skip("this is a URL or a client")
    settings = {"redis_client": fakeredis.FakeRedis(), setting: value}
    if setting == "redis_url":
        del settings["redis_client"]
    return settings


def assert_hides(call: Callable[[], Any], caplog: pytest.LogCaptureFixture) -> None:
    """Check that a call raises nothing but errors of rlbroker, and that nothing shows the password."""
    try:
        shown = repr(call())
    except RlbrokerError as error:
        shown = texts(error)
    assert SECRET not in shown
    assert SECRET not in caplog.text


@pytest.mark.parametrize("value", MISPLACED, ids=NAMES)
@pytest.mark.parametrize("setting", LEARNER_SETTINGS)
def test_no_setting_of_a_learner_shows_a_password(
    setting: str,
    value: Any,
    caplog: pytest.LogCaptureFixture,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    settings = {"num_workers": 1, **misplaced(setting, value)}

    def call() -> None:
        WorkerCommunicator(**settings).cleanup()

    assert_hides(call, caplog)


@pytest.mark.parametrize("value", MISPLACED, ids=NAMES)
@pytest.mark.parametrize("setting", WORKER_SETTINGS)
def test_no_setting_of_a_worker_shows_a_password(
    setting: str,
    value: Any,
    caplog: pytest.LogCaptureFixture,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    settings = misplaced(setting, value)

    def call() -> None:
        WorkerClient(**settings).close()

    assert_hides(call, caplog)


@pytest.fixture(scope="module")
def clients() -> Any:
    client = fakeredis.FakeRedis()
    with (
        WorkerCommunicator(1, redis_client=client, timeout=2.0) as comm,
        WorkerClient(redis_client=client, worker_id=0, timeout=2.0) as worker,
    ):
        yield comm, worker


@pytest.mark.parametrize("value", MISPLACED, ids=NAMES)
@pytest.mark.parametrize("call", LEARNER_CALLS)
def test_no_call_of_a_learner_shows_a_password(
    call: str, value: Any, clients: Any, caplog: pytest.LogCaptureFixture
) -> None:
    assert_hides(lambda: LEARNER_CALLS[call](clients[0], value), caplog)


@pytest.mark.parametrize("value", MISPLACED, ids=NAMES)
@pytest.mark.parametrize("call", WORKER_CALLS)
def test_no_call_of_a_worker_shows_a_password(
    call: str, value: Any, clients: Any, caplog: pytest.LogCaptureFixture
) -> None:
    assert_hides(lambda: WORKER_CALLS[call](clients[1], value), caplog)


@pytest.mark.parametrize(
    "variable",
    [
        "RLBROKER_RUN", "RLBROKER_REDIS_PASSWORD_FILE", "RLBROKER_TLS_CA_FILE", "RLBROKER_TLS_CERTIFICATE_FILE",
        "RLBROKER_TLS_KEY_FILE", "RLBROKER_SIGNING_KEY_FILE", "RLBROKER_HOST_CACHE",
    ],
)  # fmt: skip
def test_no_variable_shows_a_password(variable: str, tmp_path: Path) -> None:
    environ = {**os.environ, variable: URL, "RLBROKER_REDIS_URL": "rediss://127.0.0.1:1"}
    code = "import rlbroker; rlbroker.WorkerClient(timeout=0.2)"
    for command in (
        ["-c", code],
        ["-m", "rlbroker", "status", "--timeout", "0.2"],
        ["-m", "rlbroker", "status", "-vv"],
    ):
        done = subprocess.run(
            [sys.executable, *command],
            env=environ,
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert SECRET not in done.stdout + done.stderr, done.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ["status", "--timeout", URL], ["status", "--run", URL], ["status", "--watch", URL], ["status", URL], [URL],
        ["status", f"--{URL}"], [f"--url={URL}", "status"], ["top", "--sort", URL], ["top", "--interval", URL],
        ["missed", "--worker", URL], ["control", "send", URL, "--url", "redis://127.0.0.1:1"], ["control", URL],
        ["dead", "show", URL], ["report", "--since", URL], ["prune", "--older-than", URL], ["acl", "--workers", URL],
        ["acl", "--server-version", URL], ["exporter", "--port", URL], ["bench", "--workers", URL],
        ["check", "--max-missed", URL],
        ["weights", "export", URL, "--url", "redis://127.0.0.1:1"], ["server", "--port", URL], ["doctor", "--run", URL],
    ],
    ids=lambda one: " ".join(one).replace(URL, "URL"),
)  # fmt: skip
def test_no_command_shows_a_password(arguments: list[str]) -> None:
    found = CliRunner().invoke(app, arguments)
    assert found.exit_code not in (0, 70), found.output
    assert SECRET not in found.output
    if not isinstance(found.exception, SystemExit):  # nothing but the output of a command that ended is seen
        assert isinstance(found.exception, RlbrokerError)
        assert SECRET not in texts(found.exception)


NOT_WHOLE = [True, np.True_, 1.5, np.float64(1), math.nan, -1, np.int64(-1), "1", None, 10**5000, [1]]
NO_SECONDS = [
    True,
    np.True_,
    math.nan,
    math.inf,
    np.float32("inf"),
    -1,
    np.float64(-0.1),
    "1",
    10**5000,
    -(10**5000),
    1j,
]


def test_numbers_of_numpy_are_numbers(tmp_path: Path) -> None:
    number: Any = np  # whose numbers are not those of the annotations
    client = fakeredis.FakeRedis()
    with (
        WorkerCommunicator(
            number.int64(4),
            number.int32(7),
            number.float32(3),
            redis_client=client,
            max_queue_bytes=number.uint64(1 << 20),
            max_staleness=number.int8(5),
            max_deliveries=number.int16(5),
            lease_seconds=number.float64(2.5),
            forget_seconds=number.int64(30),
            take_over_seconds=number.float16(20),
            samples_per_insert=SamplesPerInsert(number.float32(2), number.int64(1), number.float64(1000)),
            host_cache=str(tmp_path),
        ) as comm,
        WorkerClient(redis_client=client, worker_id=number.int64(3), timeout=number.float32(3)) as worker,
    ):
        assert worker.worker_id == 3
        assert type(worker.worker_id) is int
        receipt = comm.send_model_weights({"w": np.zeros(3)})
        worker.load_weights({}, timeout=number.float32(5))
        assert worker.wait_for_weights({}, number.float32(5), newer_than=number.int64(0))
        assert worker.take_weights(number.float32(0)) is None
        assert receipt.wait_applied(number.float32(5), worker_ids=number.array([3]))[3]
        worker.send_experiences({"x": np.zeros(3)}, timeout=number.float32(1))
        assert len(comm.collect_experiences(timeout=number.float32(3), max_batches=number.int64(1))) == 1
        assert comm.may_sample(number.int64(1))
        assert comm.dead_letters(number.int64(3)) == []
        command = comm.send_control_command("reset", worker_ids=[number.int64(3)], expires=number.float32(60))
        assert command.worker_ids == (3,)
        assert comm.send_control_command("reset", worker_ids=number.array([3])).worker_ids == (3,)
        assert command.wait(timeout=number.float32(0))[3].state == "waiting"
        assert worker.flush(number.float32(1)) == 0
        assert comm.get_queue_info()["counts"][3].produced == 1


@pytest.mark.parametrize(
    "value",
    NOT_WHOLE,
    ids=lambda value: (
        f"{type(value).__name__}-{str(value)[:9]}"
        if not isinstance(value, int) or abs(value) < 99
        else "huge"
    ),
)
@pytest.mark.parametrize(
    "setting", ["num_workers", "max_queue_size", "max_queue_bytes", "max_deliveries", "shards"]
)
def test_what_is_no_whole_number_is_refused(setting: str, value: Any) -> None:
    if value is None and setting in ("max_deliveries", "shards"):
        return
    with pytest.raises(InvalidArgument, match=f"{setting} must be an integer of at least 1"):
        WorkerCommunicator(**{"num_workers": 1, "redis_client": fakeredis.FakeRedis(), setting: value})


@pytest.mark.parametrize(
    "value",
    NO_SECONDS,
    ids=lambda value: (
        f"{type(value).__name__}-{str(value)[:9]}"
        if not isinstance(value, int) or abs(value) < 99
        else "huge"
    ),
)
def test_what_is_no_number_of_seconds_is_refused(value: Any, clients: Any) -> None:
    comm, worker = clients
    calls: list[Callable[[], Any]] = [
        lambda: WorkerCommunicator(1, redis_client=fakeredis.FakeRedis(), timeout=value),
        lambda: WorkerCommunicator(1, redis_client=fakeredis.FakeRedis(), lease_seconds=value),
        lambda: WorkerClient(redis_client=fakeredis.FakeRedis(), timeout=value),
        lambda: comm.collect_experiences(timeout=value),
        lambda: value is None or comm.collect_round(timeout=value),
        lambda: comm.send_control_command("reset", expires=value),
        lambda: comm.send_control_command("reset").wait(timeout=value),
        lambda: comm.log_to(Writer(), every_seconds=value),
        lambda: comm.send_model_weights({}).wait_applied(timeout=value),
        lambda: worker.load_weights({}, timeout=value),
        lambda: worker.wait_for_weights({}, timeout=value),
        lambda: worker.take_weights(timeout=value),
        lambda: worker.send_experiences({"x": 1}, timeout=value),
        lambda: worker.flush(value),
    ]
    for call in calls:
        with pytest.raises(InvalidArgument, match="must be a number of seconds"):
            call()


def test_a_wait_without_end_is_refused_with_what_to_do(clients: Any) -> None:
    comm, worker = clients
    calls: list[Callable[[], Any]] = [
        lambda: comm.collect_experiences(timeout=None),
        lambda: worker.load_weights({}, timeout=None),
        lambda: WorkerClient(redis_client=fakeredis.FakeRedis(), timeout=None),  # type: ignore[arg-type]
        lambda: WorkerCommunicator(1, timeout=None),  # type: ignore[arg-type]
    ]
    for call in calls:
        with pytest.raises(
            InvalidArgument, match="every wait has a deadline: to wait long, give a large number"
        ):
            call()


def test_a_handler_that_is_none_is_refused(clients: Any) -> None:
    with pytest.raises(UnsupportedType):
        clients[1].on_command("x", None)
