"""Options and fixtures of all tests: each test has its own run, on fakeredis, a server, a Cluster or Sentinels."""

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

#: Not a test module, and it needs a package that only fuzzing uses.
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
        help="engines for scenarios and tests that support each engine",
    )
    faults.addoption(
        "--everywhere",
        action="store_true",
        help="run all tests that support the engines on them, not only a selection",
    )
    faults.addoption(
        "--soak", type=float, default=0.0, metavar="MINUTES", help="inject all faults at random for this long"
    )
    faults.addoption(
        "--figures",
        metavar="FILE",
        help="append the measurements of each scenario to this file, as lines of JSON",
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
    """Return the servers for a test: a fake, a real server, and engines of each chosen kind of server."""
    option, mark = metafunc.config.getoption, metafunc.definition.get_closest_marker
    always = ["real"] if "reachable" in metafunc.fixturenames else ["fake", "real"]
    if not (option("--everywhere") or mark("on_every_engine")):
        return always
    several = [one for one in option("--engines").split(",") if one != "single"]
    return [*always, *(f"{one}:{kind}" for kind in option("--servers").split(",") for one in several)]


_numbers = itertools.count(1)

#: Keys that may lack an expiry; all others must have one.
LASTING = re.compile(
    r"meta|weights|ctl|workers|shards|pending|missed|(x|counts|epochs|dead|again|ack|ledger|life|history):\d+|w:\d+-\d+-\d+:\d+"
)


class Server(Protocol):
    """A server for runs: the settings to connect to it, and a client to inspect it."""

    kind: str
    client: Any

    def connection_settings(self) -> dict[str, Any]:
        """Return the arguments with which a `WorkerCommunicator` or `WorkerClient` connects."""

    def another_client(self) -> Any:
        """Return a redis-py client without retries."""


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
        """Return a redis-py client with its own defaults, as users create it."""
        return redis.Redis.from_url(self.url, **settings)

    def another_client(self) -> Any:
        return self.new_client(protocol=2, retry=Retry(NoBackoff(), 0))


class ClusterServer:
    """A Cluster."""

    kind = "cluster"

    def __init__(self, cluster: Cluster) -> None:
        self.engine, self._node = cluster, cluster.nodes[0].address
        self.url = cluster.url
        self.client: Any = self.new_client(protocol=2)

    def connection_settings(self) -> dict[str, Any]:
        return {"redis_url": self.url}

    def new_client(self, **settings: Any) -> Any:
        """Return a redis-py client with its own defaults, as users create it."""
        host, port = self._node
        return redis.RedisCluster(host=host, port=port, **settings)

    def another_client(self) -> Any:
        return self.new_client(protocol=2, retry=Retry(NoBackoff(), 0))


class TrioServer:
    """The master that the Sentinels of a trio name."""

    kind = "sentinel"

    def __init__(self, trio: SentinelTrio) -> None:
        self.engine = trio
        self._sentinels, self._service = [one.address for one in trio.sentinels], trio.service
        for sentinel in trio.sentinels:  # a busy machine must not cause a failover
            sentinel.ask("SENTINEL", "SET", trio.service, "down-after-milliseconds", 60_000)
        self.url = trio.url
        self.client: Any = self.new_client(protocol=2)

    def connection_settings(self) -> dict[str, Any]:
        return {"redis_url": self.url}

    def new_client(self, **settings: Any) -> Any:
        """Return a redis-py client with its own defaults, as users create it."""
        make: Any = Sentinel
        return make(self._sentinels).master_for(self._service, **settings)

    def another_client(self) -> Any:
        return self.new_client(protocol=2, retry=Retry(NoBackoff(), 0))


Reachable = RealServer | ClusterServer | TrioServer


@pytest.fixture(scope="session")
def embedded() -> Iterator[RedisServer]:
    """A real server for the whole session. Tests fail, not skip, without one."""
    with RedisServer() as server:
        yield server


@pytest.fixture
def real_server(embedded: RedisServer) -> Iterator[RealServer]:
    server = RealServer(embedded)
    server.client.flushall()  # a module may have left its shared run
    yield server
    server.client.flushall()
    server.client.close()


@pytest.fixture(scope="session")
def start_engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str, str], Server]]:
    """Starts an engine of a kind of server at the first call, and keeps it for the whole session."""
    with ExitStack() as stack:

        @cache
        def start(engine: str, kind: str) -> Server:
            binary = find_server_binary(kind)
            assert binary is not None, f"{kind} is missing; install it: {KINDS[kind]}"
            folder = tmp_path_factory.mktemp(engine)
            if engine == "cluster":
                timeout = "--cluster-node-timeout", "60000"  # a busy machine must not cause a failover
                made = ClusterServer(stack.enter_context(Cluster(binary, folder, 3, 1, *timeout)))
                made.client.flushall()  # nodes list a replica only when they know its offset
                wait_until("each node lists all nodes", partial(_each_lists_all_nodes, made.engine), 30.0)
                return made
            return TrioServer(stack.enter_context(SentinelTrio(binary, folder)))

        yield start


