"""JAX through a learner and a worker: arrays on several devices, trees of its libraries, batches in its functions."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from conftest import FakeServer, Server

PROGRAM = """
import copy
import dataclasses
import pickle
import sys
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from rlbroker import Batch, UnsupportedType, WeightsMismatch, WorkerClient, WorkerCommunicator

url = sys.argv[1]
if not url:
    import fakeredis
    server = fakeredis.FakeServer()
connect = lambda: {"redis_url": url} if url else {"redis_client": fakeredis.FakeRedis(server=server)}

first, second = jax.devices()
split = NamedSharding(Mesh(np.array([first, second]), ("x",)), PartitionSpec("x"))
everywhere = NamedSharding(Mesh(np.array([first, second]), ("x",)), PartitionSpec())
plain = np.arange(16, dtype=np.float32).reshape(8, 2)
arrays = {
    "split": jax.device_put(plain, split),
    "everywhere": jax.device_put(plain, everywhere),
    "second": jax.device_put(plain, second),
    "half": jax.device_put(plain.astype(ml_dtypes.bfloat16), split),
    "transposed": jax.device_put(plain, split).T,
}

def check(tree):
    for key, array in arrays.items():
        assert type(tree[key]) is np.ndarray, tree
        assert tree[key].dtype == array.dtype
        np.testing.assert_array_equal(tree[key], np.asarray(array))

class ScaleByAdamState(NamedTuple):
    count: Any
    mu: Any

class Variable:  # as in Flax NNX: no `__array__`
    def __init__(self, value):
        self.value, self.shape = value, value.shape
    def __jax_array__(self):
        return self.value

@jax.tree_util.register_dataclass
@dataclasses.dataclass
class TrainState:
    params: Any
    apply_fn: Any = dataclasses.field(metadata={"static": True})

state = (ScaleByAdamState(jnp.zeros((), jnp.int32), {"w": jnp.ones(2)}), TrainState({"w": jnp.ones(3)}, print))

def refusal(value):
    try:
        client.send_experiences({"x": value})
    except UnsupportedType as error:
        return str(error)

run = "jax-values"
with WorkerCommunicator(1, run=run, **connect()) as comm, WorkerClient(run=run, **connect()) as client:
    # in batches, weights and the data of commands
    assert client.send_experiences(arrays).rows == 8
    [(_, batch)] = comm.collect_experiences(timeout=10.0)
    check(batch)
    comm.send_model_weights({"params": arrays, "layers": [(jnp.ones(2), Variable(jnp.ones(3)))]})
    target = {}
    client.load_weights(target)
    check(target["params"])
    assert [leaf.tolist() for leaf in target["layers"][0]] == [[1, 1], [1, 1, 1]]
    comm.send_model_weights({"params": jax.tree.map(jnp.zeros_like, arrays), "layers": []})
    client.load_weights(target)  # in place
    assert not any(array.any() for array in target["params"].values())
    seen = []
    client.on_command("arrays", seen.append)
    command = comm.send_control_command("arrays", arrays)
    while not command.wait(timeout=0.1)[client.worker_id]:
        client.poll()
    check(seen[0])

    # as targets
    comm.send_model_weights({"w": jnp.ones(2)})
    try:
        client.load_weights({"w": jnp.zeros(2)})
    except WeightsMismatch as error:
        assert "w is ArrayImpl in the model, which cannot be overwritten; give a numpy array" in str(error), error

    # trees of libraries: refused, with calls that make them travel
    assert refusal(state).startswith("['x'][0]: ") and "_asdict(); or jax.tree.leaves() of" in refusal(state)
    assert "jax.tree.leaves() of the whole tree" in refusal(state[1])
    leaves, structure = jax.tree.flatten(state)
    client.send_experiences({"state": leaves})
    [(_, got)] = comm.collect_experiences(timeout=10.0)
    back = jax.tree.unflatten(structure, got["state"])
    assert type(back[0]) is ScaleByAdamState and back[1].apply_fn is print
    jax.tree.map(np.testing.assert_array_equal, back, state)
    assert refusal(jax.random.key(0)).endswith("send jax.random.key_data() of it")
    client.send_experiences({"key": jax.random.key_data(jax.random.key(0))})
    donated = jnp.ones(3)
    donated.delete()
    assert refusal(donated).endswith("send it before it is deleted or donated")
    jax.jit(lambda x: seen.append(refusal(x)) or x)(jnp.ones(2))
    assert seen[-1].endswith("send it outside of the function that JAX transforms"), seen

    # a batch in the functions of JAX
    batch = Batch(x=plain, n={"y": jnp.ones(8)})
    loss = lambda one: (one["x"] ** 2).sum() + one["n"]["y"].sum()
    value, gradients = jax.value_and_grad(loss)(batch)
    assert type(gradients) is Batch
    np.testing.assert_array_equal(gradients["x"], 2 * plain)
    rows = jax.vmap(lambda one: Batch(s=one["x"].sum() + one["n"]["y"]))(batch)
    assert type(rows) is Batch and rows["s"].shape == (8,)
    assert type(jax.lax.scan(lambda carry, one: (carry, one), 0.0, batch)[1]) is Batch
    placed = jax.device_put(batch, split)
    assert type(placed) is Batch and placed["x"].sharding == split
    client.send_experiences(placed)
    client.send_experiences(jax.jit(lambda one: jax.tree.map(jnp.negative, one))(placed))
    (_, _), (_, same), (_, negative) = comm.collect_experiences(timeout=10.0)
    np.testing.assert_array_equal(same["x"], plain)
    np.testing.assert_array_equal(negative["x"], -plain)
    assert jax.tree.structure(same) == jax.tree.structure(placed)  # metadata is no part of it
    for copied in (pickle.loads(pickle.dumps(same)), copy.deepcopy(same), copy.copy(same)):
        assert type(copied) is Batch and copied.sequence == same.sequence
        np.testing.assert_array_equal(copied["x"], plain)
assert "torch" not in sys.modules
"""


@pytest.mark.timeout(300)  # JAX compiles
def test_what_jax_makes_travels_everywhere_or_is_refused_with_a_call(server: Server) -> None:
    """In a process of its own, with two devices: JAX starts threads, and warns of each fork afterwards."""
    url = "" if isinstance(server, FakeServer) else server.url  # type: ignore[attr-defined] # a real one has a URL
    environment = os.environ | {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
        "JAX_PLATFORMS": "cpu",
    }
    subprocess.run([sys.executable, "-c", PROGRAM, url], check=True, env=environment)
