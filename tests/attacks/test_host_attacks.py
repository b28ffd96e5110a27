"""Attacks by another user of a machine on which workers share weights in /dev/shm.

The attacker wants to read weights, or to make workers load forged ones.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from shared_images import folder_of

from rlbroker import WorkerClient, WorkerCommunicator

Learner = Callable[..., WorkerCommunicator]
Worker = Callable[..., WorkerClient]

#: Large enough to be shared.
WEIGHTS = {"w": np.arange(100_000, dtype=np.float32)}

NOBODY = 65534


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A folder that every user of the machine may write to, as /dev/shm is."""
    folder = tmp_path / "shm"
    folder.mkdir()
    folder.chmod(0o1777)
    for parent in (tmp_path, *tmp_path.parents):
        if parent.stat().st_uid == os.geteuid() and parent != Path("/tmp"):
            parent.chmod(parent.stat().st_mode | 0o011)
    return folder


def as_nobody(command: str, *arguments: str | Path) -> str:
    if os.geteuid() != 0:
        pytest.skip("only root can act as another user")
    finished = subprocess.run(
        ["/bin/sh", "-c", command, "sh", *arguments],
        user=NOBODY,
        group=NOBODY,
        extra_groups=[],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        timeout=30,
        check=False,
    )
    return finished.stdout.strip()


READ_ALL = 'find "$1" -type f -exec cat {} + | wc -c'

#: Commands that make the cache folder before rlbroker does.
PREPARE = {
    "folder": 'mkdir -m 777 "$1" && touch "$1/image-1" && echo made',
    "link": 'mkdir -m 777 "$1-mine" && ln -s "$1-mine" "$1" && echo made',
    "file": 'touch "$1" && echo made',
}


def test_other_users_cannot_read_shared_weights(learner: Learner, worker: Worker, base: Path) -> None:
    comm, client = learner(host_cache=base), worker(host_cache=base)
    comm.send_model_weights(WEIGHTS)
    client.load_weights({})
    shared = [path for path in base.rglob("*") if path.is_file() and path.stat().st_size > 100_000]
    assert shared
    assert as_nobody(READ_ALL, base) == "0"
    public = base / "public"
    public.write_text("x")
    assert as_nobody(READ_ALL, base) == "1"  # the attacker can read public files


@pytest.mark.parametrize("kind", PREPARE)
def test_a_cache_folder_of_another_user_is_not_used(
    learner: Learner, worker: Worker, base: Path, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    comm = learner(host_cache=False)
    assert as_nobody(PREPARE[kind], folder_of(base, comm.run)) == "made"
    before = sorted(path.name for path in base.rglob("*"))
    client, model = worker(host_cache=base), dict[str, np.ndarray]()
    comm.send_model_weights(WEIGHTS)
    client.load_weights(model)
    assert (model["w"] == WEIGHTS["w"]).all()
    assert sorted(path.name for path in base.rglob("*")) == before
    assert "host" in caplog.text or "cache" in caplog.text
