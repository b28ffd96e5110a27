"""Mistakes and faults that happen in practice: each raises a clear, typed error, and leaves nothing half done."""

from __future__ import annotations

import multiprocessing
import os
import threading
import time
from collections.abc import Callable
from typing import Any

import fakeredis
import pytest
import redis
from conftest import RealServer, Server, wait_until

from rlbroker import WorkerClient, WorkerCommunicator, errors
from rlbroker.backend.connection import Connection
from rlbroker.backend.keys import Keys
from rlbroker.local import RedisServer
from rlbroker.types import Batch

Learner = Callable[..., WorkerCommunicator]
Worker = Callable[..., WorkerClient]


@pytest.mark.parametrize("number", [0, -1, True, 2.5, "4"])
def test_the_number_of_workers_is_a_positive_integer(number: Any) -> None:
    with pytest.raises(errors.InvalidArgument, match="num_workers must be an integer of at least 1"):
        WorkerCommunicator(number, redis_client=fakeredis.FakeRedis())


@pytest.mark.parametrize(
    "settings",
    [
        {"max_queue_size": 0},
        {"timeout": 0},
        {"timeout": float("inf")},
        {"run": ""},
        {"run": "a{b}"},
        {"acknowledge": "later"},
        {"when_full": "explode"},
        {"max_queue_bytes": -1},
        {"max_staleness": -1},
        {"lease_seconds": 0},
        {"lease_seconds": 0.01},
        {"take_over_seconds": 0.1},
        {"lease_seconds": 10, "forget_seconds": 1},
        {"forget_seconds": float("inf")},
        {"timeout": 1e12},
        {"max_staleness": "x"},
    ],
    ids=str,
)
def test_settings_that_cannot_work_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(errors.InvalidArgument):
        WorkerCommunicator(2, redis_client=fakeredis.FakeRedis(), **settings)


@pytest.mark.parametrize("worker_id", [-1, 70_000, "3", 1.0])
def test_worker_ids_are_small_integers(worker_id: Any) -> None:
    with pytest.raises(errors.InvalidArgument, match="worker_id must be an integer from 0 to 65535"):
        WorkerClient(worker_id=worker_id, redis_client=fakeredis.FakeRedis())


@pytest.mark.parametrize("url", ["http://localhost", "localhost:6379", "redi://x"])
def test_an_unknown_url_scheme_names_the_valid_ones(url: str) -> None:
    with pytest.raises(errors.InvalidArgument, match="redis://, rediss://, unix://"):
        WorkerClient(url)


def test_an_error_at_the_default_url_says_that_it_is_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RLBROKER_REDIS_URL", "REDIS_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("rlbroker.config.DEFAULT_URL", "redis://127.0.0.1:1/0")
    monkeypatch.setattr("rlbroker.backend.client.DEFAULT_URL", "redis://127.0.0.1:1/0")
    with pytest.raises(
        errors.ConnectionFailed, match=r"default: start `rlbroker server`.*RLBROKER_REDIS_URL"
    ):
        WorkerClient(timeout=0.5)
    with pytest.raises(errors.ConnectionFailed) as caught:
        WorkerClient("redis://127.0.0.1:1", timeout=0.5)
    assert "default" not in str(caught.value)


def test_a_worker_id_in_place_of_the_url_is_refused() -> None:
    with pytest.raises(errors.InvalidArgument, match="redis_url must be text"):
        WorkerClient(0)  # type: ignore[arg-type]


def test_a_url_in_place_of_a_number_does_not_leak_its_password() -> None:
    with pytest.raises(errors.InvalidArgument, match="num_workers") as caught:
        WorkerCommunicator("redis://:hunter2@host")  # type: ignore[arg-type]
    assert "hunter2" not in str(caught.value)


def test_url_and_client_exclude_each_other() -> None:
    with pytest.raises(errors.InvalidArgument, match="not both"):
        WorkerClient("redis://localhost", redis_client=fakeredis.FakeRedis())


