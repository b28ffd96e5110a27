"""The checks of a Cluster or of servers behind Sentinels: each node, their clocks, replication and failover."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Final

from rlbroker.backend.cluster import SLOTS
from rlbroker.backend.connection import Connection
from rlbroker.backend.deadline import Deadline, within
from rlbroker.backend.replies import info_fields
from rlbroker.backend.sentinel import SentinelTopology
from rlbroker.backend.text import counted
from rlbroker.backend.topology import Address, Server
from rlbroker.errors import AccessDenied, ConnectionFailed, PeerError
from rlbroker.ops.doctor.checks import Check, unreadable_check
from rlbroker.ops.doctor.server_checks import CLOCKS_APART_SECONDS, check_clock, check_latency, check_server
from rlbroker.ops.doctor.server_info import Latency, ServerInfo, measure_latency, read_server_info

#: Timeout for one node, to leave time for the others.
NODE_TIMEOUT_SECONDS: Final = 1.0

#: With fewer masters, those that remain after the loss of one are no majority.
LEAST_MASTERS: Final = 3

#: The check of all nodes together that replaces the one of each node.
_REPLICATION: Final = "replication"


@dataclass(frozen=True)
class Node:
    """One of several servers.

    Attributes:
        master: its master; None if it is a master itself.
    """

    server: Server
    master: Server | None
    info: ServerInfo
    latency: Latency

    @property
    def name(self) -> str:
        """The name of the server."""
        return self.server.name


def read_nodes(connection: Connection) -> tuple[list[Node], list[Check]]:
    """Read every master and replica; return a check for each node that does not answer.

    Raises:
        ConnectionFailed: the nodes are unknown, or none answers.
    """
    nodes, checks = list[Node](), list[Check]()
    problem: ConnectionFailed | None = None
    known = set[str]()
    for master in connection.retry(connection.masters):
        for server in (master, *connection.replicas_of(master)):
            known.add(server.name)
            try:
                with within(Deadline(NODE_TIMEOUT_SECONDS)):
                    info = read_server_info(connection, server)
                latency = measure_latency(connection, server)
            except ConnectionFailed as error:
                problem = error
                checks.append(Check("nodes", "critical", f"{server.name} does not answer: {error}"))
            else:
                nodes.append(Node(server, None if server is master else master, info, latency))
    if problem is not None and not nodes:
        raise problem
    lost = [server for server in connection.servers.lost() if server.name not in known]
    return nodes, [*checks, *(check_lost_node(connection, server) for server in lost)]


def check_nodes(connection: Connection, nodes: Sequence[Node]) -> Iterator[Check]:
    """Check several servers: report faults by node, and what is ok once."""
    slowest = max(nodes, key=lambda node: node.latency.median_seconds)
    yield _with_name(check_latency(slowest.latency), f"{slowest.name}, the slowest")
    by_memory = sorted(nodes, key=lambda node: node.info.number("used_memory") or 0, reverse=True)
    checks = [(node, check) for node in by_memory for check in check_server(node.info)]
    for code in dict.fromkeys(check.code for _, check in checks):
        if code != _REPLICATION:
            same_code = [(node, check) for node, check in checks if check.code == code]
            yield from merge_checks(same_code, reaches_all=connection.servers.several)
    if connection.servers.several:
        yield _check_cluster(connection, nodes)
    if isinstance(connection.servers, SentinelTopology):
        yield _check_sentinels(connection.servers)
    yield from check_replication(nodes)


def check_clocks(nodes: Sequence[Node]) -> Iterator[Check]:
    """Check this machine's clock against that of each node, and the nodes' clocks against one another."""
    ahead = {
        node.name: node.latency.ahead_seconds for node in nodes if node.latency.ahead_seconds is not None
    }
    farthest = max(nodes, key=lambda node: abs(node.latency.ahead_seconds or 0.0))
    yield _with_name(check_clock(farthest.latency, farthest.info), f"{farthest.name}, the farthest")
    if len(ahead) < 2:
        return
    first, last = max(ahead, key=ahead.__getitem__), min(ahead, key=ahead.__getitem__)
    apart_seconds = ahead[first] - ahead[last]
    if apart_seconds <= CLOCKS_APART_SECONDS:
        what = f"the clocks of {len(ahead):,} nodes are at most {apart_seconds * 1000:.0f} ms apart"
        yield Check("clocks", "ok", what)
        return
    what = (
        f"the clocks of {last} and {first} are {apart_seconds:,.1f} s apart: after a failover the age of every "
        "heartbeat is wrong by that; set the clock of each machine"
    )
    yield Check("clocks", "warning", what, "timedatectl set-ntp true")


def combine_masters(nodes: Sequence[Node]) -> ServerInfo:
    """Return the info of the first master, with the sum of all masters' memory limits: a run may use them all."""
    masters = [node.info for node in nodes if node.master is None] or [nodes[0].info]
    limits = [info.number("maxmemory") for info in masters]
    if None in limits:
        return masters[0]
    total = sum(filter(None, limits)) if all(limits) else 0
    return replace(masters[0], fields={**masters[0].fields, "maxmemory": str(total)})