def _each_lists_all_nodes(made: Cluster) -> bool:
    replies = [str(node.ask("CLUSTER", "SLOTS")) for node in made.nodes]
    return all(f", {node.port}," in reply for reply in replies for node in made.nodes)


@pytest.fixture
def cluster(start_engine: Callable[[str, str], ClusterServer], server_kind: str) -> Iterator[ClusterServer]:
    """A Cluster without keys, of the chosen kind of server."""
    found = start_engine("cluster", server_kind)
    found.client.flushall()
    yield found
    found.client.flushall()


@pytest.fixture
def server(place: str, request: pytest.FixtureRequest) -> Iterator[Server]:
    """A server of each kind; RLBROKER_ALLOW_FAKE=1 skips the real ones."""
    if place == "fake":
        yield FakeServer()
        return
    if os.environ.get("RLBROKER_ALLOW_FAKE") == "1":
        pytest.skip("RLBROKER_ALLOW_FAKE=1 skips real servers")
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
    """A server that other processes can reach: any kind except a fake."""
    return server


@pytest.fixture
def run() -> str:
    """A run name that no other test uses."""
    return f"test-{next(_numbers)}"


@pytest.fixture
def keys(run: str) -> Keys:
    """The keys of this test's run; the shards on a Cluster are known after the fixture `learner` made a learner."""
    return Keys(run)


@pytest.fixture
def opened(server: Server, run: str) -> Iterator[ExitStack]:
    """Closes what `learner` and `worker` made, then checks that all remaining keys expire or may stay."""
    with ExitStack() as stack:
        yield stack
    for name in server.client.scan_iter(Keys(run).everything):
        short = name.decode().partition("}:")[2]
        assert LASTING.fullmatch(short) or server.client.pttl(name) > 0, f"{short} has no expiry"


@pytest.fixture
def learner(server: Server, run: str, keys: Keys, opened: ExitStack) -> Callable[..., WorkerCommunicator]:
    """Makes learners of the test's run."""

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
    """Makes workers of the test's run."""

    def make(worker_id: int | None = None, **settings: Any) -> WorkerClient:
        return opened.enter_context(
            WorkerClient(
                worker_id=worker_id,
                **{"run": run, "timeout": 5.0, **server.connection_settings(), **settings},
            )
        )

    return make


def spread(keys: Keys, server: Server) -> Keys:
    """Choose shards on a Cluster, as a learner does, for a run without a learner."""
    if server.kind == "cluster":
        keys.use_shards(keys.choose_shards(3, 3, lambda key: server.client.get_node_from_key(key).name))
    return keys


def wait_until(what: str, condition: Callable[[], Any], timeout_seconds: float = 10.0) -> Any:
    """Wait until a condition holds and return its value; fail if it times out."""
    end = time.monotonic() + timeout_seconds
    while True:
        found = condition()
        if found:
            return found
        assert time.monotonic() < end, f"timed out after {timeout_seconds:g} s waiting until {what}"
        time.sleep(0.005)
