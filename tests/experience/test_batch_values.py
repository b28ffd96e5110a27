"""Which values travel in batches, through a worker and a learner; each refusal names its path."""

from __future__ import annotations

import collections
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from codec_trees import assert_same

from rlbroker import Batch, InvalidArgument, UnsupportedType, WorkerClient, WorkerCommunicator

Learner = Callable[..., WorkerCommunicator]
Worker = Callable[..., WorkerClient]


def collect(comm: WorkerCommunicator) -> Batch:
    [(_, batch)] = comm.collect_experiences(timeout=5.0)
    return batch


def containing_itself() -> dict[str, Any]:
    batch: dict[str, Any] = {"x": np.ones(3)}
    batch["again"] = [batch]
    return batch


def deep(levels: int) -> dict[str, Any]:
    tree: dict[str, Any] = {"x": 1}
    for _ in range(levels):
        tree = {"x": tree}
    return tree


def freed() -> torch.Tensor:
    tensor = torch.ones(8)
    tensor.untyped_storage().resize_(0)
    return tensor


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (containing_itself, r"^\['again'\]\[0\]\['again'\].*contains itself"),
        (lambda: deep(5000), "nested deeper than 64"),
        (lambda: {"x": [deep(70)]}, "nested deeper than 64"),
        (lambda: {"a": {"x": torch.eye(3).to_sparse()}}, r"^\['a'\]\['x'\]: .*to_dense\(\)"),
        (lambda: {"x": torch._efficientzerotensor((3,))}, r"^\['x'\]: a ZeroTensor"),
        (lambda: {"x": [freed()]}, r"^\['x'\]\[0\]: .*freed"),
        (lambda: {"x": {1, 2}}, r"^\['x'\]: .*send list\(\) of it"),
        (lambda: {"x": bytearray(b"x")}, r"^\['x'\]: .*send bytes\(\) of it"),
        (lambda: {"x": np.zeros(2, ml_dtypes.int4)}, r"^\['x'\]: .*int4"),
        (lambda: {np.int64(3): 1}, r"^the top level: the key .* send int\(\) of it"),
    ],
)
def test_a_batch_that_cannot_travel_is_refused_and_the_next_one_is_sent(
    learner: Learner, worker: Worker, make: Callable[[], Any], reason: str
) -> None:
    comm, client = learner(), worker()
    with pytest.raises(UnsupportedType, match=reason):
        client.send_experiences(make())
    assert client.send_experiences({"x": 1}).sequence == 1
    assert collect(comm) == {"x": 1}


def test_lazy_views_arrive_with_the_values_that_torch_shows(learner: Learner, worker: Worker) -> None:
    comm, client = learner(), worker()
    z = torch.randn(100, dtype=torch.complex64)
    client.send_experiences({"z": z, "zc": z.conj(), "imag": z.imag, "negative": z.conj().imag})
    got = collect(comm)
    assert torch.equal(got["zc"], z.conj().resolve_conj())
    assert torch.equal(got["imag"], z.imag)
    assert torch.equal(got["negative"], -z.imag)


def test_any_mapping_of_arrays_is_a_batch(learner: Learner, worker: Worker) -> None:
    comm, client = learner(), worker()
    tree: dict[str, Any] = {"obs": np.ones((4, 3), ml_dtypes.bfloat16), "info": MappingProxyType({"n": 3})}
    for batch in (tree, MappingProxyType(tree), collections.UserDict(tree), collections.ChainMap(tree)):
        as_mapping: Mapping[str, Any] = batch
        receipt = client.send_experiences(as_mapping)
        assert receipt.rows == 4
        got = collect(comm)
        assert_same(dict(got), {"obs": tree["obs"], "info": {"n": 3}})
        assert (got.rows, got.raw_bytes) == (4, 24)


def test_a_collected_batch_can_be_sent_on(learner: Learner, worker: Worker) -> None:
    comm, client = learner(), worker()
    client.send_experiences({"x": torch.ones(3), "n": {"y": (1, 2)}})
    first = collect(comm)
    client.send_experiences(first)
    client.send_experiences({"kept": [first]})
    second, third = [batch for _, batch in comm.collect_experiences(timeout=5.0)]
    assert_same(dict(second), dict(first))
    assert_same(third["kept"][0], dict(first))
    assert second.sequence == first.sequence + 1


def test_a_checkpoint_with_batches_is_saved_and_loaded(
    learner: Learner, worker: Worker, tmp_path: Path
) -> None:
    comm, client = learner(acknowledge="manual"), worker()
    client.send_experiences({"obs": torch.ones(3), "actions": np.arange(3), "reward": np.float32(1)})
    pairs = comm.collect_experiences(timeout=5.0)
    torch.save({"buffer": pairs, "marks": comm.marks()}, tmp_path / "checkpoint")
    checkpoint = torch.load(tmp_path / "checkpoint", weights_only=True)
    [(worker_id, batch)] = checkpoint["buffer"]
    assert_same(dict(batch), dict(pairs[0][1]))
    assert (batch.sequence, batch.version, batch.rows) == (1, 0, 3)
    assert comm.acknowledge([(worker_id, batch)]) == 1
    assert comm.acknowledge(checkpoint["marks"]) == 0


def test_rows_can_be_given_where_the_leading_dimension_is_not_the_count(
    learner: Learner, worker: Worker
) -> None:
    comm, client = learner(), worker()
    transitions = [{"obs": np.ones(5), "reward": 1.0} for _ in range(50)]
    assert client.send_experiences({"transitions": transitions}).rows == 5
    assert client.send_experiences({"transitions": transitions}, rows=50).rows == 50
    assert client.send_experiences({"x": 1}, rows=np.int64(7)).rows == 7
    assert [batch.rows for _, batch in comm.collect_experiences(timeout=5.0)] == [5, 50, 7]


@pytest.mark.parametrize("rows", [-1, 1.5, True, np.True_, "3", float("nan"), 1 << 63, [3], np.ones(2)])
def test_invalid_rows_are_refused_before_anything_is_sent(
    learner: Learner, worker: Worker, rows: Any
) -> None:
    comm, client = learner(), worker()
    with pytest.raises(InvalidArgument, match="rows must be an integer from 0"):
        client.send_experiences({"x": np.ones(3)}, rows=rows)
    assert client.send_experiences({"x": np.ones(3)}).sequence == 1
    assert len(comm.collect_experiences(timeout=5.0)) == 1


def test_rows_are_those_of_the_array_that_is_nested_least(learner: Learner, worker: Worker) -> None:
    learner()
    client = worker()
    assert client.send_experiences({"info": {"lengths": np.ones(3)}, "obs": np.ones((8, 2))}).rows == 8
    assert client.send_experiences({"scalar": np.array(2.0), "empty": np.ones(0), "x": np.ones(4)}).rows == 4
    assert client.send_experiences({"bytes": bytes(5000), "n": 3}).rows == 0


def test_large_and_legal_trees_travel(learner: Learner, worker: Worker) -> None:
    comm, client = learner(), worker()
    tree = {
        "deep": deep(62),
        "many": {str(number): np.full(2, number) for number in range(3000)},
        "wide": list(range(200_000)),
    }
    client.send_experiences(tree)
    assert_same(dict(collect(comm)), tree)
