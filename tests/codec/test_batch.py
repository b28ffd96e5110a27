"""A `Batch` can be kept and used like the dictionary it is: pickled, saved with torch, mapped over, sent on."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from codec_trees import assert_same
from torch.utils import _pytree as pytree

from rlbroker import Batch
from rlbroker.codec.message import decode, encode

pytestmark = pytest.mark.unit

METADATA = {
    "worker_id": 3,
    "incarnation": 1,
    "sequence": 7,
    "version": 12,
    "staleness": 1,
    "rows": 4,
    "raw_bytes": 96,
    "stored_bytes": 400,
    "sent_at": 1.5,
    "received_at": 2.5,
    "held_as": ("x:3", "1-7"),
}


def collected() -> Batch:
    """Return a batch as a learner gets it."""
    batch = Batch(
        obs=torch.arange(12.0).reshape(4, 3),
        actions=np.arange(4),
        flags=np.array([True, False]),
        big_endian=np.ones(2, ">f8"),
        long=np.ones(2, np.longdouble),
        scalar=np.float32(2),
        nested={"x": (1, [None, "é", b"b"])},
        half=np.ones(3, ml_dtypes.bfloat16),
        eighth=ml_dtypes.float8_e4m3fn(0.5),
    )
    for name, value in METADATA.items():
        setattr(batch, name, value)
    return batch


def assert_equal(got: Any, sent: Batch) -> None:
    assert type(got) is Batch
    assert_same(dict(got) | {"big_endian": 0}, dict(sent) | {"big_endian": 0})
    assert {name: getattr(got, name) for name in METADATA} == METADATA


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_a_batch_can_be_pickled(protocol: int) -> None:
    assert_equal(pickle.loads(pickle.dumps(collected(), protocol)), collected())


def test_a_batch_can_be_copied_also_without_metadata() -> None:
    batch = collected()
    assert_equal(copy.deepcopy(batch), batch)
    shallow = copy.copy(batch)
    assert_equal(shallow, batch)
    assert shallow["obs"] is batch["obs"]
    assert copy.deepcopy(Batch(x=1)) == {"x": 1}


@pytest.mark.parametrize("weights_only", [True, False])
def test_batches_can_be_saved_and_loaded_with_torch(tmp_path: Path, weights_only: bool) -> None:
    torch.save({"buffer": [(3, collected())], "marks": {"a": 1}}, tmp_path / "checkpoint")
    got = torch.load(tmp_path / "checkpoint", weights_only=weights_only)
    [(worker_id, batch)] = got["buffer"]
    assert worker_id == 3
    assert_equal(batch, collected())


@pytest.mark.parametrize(
    "imports",
    ["import rlbroker, torch", "import torch, rlbroker", "from rlbroker import Batch; import torch.nn"],
)
def test_a_program_that_resumes_loads_batches_before_it_makes_a_client(tmp_path: Path, imports: str) -> None:
    file = tmp_path / "checkpoint"
    torch.save([collected()], file)
    program = f"""
{imports}
import torch
[batch] = torch.load({str(file)!r}, weights_only=True)
assert batch.version == 12, batch
assert len(torch.utils._pytree.tree_leaves(batch)) > 5
assert "jax" not in __import__("sys").modules
"""
    subprocess.run([sys.executable, "-W", "error", "-c", program], check=True)


def test_neither_torch_nor_jax_nor_numpy_is_imported_for_it() -> None:
    program = """
