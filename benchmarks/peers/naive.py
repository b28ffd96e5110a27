"""A simple use of Redis: SET the pickled weights, PUBLISH a notice, and GET the key in each worker."""

from __future__ import annotations

import pickle
from collections.abc import Callable

import redis
import torch

from benchmarks.models import State, load_arrays, to_arrays


class NaiveSender:
    """Sends weights with SET and PUBLISH."""

    def __init__(self, url: str, key: str) -> None:
        self._client, self._key = redis.Redis.from_url(url, socket_timeout=60.0), key

    def send(self, weights: State) -> None:
        self._client.set(self._key, pickle.dumps(to_arrays(weights), protocol=5))
        self._client.publish(self._key, "new")


class NaiveReceiver:
    """Waits for the notice, and gets the weights with GET."""

    def __init__(self, url: str, key: str, number: int) -> None:
        self._client, self._key = redis.Redis.from_url(url, socket_timeout=60.0), key
        make_pubsub: Callable[..., redis.client.PubSub] = self._client.pubsub
        self._notices = make_pubsub(ignore_subscribe_messages=True)
        self._notices.subscribe(key)
        self._notices.get_message(timeout=5.0)  # the confirmation of the subscription

    def receive(self, model: torch.nn.Module) -> None:
        while self._notices.get_message(timeout=30.0) is None:
            pass
        stored = self._client.get(self._key)
        assert isinstance(stored, bytes)
        load_arrays(model, pickle.loads(stored))

    def close(self) -> None:
        self._notices.close()
        self._client.close()
