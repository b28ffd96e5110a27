"""The fixtures of the fault scenarios, each of which runs with each seed on each chosen server."""

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
from redis_cluster import Cluster
from sentinel_trio import SentinelTrio
from servers import KINDS, FaultyServer, find_server_binary


def parametrize_scenario(metafunc: pytest.Metafunc) -> None:
    """Parametrize a scenario with each seed and each chosen engine and server."""
    if "server_kind" not in metafunc.fixturenames:
        return
    option = metafunc.config.getoption
    seeds = range(1, option("--seeds") + 1)
    if metafunc.definition.get_closest_marker("on_every_engine"):
        engines = option("--engines").split(",")
        metafunc.parametrize(("engine", "seed"), list(itertools.product(engines, seeds)))
    elif "seed" in metafunc.fixturenames:
        metafunc.parametrize("seed", seeds)
    metafunc.parametrize("server_kind", option("--servers").split(","), scope="session")


@pytest.fixture
def full(request: pytest.FixtureRequest) -> bool:
    """Whether scenarios run at their full size and length."""
    return bool(request.config.getoption("--full"))


@pytest.fixture
def binary(server_kind: str) -> Path:
    """The program of the chosen kind of server."""
    found = find_server_binary(server_kind)
    assert found is not None, f"{server_kind} is missing; install it: {KINDS[server_kind]}"
    return found


@pytest.fixture
def new_server(binary: Path, tmp_path: Path) -> Iterator[Callable[..., FaultyServer]]:
    """Starts a server of the chosen kind; takes command-line options."""
    with ExitStack() as stack:
        numbers = itertools.count()
        yield lambda *config: stack.enter_context(
            FaultyServer(binary, tmp_path / f"server-{next(numbers)}", *config)
        )


@pytest.fixture
def new_cluster(binary: Path, tmp_path: Path) -> Iterator[Callable[..., Cluster]]:
    """Starts a Cluster of the chosen kind of server; takes the arguments of `Cluster` after the folder."""
    with ExitStack() as stack:
        yield lambda *shape: stack.enter_context(Cluster(binary, tmp_path / "cluster", *shape))


@pytest.fixture
def new_trio(binary: Path, tmp_path: Path) -> Iterator[Callable[..., SentinelTrio]]:
    """Starts a Sentinel trio of the chosen kind of server; takes command-line options."""
    with ExitStack() as stack:
        yield lambda *config: stack.enter_context(SentinelTrio(binary, tmp_path / "trio", *config))


@pytest.fixture
def engine() -> str:
    """The engine of a scenario that is not marked `on_every_engine`."""
    return "single"


@pytest.fixture
def arena(engine: str, request: pytest.FixtureRequest, tmp_path: Path, seed: int) -> Iterator[Arena]:
    """A run on a new engine without persistence."""
    new = {"single": "new_server", "cluster": "new_cluster", "sentinel": "new_trio"}[engine]
    with Arena(request.getfixturevalue(new)(), tmp_path, seed) as made:
        yield made


@pytest.fixture
def measurements(
    request: pytest.FixtureRequest, seed: int, server_kind: str, engine: str
) -> Iterator[dict[str, Any]]:
    """The measurements of a scenario, printed and appended to the file of --figures."""
    found: dict[str, Any] = {}
    began = time.monotonic()
    yield found
    name = request.node.originalname
    line = {
        "scenario": name,
        "seed": seed,
        "server": server_kind,
        "engine": engine,
        "seconds": round(time.monotonic() - began, 1),
    }
    print(json.dumps(line | found))
    if file := request.config.getoption("--figures"):
        with Path(file).open("a") as out:
            out.write(json.dumps(line | found) + "\n")