def hint_at_each_node(connection: Connection, nodes: Sequence[Node], check: Check) -> Check:
    """Return a check with a hint for each node, except in a Cluster, where one command reaches all nodes."""
    return check if connection.servers.several else replace(check, hint=_repeat_hint(nodes, check.hint))


def merge_checks(checks: Sequence[tuple[Node, Check]], *, reaches_all: bool) -> Iterator[Check]:
    """Merge equal checks of several nodes into one; of nodes that are ok, only the first is reported.

    Args:
        checks: the checks of every node, all with the same code.
        reaches_all: whether one redis-cli command reaches every node, as in a Cluster.
    """
    by_result: dict[tuple[str, str, str], list[Node]] = {}
    for node, check in checks:
        result = ("ok", "", "") if check.state == "ok" else (check.state, check.what, check.hint)
        by_result.setdefault(result, []).append(node)
    by_node = {node.name: check for node, check in checks}
    for (state, _, hint), nodes in by_result.items():
        check = by_node[nodes[0].name]
        if len(nodes) == len(checks) and state != "ok":
            prefix, hint = "every node: ", hint if reaches_all else _repeat_hint(nodes, hint)
        elif len(nodes) == len(checks):
            all_equal = len({one.what for one in by_node.values()}) == 1
            prefix = "" if all_equal else f"{nodes[0].name}, the fullest: "
        elif state == "ok":
            prefix = f"{counted(len(nodes), 'other node')}, such as {nodes[0].name}: "
        else:
            prefix, hint = f"{', '.join(node.name for node in nodes)}: ", _repeat_hint(nodes, hint)
        yield replace(check, what=f"{prefix}{check.what}", hint=hint)


def check_replication(nodes: Sequence[Node]) -> Iterator[Check]:
    """Check that each master has a connected replica, which can replace it."""
    replicas = [node for node in nodes if node.master is not None]
    behind = [node for node in replicas if node.info.fields.get("master_link_status", "up") != "up"]
    for node in behind:
        what = f"{node.name} is disconnected from its master: it cannot replace it, and confirms nothing"
        yield Check(
            _REPLICATION, "warning", what, _add_address(node.server.address, "redis-cli INFO replication")
        )
    ready = {node.master for node in replicas if node not in behind}
    alone = [node.name for node in nodes if node.master is None and node.server not in ready]
    if alone:
        what = (
            f"{', '.join(alone)}: no replica could replace it; if it dies, its part of the runs is lost, and "
            "level='replica' is never confirmed"
        )
        yield Check(_REPLICATION, "warning", what)
    elif not behind:
        what = f"{counted(len(replicas), 'replica')} connected: each master has at least one"
        yield Check(_REPLICATION, "ok", what)


