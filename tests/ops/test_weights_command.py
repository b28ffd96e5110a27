"""`rlbroker weights`: lists versions, shows their contents and writes them to files, with the real executable."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import redis
import torch
from executable import RunShell
from safetensors import safe_open
from safetensors.torch import load_file

from rlbroker import WorkerCommunicator
from rlbroker.backend.keys import Keys
from rlbroker.local.embedded_server import RedisServer

RUN = "weights-command"
KEYS = Keys(RUN)


def weights(step: int) -> dict[str, Any]:
    shared = torch.arange(30_000, dtype=torch.float32).reshape(100, 300)
    shared[0, 0] = step
    return {
        "model": {"first": shared, "last": shared},
        "half": torch.tensor([1.5, float("nan"), -0.0]).bfloat16(),
        "eighth": torch.ones(3).to(torch.float8_e4m3fn),
        "big": np.arange(3, dtype=">f4"),
        "flag": torch.tensor([True, False]),
        "step": step,
        "rate": float("inf"),
        "name": "net",
    }


@pytest.fixture(scope="module")
def client(embedded: RedisServer) -> Iterator[Any]:
    with redis.Redis.from_url(embedded.url, protocol=2) as client:
        yield client
        client.flushall()


@pytest.fixture(scope="module")
def shell(embedded: RedisServer, client: Any) -> RunShell:
    """A run that has ended, with versions 1 to 3 and version 4 of another layout; a part of version 2 has expired."""
    with WorkerCommunicator(1, redis_url=embedded.url, run=RUN) as learner:
        for step in (1, 2, 3):
            learner.send_model_weights(weights(step))
        learner.send_model_weights(
            weights(4) | {"more": np.zeros(2, np.float64), "where": [{"x": np.int16(7)}]}
        )
    forms = client.hget(KEYS.weights, "dropped").decode().split()
    assert [form.split(":")[:2] for form in forms] == [["1", "0"], ["2", "1"], ["3", "2"]]
    client.delete(KEYS.chunk(forms[1].split(":")[2], 1))
    return RunShell(embedded.url, RUN)


@pytest.fixture
def no_torch(tmp_path: Path) -> dict[str, str]:
    """Variables with which torch cannot be imported."""
    (tmp_path / "torch.py").write_text("raise ImportError('torch is not installed')")
    return {"PYTHONPATH": os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])}


@pytest.fixture(autouse=True)
def _nothing_changes(shell: RunShell, client: Any) -> Iterator[None]:
    """Check after each test that the run has not changed."""
    before = everything(client)
    assert len(before) > 5
    yield
    assert everything(client) == before


def everything(client: Any) -> dict[bytes, tuple[bytes, bool]]:
    """Return the value of each of the run's keys, and whether it has no expiry."""
    return {key: (client.dump(key), client.pttl(key) == -1) for key in client.scan_iter(KEYS.everything)}


def test_list_shows_the_stored_versions_and_when_they_expire(shell: RunShell) -> None:
    data = shell.json("weights", "list")
    assert data.keys() == {"run", "version", "raw_bytes", "codec", "published", "forms"}
    assert (data["run"], data["version"], data["codec"]) == (RUN, 4, "blosc2")
    forms = data["forms"]
    names = ["version", "kind", "base", "stored_bytes", "chunks", "state", "expires_seconds", "reachable"]
    assert all(list(form) == names for form in forms)
    assert [
        (form["version"], form["kind"], form["base"], form["state"], form["reachable"]) for form in forms
    ] == [
        (1, "full", 0, "expiring", True),
        (2, "delta", 1, "gone", False),
        (3, "delta", 2, "expiring", False),
        (4, "full", 0, "latest", True),
    ]
    assert 0 < forms[0]["expires_seconds"] <= 60
    assert forms[1]["expires_seconds"] is forms[3]["expires_seconds"] is None
    table = shell("weights", "list").stdout
    assert "delta to 1" in table
    assert "a part is missing" in table