import sys, rlbroker
rlbroker.Batch(x=1)
assert not {"torch", "jax", "numpy"} & sys.modules.keys()
"""
    subprocess.run([sys.executable, "-c", program], check=True)


def test_a_batch_is_a_pytree_node_for_torch() -> None:
    batch = Batch(b=torch.ones(2), a=[torch.zeros(3), 4])
    assert_same(pytree.tree_leaves(batch), [batch["b"], *batch["a"]])
    doubled = pytree.tree_map(lambda leaf: leaf * 2, batch)
    assert type(doubled) is Batch
    assert_same(dict(doubled), {"b": torch.ones(2) * 2, "a": [torch.zeros(3), 8]})
    paths = [pytree.keystr(path) for path, _ in pytree.tree_flatten_with_path(batch)[0]]
    assert paths == ["['b']", "['a'][0]", "['a'][1]"]
    batch.version = 3
    other = Batch(b=torch.ones(2), a=[torch.ones(3), 5])  # metadata does not make the structure another one
    added = pytree.tree_map(lambda one, two: one + two, batch, other)
    assert_same(dict(added), {"b": torch.ones(2) * 2, "a": [torch.ones(3), 9]})


def test_a_batch_can_be_an_argument_of_torch_func() -> None:
    batch = Batch(x=torch.arange(6.0).reshape(3, 2), y={"z": torch.ones(3)})
    summed = torch.func.vmap(lambda one: one["x"].sum() + one["y"]["z"])(batch)
    assert summed.tolist() == [2, 6, 10]
    gradients = torch.func.grad(lambda one: (one["x"] ** 2).sum() + one["y"]["z"].sum())(batch)
    assert type(gradients) is Batch
    assert torch.equal(gradients["x"], 2 * batch["x"])
    assert gradients["y"]["z"].tolist() == [1, 1, 1]


def test_a_batch_travels_as_a_dictionary() -> None:
    batch = collected()
    assert_same(decode(encode(batch)), dict(batch))
    assert_same(decode(encode([("kept", batch)])), [("kept", dict(batch))])


JAX = """
import sys
{imports}
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from rlbroker.codec.message import decode, encode

batch = rlbroker.Batch(obs=np.arange(6, dtype=np.float32).reshape(2, 3), a=(np.ones(2), 3.0))
batch.version, batch.sequence = 4, 1
assert [np.shape(leaf) for leaf in jax.tree.leaves(batch)] == [(2,), (), (2, 3)]  # sorted, as a dictionary's
assert [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_flatten_with_path(batch)[0]] == [
    "['a'][0]", "['a'][1]", "['obs']"
]
traces = []

@jax.jit
def double(one):
    traces.append(type(one))
    return jax.tree.map(lambda leaf: leaf * 2, one)

for sequence in range(3):
    batch.sequence = sequence
    doubled = double(batch)
assert traces == [rlbroker.Batch], traces  # metadata does not compile it again
assert type(doubled) is rlbroker.Batch and list(doubled) == ["a", "obs"], doubled
np.testing.assert_array_equal(doubled["obs"], batch["obs"] * 2)
mixed = rlbroker.Batch({{"x": 1, 7: 2}})
assert jax.tree.leaves(mixed) == [2, 1]
assert jax.vmap(lambda one: one["obs"].sum())(rlbroker.Batch(obs=batch["obs"])).shape == (2,)

# what JAX computes travels
tree = {{"w": jnp.ones((3, 2)), "b": jnp.zeros(2, jnp.bfloat16), "f": jnp.ones(2, jnp.float8_e4m3fn),
         "n": jnp.int32(4), "host": jax.device_put(np.arange(3), jax.devices("cpu")[0]), "batch": doubled}}
tree["same"] = tree["w"]
got = decode(encode(tree))
assert all(type(leaf) is np.ndarray and leaf.flags.writeable for leaf in jax.tree.leaves(got)), got
assert got["b"].dtype == ml_dtypes.bfloat16 and got["f"].dtype == ml_dtypes.float8_e4m3fn
assert got["w"] is got["same"] and got["n"].shape == ()
for key in ("w", "b", "f", "n", "host"):
    assert got[key].dtype == tree[key].dtype
    np.testing.assert_array_equal(got[key], np.asarray(tree[key]))
assert type(got["batch"]) is dict

def refusal(value):
    try:
        encode({{"x": value}})
    except rlbroker.UnsupportedType as error:
        return str(error)

deleted = jnp.ones(3)
deleted.delete()
assert refusal(deleted).startswith("['x']: numpy cannot read ") and "deleted" in refusal(deleted)
assert "jax.random.key_data" in refusal(jax.random.key(0))
assert "int4" in refusal(jnp.ones(2, jnp.int4))
seen = []
jax.jit(lambda x: seen.append(refusal(x)) or x)(jnp.ones(2))
assert "traced array" in seen[0], seen
assert "torch" not in sys.modules
"""


@pytest.mark.timeout(300)  # JAX compiles
@pytest.mark.parametrize("imports", ["import rlbroker", "import jax, rlbroker"])
def test_a_batch_is_a_pytree_node_for_jax_and_its_arrays_travel(imports: str) -> None:
    """In a process of its own: JAX starts threads, and warns of each fork afterwards."""
    subprocess.run([sys.executable, "-c", JAX.format(imports=imports)], check=True)
