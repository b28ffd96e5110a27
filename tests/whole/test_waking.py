"""A worker's threads sleep until there is something to do, and then do it at once, without waiting for a timeout."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from conftest import Reachable, wait_until

import rlbroker.control.control_reader
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
    """A worker whose threads poll nothing for hours. They sleep on a socket, which fakeredis does not have."""
    monkeypatch.setattr(rlbroker.control.control_reader, "READ_SECONDS", HOURS)
    monkeypatch.setattr(rlbroker.weights.subscriber, "POLL_SECONDS", HOURS)
    monkeypatch.setattr(rlbroker.weights.version_channel, "PING_SECONDS", HOURS)
    client = worker()
    client._connection.timeout_seconds = client._connection.socket_seconds = HOURS
    reader = client._inbox._reader
    wait_until("it sleeps", lambda: reader.reply_due is not None and reader.reply_due.remaining > 1000)
    return client


def test_a_version_whose_notification_was_lost_is_noticed_on_the_control_stream(
    comm: WorkerCommunicator, sleeper: WorkerClient
) -> None:
    subscriber = sleeper._subscriber
    pubsub: Any = subscriber._channel._pubsub
    # The thread must have read the confirmation of the subscription before: it would sleep on the next one otherwise.
    subscriber._channel._answered = False
    wait_until("the subscription is confirmed", lambda: pubsub.ping() or subscriber._channel._answered)
    pubsub.unsubscribe()
    wait_until("it receives no notifications", lambda: not pubsub.subscribed)
    comm.send_model_weights({"w": np.zeros(1)})
    wait_until("it has applied the version", lambda: sleeper.poll({}))


def test_a_version_that_is_loaded_again_is_fetched_at_once(
    comm: WorkerCommunicator, sleeper: WorkerClient
) -> None:
    comm.send_model_weights({"w": np.zeros(1)})
    wait_until("it has applied the version", lambda: sleeper.poll({}))
    assert sleeper.load_weights({}) == 1


def test_an_acknowledgement_that_could_not_be_sent_is_retried_at_once(
    sleeper: WorkerClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    inbox = sleeper._inbox
    acknowledgements = inbox.acknowledgements
    store, fails = acknowledgements._store, [True]

    def failing(*answer: Any) -> None:
        if fails.pop():
            fails.append(False)
            raise ConnectionFailed("the connection broke")
        fails.append(False)
        store(*answer)

    monkeypatch.setattr(acknowledgements, "_store", failing)
    inbox.acknowledge_version(0, 1, "failed", "for a test")
    assert fails == [False]
    wait_until("the acknowledgement is sent", lambda: not inbox.acknowledgements.unsent)


def test_an_acknowledgement_added_while_another_thread_sends_is_sent_too(
    sleeper: WorkerClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The sending thread may just have checked for the last time whether there are more."""
    inbox = sleeper._inbox
    acknowledgements = inbox.acknowledgements
    run_within, late = acknowledgements._sending.run_within, [inbox]

    def run_until_one_is_added(seconds: float, call: Callable[[], Any]) -> Any:
        """Run with the lock; before its release another thread adds an acknowledgement."""

        def call_and_add() -> Any:
            result = call()
            if late:
                other = threading.Thread(target=late.pop().acknowledge_version, args=(1, 2, "failed"))
                other.start()
                other.join()
            return result

        return run_within(seconds, call_and_add)

    monkeypatch.setattr(acknowledgements._sending, "run_within", run_until_one_is_added)
    inbox.acknowledge_version(0, 1, "failed")
    assert not late
    assert not inbox.acknowledgements.unsent


def test_acknowledgements_that_the_server_may_have_lost_are_checked_at_once(sleeper: WorkerClient) -> None:
    sleeper._inbox.mark_stale()
    wait_until("they are checked", lambda: not sleeper._inbox.acknowledgements.stale)


def test_closing_wakes_the_sleeping_threads(sleeper: WorkerClient) -> None:
    sleeper.close()
    assert not any(
        part._thread._thread.is_alive() for part in (sleeper._heartbeat, sleeper._inbox, sleeper._subscriber)
    )


def test_a_subscription_that_does_not_answer_is_replaced(
    learner: Learner, worker: Worker, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    learner()
    monkeypatch.setattr(rlbroker.weights.version_channel, "PING_SECONDS", 0.1)
    subscriber = worker()._subscriber
    silent: Any = wait_until("it has subscribed", lambda: subscriber._channel._pubsub)
    monkeypatch.setattr(silent, "get_message", lambda timeout: None)
    wait_until("there is another", lambda: subscriber._channel._pubsub not in (None, silent))
    assert "does not answer" in caplog.text


def test_a_subscription_is_kept_if_only_its_thread_was_late(learner: Learner, worker: Worker) -> None:
    """A thousand workers on few cores once replaced all their subscriptions, which overloaded the machine further."""
    learner()
    subscriber = worker()._subscriber
    pubsub: Any = wait_until("it has subscribed", lambda: subscriber._channel._pubsub)
    assert subscriber._thread.stop(5.0)
    pubsub.ping()
    wait_until("the answer is there", lambda: pubsub.connection.can_read(0))
    channel = subscriber._channel
    channel._next_ping, channel._answered = Deadline(0), False
    channel.wait(Deadline(0), subscriber._thread)
    assert channel._answered


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


def test_small_weights_are_decoded_without_a_thread_pool(learner: Learner, worker: Worker) -> None:
    comm, client = learner(), worker(host_cache=False)
    pool = client._subscriber._downloader._pool
    comm.send_model_weights({"w": np.zeros(1000)})
    assert client.load_weights({}) == 1
    assert not pool._threads
    comm.send_model_weights({"w": np.zeros(1_000_000)})
    wait_until("it has applied large ones", lambda: client.poll({}))
    assert pool._threads
