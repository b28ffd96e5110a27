"""Ray: `put` once, and as many actors get it from the machine's object store into their models."""

from __future__ import annotations

import contextlib
import importlib.util
import time
from collections.abc import Iterator
from typing import Any

from benchmarks.models import State, arrays, load_arrays, make_model, probe

#: What a row says where Ray is missing.
MISSING = "Ray is not installed: pip install '.[bench]'"


def installed() -> bool:
    return importlib.util.find_spec("ray") is not None


class RayCrew:
    """Actors that each hold a model."""

    def __init__(self, ray: Any, size: int, model_bytes: int) -> None:
        self._ray = ray
        remote = ray.remote(num_cpus=0)(_Actor)
        self._actors = [remote.remote(model_bytes) for _ in range(size)]
        ray.get([actor.probe.remote() for actor in self._actors])

    def deliver(self, weights: State) -> float:
        """Send weights; give the seconds until the last actor has them in its model."""
        began = time.perf_counter()
        reference = self._ray.put(arrays(weights))
        self._ray.get([actor.load.remote(reference) for actor in self._actors])
        seconds = time.perf_counter() - began
        found = self._ray.get([actor.probe.remote() for actor in self._actors])
        assert all(tuple(one) == probe(weights) for one in found), "Ray: an actor has other weights"
        return seconds


class _Actor:
    def __init__(self, model_bytes: int) -> None:
        self._model = make_model(model_bytes)

    def load(self, received: Any) -> None:
        import warnings

        # The store's memory is read-only, and torch warns about that; it is only read here.
        warnings.simplefilter("ignore")
        load_arrays(self._model, received)

    def probe(self) -> tuple[float, ...]:
        return probe(self._model.state_dict())


@contextlib.contextmanager
def ray_crew(size: int, model_bytes: int) -> Iterator[RayCrew | None]:
    """Give a crew of actors, and end all of Ray's processes with the block; None where Ray is not installed."""
    if not installed():
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
        yield RayCrew(ray, size, model_bytes)
    finally:
        ray.shutdown()
