"""Whatever is published, skipped, restarted, lost or damaged: a worker gets the bits of a version, or an error."""

from __future__ import annotations

import copy
from collections import Counter
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from conftest import RealServer, Server, spread
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

import rlbroker.weights.host_cache
import rlbroker.weights.publisher
from rlbroker.backend.connection import Connection
from rlbroker.backend.keys import Keys
from rlbroker.backend.replies import text_fields
from rlbroker.errors import WireError
from rlbroker.weights.download import DecodedVersion, Downloader
from rlbroker.weights.host_cache import ImageStore
from rlbroker.weights.manifest import MAX_DELTAS, Manifest
from rlbroker.weights.publisher import Publisher

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int8, torch.float8_e4m3fn)

Weights = dict[str, Any]


def some_weights(seed: int, dtype: torch.dtype, rows: int) -> Weights:
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(rows, 40, generator=generator)
    shared = torch.randn(rows, generator=generator)
    return {
        "w": noise.to(dtype),
        "b": shared,
        "tied": shared,
        "array": noise.numpy().copy(),
        "mask": noise > 0,
        "step": seed,
    }


def changed(weights: Weights, seed: int, part: float) -> Weights:
    """Return a copy in which some elements of each tensor have other bits."""
    chance = np.random.default_rng(seed)
    after = copy.deepcopy(weights)
    for name in ("w", "b", "array"):
        array = after[name]
        raw = array.view(torch.uint8).numpy() if isinstance(array, torch.Tensor) else array.view(np.uint8)
        flat = raw.reshape(-1)
        chosen = chance.random(flat.size) < part
        flat[chosen] ^= chance.integers(0, 4, chosen.sum(), np.uint8)
    after["step"] += 1
    return after


def bits(weights: Weights) -> dict[str, Any]:
    """Return dtypes, shapes and bytes for a comparison in which a NaN equals itself."""
    found: dict[str, Any] = {}
    for name, value in weights.items():
        if isinstance(value, torch.Tensor):
            found[name] = value.dtype, value.shape, value.contiguous().view(torch.uint8).numpy().tobytes()
        elif isinstance(value, np.ndarray):
            found[name] = value.dtype, value.shape, value.tobytes()
        else:
            found[name] = value
    return found