def test_a_client_that_decodes_is_refused() -> None:
    with pytest.raises(errors.InvalidArgument, match="must not decode"):
        WorkerClient(redis_client=fakeredis.FakeRedis(decode_responses=True))
    with pytest.raises(
        errors.InvalidArgument, match="a parameter 'decode_responses' that rlbroker does not know"
    ):
        WorkerClient("redis://localhost?decode_responses=True")


def test_a_client_with_too_few_connections_is_refused() -> None:
    pool = redis.ConnectionPool(max_connections=2)
    with pytest.raises(errors.InvalidArgument, match="holds 2 connections; 6 are needed"):
        WorkerClient(redis_client=redis.Redis(connection_pool=pool))


def test_a_url_in_place_of_a_client_is_refused() -> None:
    with pytest.raises(
        errors.InvalidArgument, match=r"must be a redis\.Redis or a redis\.RedisCluster; got str"
    ):
        WorkerClient(redis_client="redis://localhost")  # type: ignore[arg-type]


def test_an_unreachable_server_is_named_without_its_password_within_the_timeout() -> None:
    began = time.monotonic()
    with pytest.raises(errors.ConnectionFailed, match=r"redis://127\.0\.0\.1:1/0") as caught:
        WorkerCommunicator(2, redis_url="redis://me:hunter2@127.0.0.1:1/0", timeout=0.5)
    assert time.monotonic() - began < 5.0
    assert "hunter2" not in str(caught.value)
    assert isinstance(caught.value, ConnectionError)
    assert isinstance(caught.value.__cause__, redis.ConnectionError)


def test_a_wrong_password_is_refused_at_once(real_server: RealServer) -> None:
    url = real_server.url.replace(":", ":x", 2).replace(":x//", "://")
    with pytest.raises(errors.AccessDenied):
        WorkerClient(url, timeout=5.0)


def test_a_server_that_is_too_old_is_refused() -> None:
    with pytest.raises(errors.ServerUnsuitable, match=r"runs Redis 5\.0\.7; rlbroker needs 6\.2 or newer"):
        WorkerCommunicator(2, redis_client=_FakeServer(redis_version="5.0.7"))


def test_a_server_that_evicts_keys_is_refused_unless_allowed(real_server: RealServer, run: str) -> None:
    real_server.client.config_set("maxmemory-policy", "allkeys-lru")
    try:
        with pytest.raises(errors.ServerUnsuitable, match=r"allkeys-lru.*maxmemory-policy to noeviction"):
            WorkerCommunicator(2, redis_url=real_server.url, run=run)
        WorkerCommunicator(2, redis_url=real_server.url, run=run, allow_eviction=True).cleanup()
    finally:
        real_server.client.config_set("maxmemory-policy", "noeviction")


def test_a_server_out_of_memory_raises_a_typed_error(real_server: RealServer, run: str) -> None:
    with WorkerCommunicator(1, redis_url=real_server.url, run=run, timeout=2.0) as comm:
        real_server.client.config_set("maxmemory", 1)
        try:
            with pytest.raises(errors.ServerOutOfMemory, match="maxmemory"):
                comm.send_model_weights({"w": b"x" * 1000})
        finally:
            real_server.client.config_set("maxmemory", 0)
        assert comm.send_model_weights({"w": b"x"}).version == 1


def test_a_learner_on_a_full_server_still_sends_heartbeats(
    real_server: RealServer, run: str, keys: Keys
) -> None:
    with WorkerCommunicator(1, redis_url=real_server.url, run=run, timeout=2.0):
        real_server.client.config_set("maxmemory", 1)
        try:
            before = real_server.client.hget(keys.meta, "learner_seen")
            wait_until(
                "a heartbeat is sent", lambda: real_server.client.hget(keys.meta, "learner_seen") != before
            )
            again = real_server.client.hget(keys.meta, "learner_seen")
            wait_until(
                "another one is sent", lambda: real_server.client.hget(keys.meta, "learner_seen") != again
            )
        finally:
            real_server.client.config_set("maxmemory", 0)


def test_a_worker_with_another_wire_format_is_refused(
    learner: Learner, worker: Worker, server: Server, keys: Keys
) -> None:
    learner()
    server.client.hset(keys.meta, "wire_format", 99)
    with pytest.raises(errors.IncompatibleFormat, match="wire format 99, this process 1"):
        worker()
    with pytest.raises(errors.IncompatibleFormat, match="written with wire format 99"):
        learner()


