"""What the tests share: a body runs on fakeredis, a real server, a Cluster and a Sentinel trio, in a run of its own."""

from __future__ import annotations

import itertools
import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import cache, partial
from typing import Any, Protocol

import fakeredis
import pytest
import redis
from certificates import certificates  # noqa: F401 - a fixture
from fault_fixtures import (  # noqa: F401 - so pytest finds them
    arena,
    binary,
    engine,
    full,
    measurements,
    new_cluster,
    new_server,
    new_trio,
    parametrize_scenario,
)
from redis.backoff import NoBackoff
from redis.retry import Retry
from redis.sentinel import Sentinel
from redis_cluster import Cluster
from sentinel_trio import SentinelTrio
from servers import KINDS, find_server_binary

from rlbroker import WorkerClient, WorkerCommunicator
from rlbroker.backend.keys import Keys
from rlbroker.local.embedded_server import RedisServer

#: Started by itself, with a package that only fuzzing needs.
collect_ignore = ["fuzz/fuzz_harness.py"]


def pytest_addoption(parser: pytest.Parser) -> None:
    faults = parser.getgroup("faults", "tests/faults: real processes on real servers")
    faults.addoption("--seeds", type=int, default=1, help="seeds for each scenario (20 in a long run)")
    faults.addoption("--full", action="store_true", help="scenarios at their full size and length")
    faults.addoption(
        "--servers", default="embedded", help="embedded, redis-6.2, redis-7.0, separated by commas"
    )
    faults.addoption(
        "--engines",
        default="single,cluster,sentinel",
        help="what scenarios and tests run on that can run on each",
    )
    faults.addoption(
        "--everywhere", action="store_true", help="all tests that can run on the engines do, not a selection"
    )
    faults.addoption(
        "--soak", type=float, default=0.0, metavar="MINUTES", help="all faults at random, so long"
    )
    faults.addoption(
        "--figures", metavar="FILE", help="append each scenario's figures to it, as lines of JSON"
    )


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers", "on_every_engine: runs on a server, on a Cluster and on a Sentinel trio, also by default"
    )
    config.addinivalue_line("markers", "unit: needs no server and starts no process")
    config.addinivalue_line("markers", "single_server(why): never runs on a Cluster or a Sentinel trio")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if isinstance(item, pytest.DoctestItem):
            item.add_marker("unit")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    parametrize_scenario(metafunc)
    if "place" in metafunc.fixturenames:
        metafunc.parametrize("place", _places(metafunc))


def _places(metafunc: pytest.Metafunc) -> list[str]:
    """Give where a test runs: on a fake, on a real server, and on some engines made of each kind of server."""
    option, mark = metafunc.config.getoption, metafunc.definition.get_closest_marker
    always = ["real"] if "reachable" in metafunc.fixturenames else ["fake", "real"]
    if not (option("--everywhere") or mark("on_every_engine")):
        return always
    several = [one for one in option("--engines").split(",") if one != "single"]
    return [*always, *(f"{one}:{kind}" for kind in option("--servers").split(",") for one in several)]


_numbers = itertools.count(1)

#: Keys that may stay for ever; everything else must have a lifetime.
LASTING = re.compile(
    r"meta|weights|ctl|workers|shards|pending|missed|(x|counts|epochs|dead|again|ack|ledger|life|history):\d+|w:\d+-\d+-\d+:\d+"
)


class Server(Protocol):
    """A place for runs: how clients reach it, and a client to look into it."""

    kind: str
    client: Any

    def connection_settings(self) -> dict[str, Any]:
        """Give the arguments with which a client of ours reaches it."""

    def another_client(self) -> Any:
        """Give a client of redis-py that does not try again by itself."""


class FakeServer:
    kind = "fake"

    def __init__(self) -> None:
        self._server = fakeredis.FakeServer()
        self.client: Any = fakeredis.FakeRedis(server=self._server)

    def connection_settings(self) -> dict[str, Any]:
        return {"redis_client": self.another_client()}

    def another_client(self) -> Any:
        return fakeredis.FakeRedis(server=self._server)


class RealServer:
    kind = "real"

    def __init__(self, server: RedisServer) -> None:
        self.embedded = server
        self.url = server.url
        self.client: Any = redis.Redis.from_url(server.url, protocol=2)

    def connection_settings(self) -> dict[str, Any]:
        return {"redis_url": self.url}

    def new_client(self, **settings: Any) -> Any:
        """Give a client as users make it."""
        return redis.Redis.from_url(self.url, **settings)

    def another_client(self) -> Any:
        return self.new_client(protocol=2, retry=Retry(NoBackoff(), 0))


class ClusterServer:
    """A Cluster, taken whole."""

    kind = "cluster"

    def __init__(self, cluster: Cluster) -> None:
        self.engine, self._node = cluster, cluster.nodes[0].address
        self.url = cluster.url
        self.client: Any = self.new_client(protocol=2)

    def connection_settings(self) -> dict[str, Any]:
        return {"redis_url": self.url}

    def new_client(self, **settings: Any) -> Any:
        """Give a client as users make it."""
        host, port = self._node
        return redis.RedisCluster(host=host, port=port, **settings)

    def another_client(self) -> Any:
        return self.new_client(protocol=2, retry=Retry(NoBackoff(), 0))


