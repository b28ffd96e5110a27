"""What the scenarios share: each runs with several seeds, on each chosen server."""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from arena import Arena
from engines import Cluster, SentinelTrio
from servers import KINDS, FaultyServer, binary_of


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "server_kind" not in metafunc.fixturenames:
        return
    if "seed" in metafunc.fixturenames:
        metafunc.parametrize("seed", range(1, metafunc.config.getoption("--seeds") + 1))
    kinds = metafunc.config.getoption("--servers").split(",")
    metafunc.parametrize("server_kind", kinds, scope="session")


@pytest.fixture
def full(request: pytest.FixtureRequest) -> bool:
    """Whether scenarios run at their full size and length."""
    return bool(request.config.getoption("--full"))


@pytest.fixture
def binary(server_kind: str) -> Path:
    """The program of the chosen kind of server."""
    found = binary_of(server_kind)
    assert found is not None, f"there is no {server_kind} here; get it with: {KINDS[server_kind]}"
    return found


@pytest.fixture
def new_server(binary: Path, tmp_path: Path) -> Iterator[Callable[..., FaultyServer]]:
    """Makes servers of the chosen kind, started, with options as on the command line."""
    with ExitStack() as stack:
        numbers = itertools.count()
        yield lambda *config: stack.enter_context(
            FaultyServer(binary, tmp_path / f"server-{next(numbers)}", *config)
        )


@pytest.fixture
def new_cluster(binary: Path, tmp_path: Path) -> Iterator[Callable[..., Cluster]]:
    """Makes a Cluster of the chosen kind of server, started: three masters and their replicas, or as said."""
    with ExitStack() as stack:
        yield lambda *shape: stack.enter_context(Cluster(binary, tmp_path / "cluster", *shape))


@pytest.fixture
def new_trio(binary: Path, tmp_path: Path) -> Iterator[Callable[..., SentinelTrio]]:
    """Makes a Sentinel trio of the chosen kind of server, started, with options as on the command line."""
    with ExitStack() as stack:
        yield lambda *config: stack.enter_context(SentinelTrio(binary, tmp_path / "trio", *config))


@pytest.fixture
def arena(new_server: Callable[..., FaultyServer], tmp_path: Path, seed: int) -> Iterator[Arena]:
    """A run on a server that keeps nothing on disk."""
    with Arena(new_server(), tmp_path, seed) as made:
        yield made


@pytest.fixture
def figures(request: pytest.FixtureRequest, seed: int, server_kind: str) -> Iterator[dict[str, Any]]:
    """What a scenario measured; printed, and written to the file of --figures."""
    found: dict[str, Any] = {}
    began = time.monotonic()
    yield found
    name = request.node.originalname
    line = {
        "scenario": name,
        "seed": seed,
        "server": server_kind,
        "seconds": round(time.monotonic() - began, 1),
    }
    print(json.dumps(line | found))
    if file := request.config.getoption("--figures"):
        with Path(file).open("a") as out:
            out.write(json.dumps(line | found) + "\n")
