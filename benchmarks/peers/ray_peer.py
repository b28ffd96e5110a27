"""Ray: one `put`, and actors that copy the weights from the machine's object store into their models."""

from __future__ import annotations

import contextlib
import importlib.util
import time
from collections.abc import Iterator
from typing import Any

from benchmarks.models import State, last_values, load_arrays, make_model, to_arrays

#: The note of a row if Ray is missing.
MISSING = "Ray is not installed: pip install '.[bench]'"


def is_installed() -> bool:
    return importlib.util.find_spec("ray") is not None


class RayActors:
    """Actors with a model each."""

    def __init__(self, ray: Any, size: int, model_bytes: int) -> None:
        self._ray = ray
        remote = ray.remote(num_cpus=0)(_Actor)
        self._actors = [remote.remote(model_bytes) for _ in range(size)]
        ray.get([actor.last_values.remote() for actor in self._actors])

    def deliver(self, weights: State) -> float:
        """Send weights; return the seconds until the last actor has them in its model."""
        started = time.perf_counter()
        reference = self._ray.put(to_arrays(weights))
        self._ray.get([actor.load.remote(reference) for actor in self._actors])
        seconds = time.perf_counter() - started
        found = self._ray.get([actor.last_values.remote() for actor in self._actors])
        assert all(tuple(values) == last_values(weights) for values in found), (
            "Ray: an actor has other weights"
        )
        return seconds


class _Actor:
    def __init__(self, model_bytes: int) -> None:
        self._model = make_model(model_bytes)

    def load(self, received: Any) -> None:
        import warnings

        # torch warns that the store's memory is read-only, but this code only reads it.
        warnings.simplefilter("ignore")
        load_arrays(self._model, received)

    def last_values(self) -> tuple[float, ...]:
        return last_values(self._model.state_dict())


@contextlib.contextmanager
def start_ray_actors(size: int, model_bytes: int) -> Iterator[RayActors | None]:
    """Start Ray and its actors, which end with the block; yield None if Ray is not installed."""
    if not is_installed():
        yield None
        return
    import logging

    import ray

    store_bytes = max(256 << 20, 8 * model_bytes)
    ray.init(
        num_cpus=2,
        include_dashboard=False,
        logging_level=logging.ERROR,
        object_store_memory=store_bytes,
        log_to_driver=False,
    )
    try:
        yield RayActors(ray, size, model_bytes)
    finally:
        ray.shutdown()