def check_lost_node(connection: Connection, server: Server) -> Check:
    """Check a node that the others know and consider lost."""
    if isinstance(connection.servers, SentinelTopology):
        others, forget = "the Sentinels", "SENTINEL RESET at one Sentinel after the other"
        sentinel, service = connection.servers.sentinels[0].address, connection.servers.service
        hint = _add_address(sentinel, f"redis-cli SENTINEL REPLICAS {service}")
    else:
        others, forget, hint = "the other nodes", "CLUSTER FORGET at each of them", "redis-cli CLUSTER NODES"
    try:
        with within(Deadline(NODE_TIMEOUT_SECONDS)):
            connection.execute_at(server, [("PING",)])
    except PeerError as error:
        what = (
            f"{server.name} does not answer: {error}; {others} continue without it, and list it until {forget} "
            "removes it"
        )
        return Check("nodes", "critical", what, hint)
    what = (
        f"{server.name} answers, but {others} continue without it: they do not reach it, or it does not reach its "
        "master"
    )
    return Check("nodes", "warning", what, hint)


def _check_cluster(connection: Connection, nodes: Sequence[Node]) -> Check:
    """Check that each node of a Cluster sees all slots served, and how many masters serve them."""
    down, info = dict[str, dict[str, str]](), dict[str, str]()
    for node in nodes:
        try:
            (reply,) = connection.execute_at(node.server, [("CLUSTER", "INFO")])
        except ConnectionFailed as error:
            reply = error
        if isinstance(reply, AccessDenied):
            return unreadable_check("cluster", "whether all slots are served is unknown", reply)
        info = {} if isinstance(reply, PeerError) else info_fields(reply)
        if info.get("cluster_state") != "ok" or info.get("cluster_slots_ok") != str(SLOTS):
            down[node.name] = info
    if down:
        name, info = next(iter(down.items()))
        what = (
            f"{', '.join(down)}: cluster_state {info.get('cluster_state', 'unknown')}, "
            f"{info.get('cluster_slots_ok', 'unknown')} of {SLOTS:,} slots are served; data in the others is "
            "unavailable"
        )
        address = next(node.server.address for node in nodes if node.name == name)
        return Check("cluster", "critical", what, _add_address(address, "redis-cli CLUSTER NODES"))
    masters = int(info["cluster_size"])
    if masters < LEAST_MASTERS:
        what = (
            f"only {counted(masters, 'master has', 'masters have')} slots: if one dies, the rest is no majority, so no "
            "replica is promoted, and the Cluster is down until it is back"
        )
        return Check("cluster", "warning", what, "redis-cli CLUSTER NODES")
    replicas = sum(node.master is not None for node in nodes)
    what = f"{counted(masters, 'master')} and {counted(replicas, 'replica')} serve all {SLOTS:,} slots"
    if "+cluster:" not in connection.address:
        what += "; the URL names only one node, but redis+cluster://host:port,host:port can name several"
    return Check("cluster", "ok", what)


def _check_sentinels(topology: SentinelTopology) -> Check:
    """Check that enough Sentinels answer to promote a replica."""
    found = topology.view_sentinels()
    answering = f"{found.alive} of {counted(found.total, 'Sentinel')}"
    if found.silent:
        verb = "does" if len(found.silent) == 1 else "do"
        answering = f"{', '.join(found.silent)} {verb} not answer: {answering}"
    hint = _add_address(topology.sentinels[0].address, f"redis-cli SENTINEL CKQUORUM {topology.service}")
    if found.refusal or found.alive < found.needed:
        what = (
            f"{answering} {'answers' if found.alive == 1 else 'answer'}, but {found.needed} must agree to promote a "
            "replica: if the master dies, none replaces it"
        )
        return Check("sentinels", "critical", f"{what} ({found.refusal})" if found.refusal else what, hint)
    what = f"{answering} answer, and {found.needed} are enough to promote a replica"
    return Check("sentinels", "warning" if found.silent else "ok", what, hint if found.silent else "")


def _with_name(check: Check, name: str) -> Check:
    return replace(check, what=f"{name}: {check.what}")


def _add_address(address: Address | None, hint: str) -> str:
    """Return a redis-cli hint that connects to one node."""
    arguments = hint.removeprefix("redis-cli ")
    if address is None or arguments == hint:
        return hint
    return f"redis-cli -h {address[0]} -p {address[1]} {arguments}"


def _repeat_hint(nodes: Sequence[Node], hint: str) -> str:
    """Return a hint with one line for each node."""
    return "\n".join(dict.fromkeys(_add_address(node.server.address, hint) for node in nodes))
