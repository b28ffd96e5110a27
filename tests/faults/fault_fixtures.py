"""What the scenarios share: each runs with several seeds, on each chosen server."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from arena import Arena
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
def new_server(server_kind: str, tmp_path: Path) -> Iterator[Callable[..., FaultyServer]]:
    """Makes servers of the chosen kind, started, with options as on the command line."""
    binary = binary_of(server_kind)
    assert binary is not None, f"there is no {server_kind} here; get it with: {KINDS[server_kind]}"
    made: list[FaultyServer] = []

    def make(*config: str) -> FaultyServer:
        server = FaultyServer(binary, tmp_path / f"server-{len(made)}", *config)
        made.append(server)
        server.start()
        return server

    yield make
    for server in made:
        server.kill()


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