def test_a_worker_with_another_wire_format_does_not_fence_the_worker_of_its_id(
    learner: Learner, worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    comm, client = learner(), worker(worker_id=0)
    with monkeypatch.context() as patch:
        patch.setattr("rlbroker.worker.parts.FORMAT_VERSION", 99)
        for worker_id in (0, None):
            with pytest.raises(errors.IncompatibleFormat):
                worker(worker_id)
    client.send_experiences({"x": 1})
    assert [info.worker_id for info in comm.workers()] == [0]


def test_learner_and_worker_survive_a_server_that_is_full_for_a_while(
    real_server: RealServer, run: str
) -> None:
    """Commands that need memory are refused. Reading and acknowledging are not, and free some."""
    with (
        WorkerCommunicator(1, redis_url=real_server.url, run=run, lease_seconds=0.5, timeout=5.0) as comm,
        WorkerClient(real_server.url, run=run, timeout=5.0) as client,
    ):
        for number in range(5):
            client.send_experiences({"number": number, "noise": os.urandom(200_000)})
        used = int(real_server.client.info("memory")["used_memory"])
        real_server.client.config_set("maxmemory", used - 600_000)
        try:
            with pytest.raises(errors.ServerOutOfMemory):
                client.send_experiences({"number": 5}, timeout=1.5)
            assert client._sender.writer.size.waiting == 5  # the refused batch takes no room
            assert [one.state for one in comm.workers()] == ["alive"]
            with WorkerCommunicator(1, redis_url=real_server.url, run=run, timeout=5.0) as successor:
                assert len(successor.collect_experiences(timeout=5.0)) == 5
                successor.collect_experiences()
                client.send_experiences({"number": 6}, timeout=5.0)
                assert [batch["number"] for _, batch in successor.collect_experiences(timeout=5.0)] == [6]
        finally:
            real_server.client.config_set("maxmemory", 0)
        client.poll()


@pytest.mark.parametrize("batch", [[1, 2], None, "text"])
def test_a_batch_is_a_dictionary(learner: Learner, worker: Worker, batch: Any) -> None:
    learner()
    with pytest.raises(errors.UnsupportedType, match="a batch is a dictionary"):
        worker().send_experiences(batch)


@pytest.mark.parametrize("arguments", [{"max_batches": 0}, {"timeout": -1}])
def test_collecting_checks_its_arguments(learner: Learner, arguments: dict[str, Any]) -> None:
    with pytest.raises(errors.InvalidArgument):
        learner().collect_experiences(**arguments)


def test_a_closed_client_raises_closed(learner: Learner, worker: Worker) -> None:
    comm, client = learner(), worker()
    comm.cleanup()
    client.close()
    client.close()
    with pytest.raises(errors.Closed, match="WorkerCommunicator was closed"):
        comm.collect_experiences()
    with pytest.raises(errors.Closed, match="WorkerClient was closed"):
        client.poll()
    assert not client.running


def test_cleanup_ends_a_collect_in_another_thread(learner: Learner) -> None:
    comm = learner(timeout=2.0)
    ended: list[type[Exception]] = []

    def collect() -> None:
        try:
            comm.collect_experiences(timeout=60.0)
        except errors.Closed as error:
            ended.append(type(error))

    waiting = threading.Thread(target=collect)
    waiting.start()
    began = time.monotonic()
    comm.cleanup()
    waiting.join(10)
    assert ended == [errors.Closed]
    assert time.monotonic() - began < 5.0


def test_cleanup_without_a_server_returns_an_incomplete_report_in_time(run: str) -> None:
    with RedisServer() as server:
        comm = WorkerCommunicator(1, redis_url=server.url, run=run, timeout=1.0)
    began = time.monotonic()
    report = comm.cleanup()
    assert time.monotonic() - began < 3.0
    assert not report.complete
    assert not report


def test_an_error_of_fakeredis_without_lua_names_the_package_to_install() -> None:
    with pytest.raises(errors.ServerUnsuitable, match=r"fakeredis\[lua\]"):
        Connection(client=_FakeServer(no_eval=True)).execute("EVALSHA", "0" * 40, 0)


def test_a_forked_child_is_refused(real_server: RealServer, run: str) -> None:
    with WorkerCommunicator(1, redis_url=real_server.url, run=run) as comm:
        context = multiprocessing.get_context("fork")
        errors_of_child = context.SimpleQueue()

        def child() -> None:
            try:
                comm.collect_experiences()
            except errors.ForkedProcess as error:
                errors_of_child.put(str(error))

        process = context.Process(target=child)
        process.start()
        process.join(20)
        assert "made before a fork" in errors_of_child.get()
        assert process.exitcode == 0


class _FakeServer(fakeredis.FakeRedis):
    """A fake server with the INFO fields, or the lack of Lua, that a test needs."""

    def __init__(self, *, no_eval: bool = False, **facts: str) -> None:
        class FakeConnection(fakeredis.FakeRedisConnection):
            sent = b""

            def send_packed_command(self, *arguments: Any, **options: Any) -> Any:
                self.sent = bytes(arguments[0][0])
                send: Callable[..., Any] = super().send_packed_command
                return send(*arguments, **options)

            def read_response(self, *arguments: Any, **options: Any) -> Any:
                try:
                    reply = super().read_response(*arguments, **options)
                except redis.ResponseError:
                    reply = None
                if b"INFO" in self.sent:
                    return "".join(f"{name}:{value}\r\n" for name, value in facts.items()).encode()
                if b"EVALSHA" in self.sent and no_eval:
                    raise redis.ResponseError("unknown command 'evalsha'")
                return reply

        super().__init__(connection_class=FakeConnection)


@pytest.mark.parametrize(
    ("call", "error"),
    [
        (lambda comm: comm.collect_experiences(timeout=None), errors.InvalidArgument),
        (lambda comm: comm.collect_experiences(timeout="5"), errors.InvalidArgument),
        (lambda comm: comm.collect_experiences(timeout=float("nan")), errors.InvalidArgument),
        (lambda comm: comm.acknowledge(None), errors.UnsupportedType),
        (lambda comm: comm.acknowledge([1]), errors.UnsupportedType),
        (lambda comm: comm.acknowledge([{"x": 1}]), errors.UnsupportedType),
        (lambda comm: comm.acknowledge([(0, {"x": 1})]), errors.UnsupportedType),
        (lambda comm: comm.acknowledge([(0, Batch())]), errors.UnsupportedType),
        (lambda comm: comm.retry_dead_letters(["x"]), errors.UnsupportedType),
        (lambda comm: comm.retry_dead_letters(None), errors.UnsupportedType),
        (lambda comm: comm.purge_dead_letters([1]), errors.UnsupportedType),
        (lambda comm: comm.dead_letters("x"), errors.InvalidArgument),
        (lambda comm: comm.dead_letters(70_000), errors.InvalidArgument),
        (lambda comm: comm.send_control_command("reset").wait("1"), errors.InvalidArgument),
    ],
)
def test_arguments_of_the_wrong_kind_raise_usage_errors(
    learner: Learner, call: Callable[[Any], Any], error: type[Exception]
) -> None:
    comm = learner()
    with pytest.raises(error):
        call(comm)
    assert comm.collect_experiences() == []


def test_a_flush_takes_a_number_of_seconds(worker: Worker) -> None:
    with pytest.raises(errors.InvalidArgument, match="timeout must be a number of seconds"):
        worker().flush("1")  # type: ignore[arg-type] # on purpose


def test_restoring_marks_too_late_says_what_to_do(learner: Learner) -> None:
    comm = learner()
    marks = comm.marks()
    comm.collect_experiences()
    with pytest.raises(errors.InvalidArgument, match="make a new WorkerCommunicator"):
        comm.restore(marks)


def test_a_fenced_publisher_hears_of_the_setting_for_several_learners(learner: Learner) -> None:
    first = learner(learner_name="first")
    learner(learner_name="second")
    with pytest.raises(errors.Fenced, match="publishes=False"):
        first.send_model_weights({})