def test_show_reads_only_the_header_and_needs_no_torch(shell: RunShell, no_torch: dict[str, str]) -> None:
    data = shell.json("weights", "show", "1", **no_torch)
    facts = ["run", "version", "kind", "base", "stored_bytes", "chunks", "latest", "raw_bytes"]
    assert list(data) == [*facts, "download_bytes", "tensors", "values"]
    assert (data["version"], data["kind"], data["latest"]) == (1, "full", False)
    tensors = {one["name"]: one for one in data["tensors"]}
    assert list(tensors) == ["model.first", "model.last", "half", "eighth", "big", "flag"]
    expected = {
        "kind": "tensor",
        "dtype": "float32",
        "original_dtype": None,
        "shape": [100, 300],
        "bytes": 120_000,
    }
    assert tensors["model.first"] == {"name": "model.first", **expected, "tied_to": None}
    assert tensors["model.last"] == {"name": "model.last", **expected, "tied_to": "model.first"}
    assert data["values"][0] == {"name": "step", "kind": "int", "value": "1"}
    table = shell("weights", "show").stdout
    assert f"version 4 of {RUN}" in table
    assert "where.0.x" in table
    assert "tied to model.first" in table


def test_a_pulled_safetensors_file_is_bit_exact(
    shell: RunShell, tmp_path: Path, no_torch: dict[str, str]
) -> None:
    file = tmp_path / "one.safetensors"
    done = shell("weights", "pull", "1", "--output", str(file), **no_torch)
    assert (done.returncode, done.stdout) == (0, f"{file}\n"), done.stderr
    found, sent = load_file(file), weights(1)
    expected = {name: tensor for name, tensor in sent.items() if isinstance(tensor, torch.Tensor)}
    expected |= {f"model.{name}": tensor for name, tensor in sent["model"].items()}
    expected["big"] = torch.arange(3, dtype=torch.float32)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert found[name].shape == tensor.shape
        assert bytes(found[name].contiguous().view(torch.uint8).numpy()) == bytes(
            tensor.view(torch.uint8).numpy()
        )
    with safe_open(file, "pt") as opened:
        output = opened.metadata()
    assert output["format"] == "pt"
    assert json.loads(output["rlbroker"]) == {"run": RUN, "version": 1}
    assert json.loads(output["values"]) == {"step": 1, "rate": "inf", "name": "net"}
    assert json.loads(output["tied"]) == {"model.last": "model.first"}
    mask = os.umask(0)
    os.umask(mask)
    assert stat.S_IMODE(file.stat().st_mode) == 0o666 & ~mask


def test_pulling_an_npz_file_reports_what_it_cannot_hold(shell: RunShell, tmp_path: Path) -> None:
    file = tmp_path / "four.npz"
    file.write_text("not precious")
    data = shell.json("weights", "pull", "-o", str(file), "--force")
    assert (data["version"], data["file"], data["bytes"]) == (4, str(file), file.stat().st_size)
    assert data["left_out"] == ["step", "rate", "name"]
    assert data["as_bits"] == {"half": "bfloat16", "eighth": "float8_e4m3fn"}
    with np.load(file) as found:
        assert len(found) == data["tensors"] == 8
        np.testing.assert_array_equal(found["model.last"], weights(4)["model"]["last"].numpy(), strict=True)
        np.testing.assert_array_equal(found["big"], weights(4)["big"], strict=True)
        assert found["where.0.x"] == np.int16(7)
        bits = found["half"].astype("uint32") << 16
        np.testing.assert_array_equal(bits.view("float32"), weights(4)["half"].float().numpy())


def test_an_existing_file_is_overwritten_only_with_force(shell: RunShell, tmp_path: Path) -> None:
    file = tmp_path / "mine.npz"
    file.write_text("precious")
    done = shell("weights", "pull", "-o", str(file))
    assert (done.returncode, done.stdout) == (2, "")
    assert "--force overwrites it" in done.stderr
    assert file.read_text() == "precious"
    assert list(tmp_path.iterdir()) == [file]


def test_an_expired_version_is_answered_with_those_that_are_stored(shell: RunShell) -> None:
    done = shell("weights", "pull", "3")
    assert (done.returncode, done.stdout) == (1, "")
    assert "version 3 is not stored any more" in done.stderr
    assert "stored versions: 1, 4" in done.stderr


def test_damaged_weights_are_refused_and_leave_no_file(shell: RunShell, client: Any, tmp_path: Path) -> None:
    upload = client.hget(KEYS.weights, "upload").decode()
    data = client.get(KEYS.chunk(upload, 1))
    client.set(KEYS.chunk(upload, 1), data[:-1] + bytes([data[-1] ^ 1]))
    try:
        done = shell("weights", "pull", "-o", str(tmp_path / "damaged.safetensors"))
    finally:
        client.set(KEYS.chunk(upload, 1), data)
    assert (done.returncode, done.stdout) == (2, "")
    assert "digest" in done.stderr
    assert list(tmp_path.iterdir()) == []