class TrioServer:
    """Whichever server the Sentinels of a trio name as the master."""

    kind = "sentinel"

    def __init__(self, trio: SentinelTrio) -> None:
        self.engine = trio
        self._sentinels, self._service = [one.address for one in trio.sentinels], trio.service
        for sentinel in trio.sentinels:  # nobody fails here: a machine that is busy is no reason to promote
            sentinel.ask("SENTINEL", "SET", trio.service, "down-after-milliseconds", 60_000)
        self.url = trio.url
        self.client: Any = self.new_client(protocol=2)

    def connection_settings(self) -> dict[str, Any]:
        return {"redis_url": self.url}

    def new_client(self, **settings: Any) -> Any:
        """Give a client as users make it."""
        make: Any = Sentinel
        return make(self._sentinels).master_for(self._service, **settings)

    def another_client(self) -> Any:
        return self.new_client(protocol=2, retry=Retry(NoBackoff(), 0))


Reachable = RealServer | ClusterServer | TrioServer


@pytest.fixture(scope="session")
def embedded() -> Iterator[RedisServer]:
    """A real server for the whole session. Without one the tests fail; they do not skip."""
    with RedisServer() as server:
        yield server


@pytest.fixture
def real_server(embedded: RedisServer) -> Iterator[RealServer]:
    server = RealServer(embedded)
    server.client.flushall()  # runs that a whole module shared may be left
    yield server
    server.client.flushall()
    server.client.close()


@pytest.fixture(scope="session")
def start_engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str, str], Server]]:
    """Starts an engine, made of a kind of server, when it is wanted first; it is there for the whole session."""
    with ExitStack() as stack:

        @cache
        def start(engine: str, kind: str) -> Server:
            binary = find_server_binary(kind)
            assert binary is not None, f"there is no {kind} here; get it with: {KINDS[kind]}"
            folder = tmp_path_factory.mktemp(engine)
            if engine == "cluster":
                patient = "--cluster-node-timeout", "60000"  # a machine that is busy is no reason to promote
                made = ClusterServer(stack.enter_context(Cluster(binary, folder, 3, 1, *patient)))
                made.client.flushall()  # they do not name a replica until they know how far it is
                wait_until("each node names all others", partial(_all_are_named, made.engine), 30.0)
                return made
            return TrioServer(stack.enter_context(SentinelTrio(binary, folder)))

        yield start


def _all_are_named(made: Cluster) -> bool:
    told = [str(node.ask("CLUSTER", "SLOTS")) for node in made.nodes]
    return all(f", {node.port}," in one for one in told for node in made.nodes)


@pytest.fixture
def cluster(start_engine: Callable[[str, str], ClusterServer], server_kind: str) -> Iterator[ClusterServer]:
    """A Cluster without keys, made of the chosen kind of server."""
    found = start_engine("cluster", server_kind)
    found.client.flushall()
    yield found
    found.client.flushall()


@pytest.fixture
def server(place: str, request: pytest.FixtureRequest) -> Iterator[Server]:
    """Each kind, one after the other; only RLBROKER_ALLOW_FAKE=1 lets the real ones be missing."""
    if place == "fake":
        yield FakeServer()
        return
    if os.environ.get("RLBROKER_ALLOW_FAKE") == "1":
        pytest.skip("RLBROKER_ALLOW_FAKE=1: only fakeredis is used")
    if place == "real":
        yield request.getfixturevalue("real_server")
        return
    if mark := request.node.get_closest_marker("single_server"):
        pytest.skip(f"on a single server only: {mark.args[0]}")
    found: Server = request.getfixturevalue("start_engine")(*place.split(":"))
    found.client.flushall()
    yield found
    found.client.flushall()


@pytest.fixture
def reachable(server: Reachable) -> Reachable:
    """One that other processes can reach too: each kind but a fake."""
    return server


@pytest.fixture
def run() -> str:
    """A name that no other test uses."""
    return f"test-{next(_numbers)}"


@pytest.fixture
def keys(run: str) -> Keys:
    """The names of this test's keys; on a Cluster, shards are among them once there was a learner."""
    return Keys(run)


@pytest.fixture
def opened(server: Server, run: str) -> Iterator[ExitStack]:
    """Closes what `learner` and `worker` made, and then looks for keys that nobody declared to be lasting."""
    with ExitStack() as stack:
        yield stack
    for name in server.client.scan_iter(Keys(run).everything):
        short = name.decode().partition("}:")[2]
        assert LASTING.fullmatch(short) or server.client.pttl(name) > 0, f"{short} would stay for ever"


@pytest.fixture
def learner(server: Server, run: str, keys: Keys, opened: ExitStack) -> Callable[..., WorkerCommunicator]:
    """Makes learners of this test's run."""

    def make(num_workers: int = 2, **settings: Any) -> WorkerCommunicator:
        comm = opened.enter_context(
            WorkerCommunicator(
                num_workers, **{"run": run, "timeout": 5.0, **server.connection_settings(), **settings}
            )
        )
        if comm.run == run:
            keys.shards = comm._keys.shards
        return comm

    return make


@pytest.fixture
def worker(server: Server, run: str, opened: ExitStack) -> Callable[..., WorkerClient]:
    """Makes workers of this test's run."""

    def make(worker_id: int | None = None, **settings: Any) -> WorkerClient:
        return opened.enter_context(
            WorkerClient(
                worker_id=worker_id,
                **{"run": run, "timeout": 5.0, **server.connection_settings(), **settings},
            )
        )

    return make


def spread(keys: Keys, server: Server) -> Keys:
    """Spread the keys of a run that has no learner over a Cluster, as that would."""
    if server.kind == "cluster":
        keys.spread(keys.choose_shards(3, 3, lambda key: server.client.get_node_from_key(key).name))
    return keys


def wait_until(what: str, condition: Callable[[], Any], timeout_seconds: float = 10.0) -> Any:
    """Wait until a condition holds and give its value; fail with a description if it does not in time."""
    end = time.monotonic() + timeout_seconds
    while True:
        found = condition()
        if found:
            return found
        assert time.monotonic() < end, f"waited {timeout_seconds:g} s in vain until {what}"
        time.sleep(0.005)
