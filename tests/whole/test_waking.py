"""A worker's threads sleep until there is something to do, and do it at once: here nothing else wakes them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from conftest import Reachable, wait_until

import rlbroker.control.inbox
import rlbroker.weights.subscriber
from rlbroker import WorkerClient, WorkerCommunicator
from rlbroker.backend.channel import Channel
from rlbroker.backend.deadline import Deadline
from rlbroker.errors import ConnectionFailed

Learner = Callable[..., WorkerCommunicator]
Worker = Callable[..., WorkerClient]

HOURS = 36_000.0


@pytest.fixture
def comm(learner: Learner) -> WorkerCommunicator:
    return learner()


@pytest.fixture
def sleeper(
    reachable: Reachable, comm: WorkerCommunicator, worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> WorkerClient:
    """Give a worker that looks for nothing by itself for hours; that takes a socket, which a fake has not."""
    monkeypatch.setattr(rlbroker.control.inbox, "READ_SECONDS", HOURS)
    monkeypatch.setattr(rlbroker.weights.subscriber, "LOOK_SECONDS", HOURS)
    monkeypatch.setattr(rlbroker.weights.subscriber, "PING_SECONDS", HOURS)
    client = worker()
    client._connection.timeout_seconds = client._connection.socket_seconds = HOURS
    inbox = client._inbox
    wait_until("it sleeps", lambda: inbox._answer_due is not None and inbox._answer_due.remaining > 1000)
    return client


def test_a_version_whose_message_was_lost_is_heard_of_in_the_control_stream(
    comm: WorkerCommunicator, sleeper: WorkerClient
) -> None:
    pubsub: Any = sleeper._subscriber._pubsub
    pubsub.unsubscribe()
    wait_until("it hears no messages", lambda: not pubsub.subscribed)
    comm.send_model_weights({"w": np.zeros(1)})
    wait_until("it runs the version", lambda: sleeper.poll({}))


def test_what_is_asked_for_anew_is_fetched_at_once(comm: WorkerCommunicator, sleeper: WorkerClient) -> None:
    comm.send_model_weights({"w": np.zeros(1)})
    wait_until("it runs the version", lambda: sleeper.poll({}))
    assert sleeper.load_weights({}) == 1


def test_an_answer_that_could_not_be_sent_is_sent_as_soon_as_that_works(
    sleeper: WorkerClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    inbox = sleeper._inbox
    store, fails = inbox._store, [True]

    def failing(answer: Any) -> None:
        if fails.pop():
            fails.append(False)
            raise ConnectionFailed("the connection broke")
        fails.append(False)
        store(answer)

    monkeypatch.setattr(inbox, "_store", failing)
    inbox.acknowledge_version(0, 1, "failed", "for a test")
    assert fails == [False]
    wait_until("it is sent", lambda: not inbox._unsent)


def test_an_answer_that_comes_while_another_thread_is_sending_is_sent_too(
    sleeper: WorkerClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever is sending may just have looked for the last time."""
    inbox = sleeper._inbox
    release = inbox._sending.release
    late = [inbox]

    class Sending:
        """The lock, shortly before whose release there is one more answer."""

        def acquire(self, *, blocking: bool) -> bool:
            return lock.acquire(blocking=blocking)

        def release(self) -> None:
            if late:
                other = threading.Thread(target=late.pop().acknowledge_version, args=(1, 2, "failed"))
                other.start()
                other.join()
            release()

    lock = inbox._sending
    monkeypatch.setattr(inbox, "_sending", Sending())
    inbox.acknowledge_version(0, 1, "failed")
    assert not late
    assert not inbox._unsent


def test_what_the_server_may_have_lost_is_looked_after_at_once(sleeper: WorkerClient) -> None:
    sleeper._inbox.mark_stale()
    wait_until("it has looked", lambda: not sleeper._inbox._doubt)


def test_a_worker_ends_without_anything_to_wake_it(sleeper: WorkerClient) -> None:
    sleeper.close()
    assert not any(
        part._thread._thread.is_alive() for part in (sleeper._heartbeat, sleeper._inbox, sleeper._subscriber)
    )


def test_a_subscription_that_gives_no_answer_is_made_anew(
    learner: Learner, worker: Worker, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    learner()
    monkeypatch.setattr(rlbroker.weights.subscriber, "PING_SECONDS", 0.1)
    subscriber = worker()._subscriber
    silent: Any = wait_until("it has subscribed", lambda: subscriber._pubsub)
    monkeypatch.setattr(silent, "get_message", lambda timeout: None)
    wait_until("there is another", lambda: subscriber._pubsub not in (None, silent))
    assert "gives no answer" in caplog.text


def test_a_subscription_is_not_given_up_because_its_thread_had_no_time(
    learner: Learner, worker: Worker
) -> None:
    """A thousand workers on few cores had all their subscriptions made anew, which took what was left of them."""
    learner()
    subscriber = worker()._subscriber
    pubsub: Any = wait_until("it has subscribed", lambda: subscriber._pubsub)
    assert subscriber._thread.stop(5.0)
    pubsub.ping()
    wait_until("the answer is there", lambda: pubsub.connection.can_read(0))
    subscriber._next_ping, subscriber._answered = Deadline(0), False
    subscriber._hear()
    assert subscriber._answered


def test_a_heartbeat_is_one_round_trip(
    learner: Learner, worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    learner()
    heartbeat = worker()._heartbeat
    heartbeat._thread.stop(5.0)
    sent: list[int] = []
    send = Channel.send

    def noted(self: Channel, commands: Sequence[Any]) -> None:
        if self is heartbeat._channel:
            sent.append(len(commands))
        send(self, commands)

    monkeypatch.setattr(Channel, "send", noted)
    heartbeat._beat()
    assert sent == [1]


def test_small_weights_are_decoded_by_the_thread_that_fetches_them(learner: Learner, worker: Worker) -> None:
    comm, client = learner(), worker(host_cache=False)
    pool = client._subscriber._fetcher._pool
    comm.send_model_weights({"w": np.zeros(1000)})
    assert client.load_weights({}) == 1
    assert not pool._threads
    comm.send_model_weights({"w": np.zeros(1_000_000)})
    wait_until("it runs large ones", lambda: client.poll({}))
    assert pool._threads