class Machine(RuleBasedStateMachine):
    """A learner and, on another host, three workers: two share a cache, one has no cache."""

    server: Server
    directory: Path
    numbers = iter(range(1_000_000))
    kinds: ClassVar[Counter[str]] = Counter()

    @initialize()
    def begin(self) -> None:
        run = f"versions-{next(self.numbers)}"
        self.keys = spread(Keys(run), self.server)
        self.connections: list[Connection] = []
        self.epoch = 0
        self.published: dict[int, dict[str, Any]] = {}
        self.weights = some_weights(0, torch.float32, 30)
        self.publisher: Publisher | None = None
        places = (self.directory / "workers", self.directory / "workers", None)
        self.stores = [ImageStore(run, place) for place in places]
        self.downloaders = [Downloader(self.connect(), self.keys, store) for store in self.stores]
        self.decoded: list[DecodedVersion | None] = [None] * len(self.downloaders)
        self.restart_learner()

    def connect(self) -> Connection:
        self.connections.append(Connection(client=self.server.another_client()))
        return self.connections[-1]

    @rule()
    def restart_learner(self) -> None:
        if self.publisher:
            self.publisher.close()
        self.epoch += 1
        self.learner_has_published = False
        self.server.client.hset(self.keys.meta, "epoch", self.epoch)
        self.publisher = Publisher(
            self.connect(),
            self.keys,
            epoch=self.epoch,
            images=ImageStore(self.keys.run, self.directory / "learner"),
            segment_bytes=1024,
            chunk_bytes=3000,
        )

    @rule(
        seed=st.integers(0, 1000),
        part=st.sampled_from([0.0, 0.001, 0.01, 0.3, 1.0]),
        compression=st.sampled_from([True, True, True, False]),
        cast=st.sampled_from([None, None, "bfloat16"]),
        wait=st.booleans(),
        times=st.sampled_from([1, 1, 3]),
    )
    def publish(
        self, seed: int, part: float, compression: bool, cast: str | None, wait: bool, times: int
    ) -> None:
        assert self.publisher is not None
        for number in range(times):
            self.weights = changed(self.weights, seed + number, part)
            receipt = self.publisher.publish(self.weights, compression=compression, dtype=cast, wait=wait)
            receipt.wait(10.0)
            self.note(receipt.version, cast)
            self.learner_has_published = True
            self.kinds[receipt.kind] += 1

    def note(self, version: int, cast: str | None) -> None:
        sent = dict(self.weights)
        if cast:
            for name in ("w", "b", "tied"):
                tensor = sent[name]
                if tensor.dtype.itemsize >= 4 and tensor.is_floating_point():
                    sent[name] = tensor.to(torch.bfloat16).to(tensor.dtype)
            sent["array"] = torch.from_numpy(sent["array"]).to(torch.bfloat16).float().numpy()
        assert version not in self.published, "a number was used twice"
        self.published[version] = bits(sent)

    @rule(seed=st.integers(0, 1000), dtype=st.sampled_from(DTYPES), rows=st.sampled_from([1, 30, 100]))
    def change_architecture(self, seed: int, dtype: torch.dtype, rows: int) -> None:
        self.weights = some_weights(seed, dtype, rows)

    @precondition(lambda self: self.published)
    @rule(worker=st.integers(0, 2))
    def fetch(self, worker: int) -> None:
        manifest = self.manifest()
        version = self.downloaders[worker].fetch(manifest, self.decoded[worker])
        self.decoded[worker] = version
        got = version.weights_for({}, keep_dtype=False)
        assert bits(got) == self.published[version.number]
        assert version.number == manifest.version
        assert got["b"] is got["tied"]

    @rule(worker=st.integers(0, 2))
    def lose_base(self, worker: int) -> None:
        self.decoded[worker] = None

    @precondition(lambda self: self.published and self.decoded[2])
    @rule(data=st.data())
    def apply_to_a_wrong_base(self, data: st.DataObject) -> None:
        """With one wrong bit in the base the delta is refused, and the path from the full version works."""
        base, manifest = self.decoded[2], self.manifest()
        assert base is not None
        path = manifest.path(base.number)
        where = data.draw(st.integers(0, base.image.array.size - 1))
        base.image.array[where] ^= 1
        if path and path[0].base:
            try:
                version = self.downloaders[2].fetch(manifest, base)
            except WireError:
                pass
            else:  # the bit was in a segment that was stored anew, or between the lanes
                assert bits(version.weights_for({}, keep_dtype=False)) == self.published[version.number]
        self.decoded[2] = None
        self.fetch(2)

    @precondition(lambda self: self.published and self.learner_has_published)
    @rule(data=st.data(), damage=st.booleans())
    def lose_a_chunk(self, data: st.DataObject, damage: bool) -> None:
        """A worker that needs the chunk gets an error; the learner publishes a full version again."""
        assert self.publisher is not None
        manifest = self.manifest()
        form = data.draw(st.sampled_from(manifest.path()))
        key = self.keys.chunk(form.upload, data.draw(st.integers(0, form.chunks)))
        if damage:
            self.server.client.setrange(key, 9, b"xyz")
        else:
            self.server.client.delete(key)
        alone = Downloader(self.connect(), self.keys, ImageStore(self.keys.run, None))
        with pytest.raises(WireError):
            alone.fetch(manifest, None)
        alone.close()
        assert self.publisher.restore(unreadable_version=manifest.version)
        again = self.manifest()
        assert (again.version > manifest.version, again.kind) == (True, "full")
        self.published[again.version] = self.published[manifest.version]
        for worker in range(3):
            self.fetch(worker)

    @precondition(lambda self: self.published and self.learner_has_published)
    @rule()
    def server_loses_everything(self) -> None:
        assert self.publisher is not None
        before = self.manifest().version
        names = self.server.client.scan_iter(self.keys.everything)
        self.server.client.delete(self.keys.weights, *(name for name in names if b"}:w:" in name))
        assert self.publisher.restore()
        self.published[self.publisher.latest_version] = self.published[before]
        self.fetch(2)

    @invariant()
    def what_is_stored_is_bounded(self) -> None:
        if getattr(self, "published", None):
            assert len(self.manifest().forms) <= 2 * MAX_DELTAS + 2

    def manifest(self) -> Manifest:
        found = Manifest.from_fields(text_fields(self.server.client.hgetall(self.keys.weights)))
        assert found is not None
        return found

    def teardown(self) -> None:
        if not hasattr(self, "downloaders"):
            return
        assert self.publisher is not None
        self.decoded = []
        self.publisher.close()
        for store, downloader in zip(self.stores, self.downloaders, strict=True):
            store.close()
            downloader.close()
        for connection in self.connections:
            connection.close()


@pytest.fixture
def small_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lower the limits, so that kilobytes stand in for gigabytes."""
    monkeypatch.setattr(rlbroker.weights.publisher, "MIN_DELTA_BYTES", 0)
    monkeypatch.setattr(rlbroker.weights.host_cache, "MIN_SHARED_BYTES", 1)


@pytest.mark.on_every_engine
def test_any_sequence_of_events_leads_to_the_bits_of_the_version(
    server: Server, tmp_path: Path, small_limits: None
) -> None:
    for name in ("workers", "learner"):
        (tmp_path / name).mkdir()
    Machine.server, Machine.directory, Machine.kinds = server, tmp_path, Counter()
    run_state_machine_as_test(
        Machine,
        settings=settings(
            max_examples=15,
            stateful_step_count=25,
            deadline=None,
            derandomize=True,
            suppress_health_check=list(HealthCheck),
        ),
    )
    assert min(Machine.kinds["full"], Machine.kinds["delta"]) > 10


def test_a_chain_of_200_deltas_leads_to_the_same_bits(
    real_server: RealServer, run: str, small_limits: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No full version is stored on the way: a new worker applies all of them."""
    monkeypatch.setattr(rlbroker.weights.publisher, "needs_full", lambda latest, before: False)
    connection, keys = Connection(real_server.url), Keys(run)
    real_server.client.hset(keys.meta, "epoch", 1)
    publisher = Publisher(connection, keys, epoch=1, segment_bytes=4096)
    weights = some_weights(1, torch.float32, 200)
    for number in range(201):
        receipt = publisher.publish(weights, compression=True)
        assert receipt.kind == ("delta" if number else "full")
        sent, weights = weights, changed(weights, number, 0.01)
    manifest = Manifest.from_fields(text_fields(real_server.client.hgetall(keys.weights)))
    assert manifest is not None
    downloader = Downloader(connection, keys, ImageStore(run, None))
    assert len(manifest.path()) == 201
    version = downloader.fetch(manifest, None)
    assert bits(version.weights) == bits(sent)
    downloader.close()
    publisher.close()
    connection.close()
