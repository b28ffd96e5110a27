"""What an examination says of several servers: of each that is not well by name, and of how they stand together."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import redis
from test_server_checks import facts

from rlbroker.backend.topology import Server
from rlbroker.errors import ConnectionFailed, PeerError
from rlbroker.ops.doctor.checks import Check
from rlbroker.ops.doctor.node_checks import Node, _of_lost, _replication, _together, of_all, of_clocks
from rlbroker.ops.doctor.server_checks import of_server
from rlbroker.ops.doctor.server_info import Latency

pytestmark = pytest.mark.unit


def node(port: int, *, master: Node | None = None, ahead: float | None = 0.0, **changes: Any) -> Node:
    server = Server(redis.Redis(), ("host", port))
    return Node(server, master.server if master else None, facts(**changes), Latency(0.001, 0.002, 20, ahead))


def together(code: str, *nodes: Node, at_once: bool = True) -> list[Check]:
    points = [(one, point) for one in nodes for point in of_server(one.facts) if point.code == code]
    return list(_together(points, at_once=at_once))


def test_what_is_wrong_with_one_node_is_said_of_it_and_mended_there() -> None:
    well, wrong = together("eviction", node(1), node(2, maxmemory_policy="allkeys-lru"), node(3))
    assert (well.state, well.what.startswith("2 other nodes, as host:1: ")) == ("ok", True)
    assert (wrong.state, wrong.what.partition(":2:")[0]) == ("critical", "host")
    assert wrong.hint == "redis-cli -h host -p 2 CONFIG SET maxmemory-policy noeviction"


def test_what_is_wrong_with_every_node_is_said_once() -> None:
    (point,) = together("eviction", *(node(port, maxmemory_policy="allkeys-lru") for port in (1, 2)))
    assert point.what.startswith("every node: maxmemory-policy allkeys-lru")
    assert point.hint == "redis-cli CONFIG SET maxmemory-policy noeviction"


def test_what_is_wrong_with_several_nodes_is_mended_at_each_where_no_command_reaches_all() -> None:
    wrong = [node(port, maxmemory_policy="allkeys-lru") for port in (1, 2)]
    at_each = "".join(
        f"redis-cli -h host -p {port} CONFIG SET maxmemory-policy noeviction\n" for port in (1, 2)
    )
    (all_of_them,) = together("eviction", *wrong, at_once=False)
    assert (all_of_them.what.partition(":")[0], all_of_them.hint) == ("every node", at_each.rstrip())
    for at_once in (True, False):
        some = together("eviction", *wrong, node(3), at_once=at_once)[0]
        assert (some.what.partition(": ")[0], some.hint) == ("host:1, host:2", at_each.rstrip())


def test_what_is_well_with_every_node_is_said_of_the_first() -> None:
    (same,) = together("eviction", node(1), node(2))
    assert same.what.startswith("maxmemory-policy noeviction")
    (other,) = together("memory", node(1, used_memory="5"), node(2))
    assert other.what == "host:1, as the fullest: 5 B of maxmemory 1 GB are used"


def test_clocks_that_are_apart_are_said_of_the_two_that_are_farthest() -> None:
    clock, clocks = of_clocks([node(1), node(2, ahead=-3.0), node(3, ahead=0.5)])
    assert (clock.state, clock.what.startswith("host:2, the farthest: ")) == ("warning", True)
    assert (clocks.code, clocks.state) == ("clocks", "warning")
    assert clocks.what.startswith("the clocks of host:2 and host:3 are 3.5 s apart")
    assert [one.state for one in of_clocks([node(1), node(2, ahead=0.5)])] == ["ok", "ok"]
    assert [one.state for one in of_clocks([node(1, ahead=None), node(2, ahead=None)])] == ["unknown"]


def test_a_master_that_nobody_could_replace_is_named() -> None:
    first, second = node(1), node(2)
    replicas = [node(3, master=first), node(4, master=second)]
    assert [one.state for one in _replication([first, second, *replicas])] == ["ok"]
    (alone,) = _replication([first, second, replicas[0]])
    assert (alone.state, alone.what.partition(":2:")[0]) == ("warning", "host")
    behind, alone = _replication(
        [first, second, replicas[0], node(4, master=second, master_link_status="down")]
    )
    assert (behind.state, behind.hint) == ("warning", "redis-cli -h host -p 4 INFO replication")
    assert alone.what.startswith("host:2: no replica could take its place")


@pytest.mark.parametrize(
    ("error", "state"),
    [(ConnectionFailed("away"), "critical"), (PeerError("away"), "critical"), (None, "warning")],
)
def test_one_that_the_others_go_on_without_is_named_whether_it_answers_or_not(
    error: PeerError | None, state: str
) -> None:
    def ask_at(*asked: Any) -> list[bytes]:
        if error:
            raise error
        return [b"PONG"]

    connection: Any = SimpleNamespace(servers=None, ask_at=ask_at)
    point = _of_lost(connection, node(4).server)
    assert (point.state, point.hint) == (state, "redis-cli CLUSTER NODES")
    assert point.what.startswith("host:4 does not answer: away; " if error else "host:4 answers, but ")


def test_a_run_may_use_the_memory_of_all_masters() -> None:
    first, second = node(1, maxmemory="100"), node(2, maxmemory="200")
    assert of_all([first, second, node(3, master=first, maxmemory="100")]).number("maxmemory") == 300
    assert of_all([first, node(2, maxmemory="0")]).number("maxmemory") == 0
