"""The checks of several servers: a fault names its node, and clocks and replication are checked together."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import redis
from test_server_checks import server_info

from rlbroker.backend.topology import Server
from rlbroker.errors import ConnectionFailed, PeerError
from rlbroker.ops.doctor.checks import Check
from rlbroker.ops.doctor.node_checks import (
    Node,
    check_clocks,
    check_lost_node,
    check_replication,
    combine_masters,
    merge_checks,
)
from rlbroker.ops.doctor.server_checks import check_server
from rlbroker.ops.doctor.server_info import Latency

pytestmark = pytest.mark.unit


def make_node(port: int, *, master: Node | None = None, ahead: float | None = 0.0, **changes: Any) -> Node:
    server = Server(redis.Redis(), ("host", port))
    latency = Latency(0.001, 0.002, 20, ahead)
    return Node(server, master.server if master else None, server_info(**changes), latency)


def merged(code: str, *nodes: Node, reaches_all: bool = True) -> list[Check]:
    checks = [(node, check) for node in nodes for check in check_server(node.info) if check.code == code]
    return list(merge_checks(checks, reaches_all=reaches_all))


def test_a_fault_of_one_node_names_it_and_is_repaired_there() -> None:
    ok, fault = merged("eviction", make_node(1), make_node(2, maxmemory_policy="allkeys-lru"), make_node(3))
    assert (ok.state, ok.what.startswith("2 other nodes, such as host:1: ")) == ("ok", True)
    assert (fault.state, fault.what.partition(":2:")[0]) == ("critical", "host")
    assert fault.hint == "redis-cli -h host -p 2 CONFIG SET maxmemory-policy noeviction"


def test_a_fault_of_every_node_is_reported_once() -> None:
    (check,) = merged("eviction", *(make_node(port, maxmemory_policy="allkeys-lru") for port in (1, 2)))
    assert check.what.startswith("every node: maxmemory-policy allkeys-lru")
    assert check.hint == "redis-cli CONFIG SET maxmemory-policy noeviction"


def test_a_fault_of_several_nodes_is_repaired_at_each_unless_one_command_reaches_all() -> None:
    faulty = [make_node(port, maxmemory_policy="allkeys-lru") for port in (1, 2)]
    at_each = "\n".join(
        f"redis-cli -h host -p {port} CONFIG SET maxmemory-policy noeviction" for port in (1, 2)
    )
    (every_node,) = merged("eviction", *faulty, reaches_all=False)
    assert (every_node.what.partition(":")[0], every_node.hint) == ("every node", at_each)
    for reaches_all in (True, False):
        some_nodes = merged("eviction", *faulty, make_node(3), reaches_all=reaches_all)[0]
        assert (some_nodes.what.partition(": ")[0], some_nodes.hint) == ("host:1, host:2", at_each)


def test_nodes_that_are_all_ok_are_reported_once_by_the_first() -> None:
    (equal,) = merged("eviction", make_node(1), make_node(2))
    assert equal.what.startswith("maxmemory-policy noeviction")
    (different,) = merged("memory", make_node(1, used_memory="5"), make_node(2))
    assert different.what == "host:1, the fullest: 5 B of maxmemory 1 GB are used"


def test_clocks_that_are_apart_name_the_two_farthest_nodes() -> None:
    clock, clocks = check_clocks([make_node(1), make_node(2, ahead=-3.0), make_node(3, ahead=0.5)])
    assert (clock.state, clock.what.startswith("host:2, the farthest: ")) == ("warning", True)
    assert (clocks.code, clocks.state) == ("clocks", "warning")
    assert clocks.what.startswith("the clocks of host:2 and host:3 are 3.5 s apart")
    close = check_clocks([make_node(1), make_node(2, ahead=0.5)])
    assert [check.state for check in close] == ["ok", "ok"]
    unknown = check_clocks([make_node(1, ahead=None), make_node(2, ahead=None)])
    assert [check.state for check in unknown] == ["unknown"]


def test_a_master_without_a_replica_to_replace_it_is_named() -> None:
    first, second = make_node(1), make_node(2)
    replicas = [make_node(3, master=first), make_node(4, master=second)]
    assert [check.state for check in check_replication([first, second, *replicas])] == ["ok"]
    (alone,) = check_replication([first, second, replicas[0]])
    assert (alone.state, alone.what.partition(":2:")[0]) == ("warning", "host")
    disconnected = make_node(4, master=second, master_link_status="down")
    behind, alone = check_replication([first, second, replicas[0], disconnected])
    assert (behind.state, behind.hint) == ("warning", "redis-cli -h host -p 4 INFO replication")
    assert alone.what.startswith("host:2: no replica could replace it")


@pytest.mark.parametrize(
    ("error", "state"),
    [(ConnectionFailed("away"), "critical"), (PeerError("away"), "critical"), (None, "warning")],
)
def test_a_node_that_the_others_continue_without_is_named_whether_it_answers_or_not(
    error: PeerError | None, state: str
) -> None:
    def execute_at(*arguments: Any) -> list[bytes]:
        if error:
            raise error
        return [b"PONG"]

    connection: Any = SimpleNamespace(servers=None, execute_at=execute_at)
    check = check_lost_node(connection, make_node(4).server)
    assert (check.state, check.hint) == (state, "redis-cli CLUSTER NODES")
    assert check.what.startswith("host:4 does not answer: away; " if error else "host:4 answers, but ")


def test_a_run_may_use_the_memory_of_all_masters() -> None:
    first, second = make_node(1, maxmemory="100"), make_node(2, maxmemory="200")
    nodes = [first, second, make_node(3, master=first, maxmemory="100")]
    assert combine_masters(nodes).number("maxmemory") == 300
    assert combine_masters([first, make_node(2, maxmemory="0")]).number("maxmemory") == 0
