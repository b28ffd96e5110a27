"""What an examination says of several servers: of each as of one alone, and of how they stand to one another."""

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
from rlbroker.ops.doctor.checks import Check, unread
from rlbroker.ops.doctor.server_checks import CLOCKS_APART_SECONDS, of_clock, of_latency, of_server
from rlbroker.ops.doctor.server_info import Latency, ServerInfo, measure_latency, read_server_info

#: A node that does not answer within this time is said to be silent, so that there is time for the others.
LONGEST_SILENCE_SECONDS: Final = 1.0

#: With fewer masters, those that are left when one dies are no majority.
LEAST_MASTERS: Final = 3

#: What is said of how the nodes stand to one another replaces what each says of it.
_OF_ALL: Final = "replication"


@dataclass(frozen=True)
class Node:
    """One of several servers, as it answered.

    Attributes:
        server: way to it.
        master: of whom it is a replica; None for a master.
        facts: what it says of itself.
        latency: how long it takes to answer, and its clock.
    """

    server: Server
    master: Server | None
    facts: ServerInfo
    latency: Latency

    @property
    def name(self) -> str:
        """How it is called."""
        return self.server.name


def look_at_nodes(connection: Connection) -> tuple[list[Node], list[Check]]:
    """Ask every master and every replica for what it says of itself; give a point for each that is silent.

    Raises:
        ConnectionFailed: nobody knows which they are, or none answers.
    """
    nodes, silent = list[Node](), list[Check]()
    problem: ConnectionFailed | None = None
    asked = set[str]()
    for master in connection.retry(connection.masters):
        for server in (master, *connection.replicas_of(master)):
            asked.add(server.name)
            try:
                with within(Deadline(LONGEST_SILENCE_SECONDS)):
                    facts = read_server_info(connection, server)
                latency = measure_latency(connection, server)
            except ConnectionFailed as error:
                problem = error
                silent.append(Check("nodes", "critical", f"{server.name} does not answer: {error}"))
            else:
                nodes.append(Node(server, None if server is master else master, facts, latency))
    if problem is not None and not nodes:
        raise problem
    silent += [_of_lost(connection, one) for one in connection.servers.lost() if one.name not in asked]
    return nodes, silent


def _of_lost(connection: Connection, server: Server) -> Check:
    """Look at one whom the others know, and do without."""
    if isinstance(connection.servers, SentinelTopology):
        others, forget = "the Sentinels", "SENTINEL RESET at one Sentinel after the other"
        sentinel, service = connection.servers.sentinels[0].address, connection.servers.service
        hint = _hint_at(sentinel, f"redis-cli SENTINEL REPLICAS {service}")
    else:
        others, forget, hint = "the other nodes", "CLUSTER FORGET at each", "redis-cli CLUSTER NODES"
    try:
        with within(Deadline(LONGEST_SILENCE_SECONDS)):
            connection.ask_at(server, [("PING",)])
    except PeerError as error:
        what = (
            f"{server.name} does not answer: {error}; {others} go on without it, and remember it until {forget} "
            "has them forget it"
        )
        return Check("nodes", "critical", what, hint)
    what = f"{server.name} answers, but {others} do without it: they do not reach it, or it does not reach its master"
    return Check("nodes", "warning", what, hint)


def of_nodes(connection: Connection, nodes: Sequence[Node]) -> Iterator[Check]:
    """Judge several servers: what is wrong with any of them is said of it, what is well is said once."""
    slowest = max(nodes, key=lambda one: one.latency.median_seconds)
    yield _called(of_latency(slowest.latency), f"{slowest.name}, the slowest")
    by_memory = sorted(nodes, key=lambda one: one.facts.number("used_memory") or 0, reverse=True)
    points = [[(one, point) for point in of_server(one.facts)] for one in by_memory]
    for code in dict.fromkeys(point.code for of_one in points for _, point in of_one):
        if code != _OF_ALL:
            yield from _together(
                [(one, point) for of_one in points for one, point in of_one if point.code == code],
                at_once=connection.servers.several,
            )
    if connection.servers.several:
        yield _cluster(connection, nodes)
    if isinstance(connection.servers, SentinelTopology):
        yield _sentinels(connection.servers)
    yield from _replication(nodes)


def of_clocks(nodes: Sequence[Node]) -> Iterator[Check]:
    """Judge this machine's clock against each node's, and theirs against one another."""
    ahead = {one.name: one.latency.ahead_seconds for one in nodes if one.latency.ahead_seconds is not None}
    farthest = max(nodes, key=lambda one: abs(one.latency.ahead_seconds or 0.0))
    yield _called(of_clock(farthest.latency, farthest.facts), f"{farthest.name}, the farthest")
    if len(ahead) < 2:
        return
    first, last = max(ahead, key=ahead.__getitem__), min(ahead, key=ahead.__getitem__)
    apart_seconds = ahead[first] - ahead[last]
    if apart_seconds <= CLOCKS_APART_SECONDS:
        yield Check(
            "clocks",
            "ok",
            f"the clocks of {len(ahead):,} nodes are at most {apart_seconds * 1000:.0f} ms apart",
        )
        return
    what = (
        f"the clocks of {last} and {first} are {apart_seconds:,.1f} s apart: when one takes the other's place, whoever "
        "lives seems silent, or heard of in the future, by that; set them on each machine"
    )
    yield Check("clocks", "warning", what, "timedatectl set-ntp true")


def of_all(nodes: Sequence[Node]) -> ServerInfo:
    """Give the facts of the masters together: a run may use the memory of all."""
    masters = [one.facts for one in nodes if one.master is None] or [nodes[0].facts]
    limits = [one.number("maxmemory") for one in masters]
    if None in limits:
        return masters[0]
    total = sum(filter(None, limits)) if all(limits) else 0
    return replace(masters[0], info={**masters[0].info, "maxmemory": str(total)})


def at_each(connection: Connection, nodes: Sequence[Node], point: Check) -> Check:
    """Have what is wrong everywhere mended at each node, unless one command reaches all: those of a Cluster."""
    return point if connection.servers.several else replace(point, hint=_hint_at_each(nodes, point.hint))


def _called(point: Check, name: str) -> Check:
    return replace(point, what=f"{name}: {point.what}")


def _together(points: Sequence[tuple[Node, Check]], *, at_once: bool) -> Iterator[Check]:
    """Give one point for all who say the same; of those that are well, the first speaks for the others.

    Args:
        points: of one kind, of every node.
        at_once: whether one command for redis-cli reaches every node: those of a Cluster.
    """
    by_words: dict[tuple[str, str, str], list[Node]] = {}
    for node, point in points:
        words = ("ok", "", "") if point.state == "ok" else (point.state, point.what, point.hint)
        by_words.setdefault(words, []).append(node)
    said = {node.name: point for node, point in points}
    for (state, _, hint), nodes in by_words.items():
        point = said[nodes[0].name]
        if len(nodes) == len(points) and state != "ok":
            who, hint = "every node: ", hint if at_once else _hint_at_each(nodes, hint)
        elif len(nodes) == len(points):
            who = (
                "" if len({one.what for one in said.values()}) == 1 else f"{nodes[0].name}, as the fullest: "
            )
        elif state == "ok":
            who = f"{counted(len(nodes), 'other node')}, as {nodes[0].name}: "
        else:
            who, hint = f"{', '.join(one.name for one in nodes)}: ", _hint_at_each(nodes, hint)
        yield replace(point, what=f"{who}{point.what}", hint=hint)


def _hint_at(address: Address | None, hint: str) -> str:
    """Lead a hint for redis-cli to one node."""
    words = hint.removeprefix("redis-cli ")
    if address is None or words == hint:
        return hint
    return f"redis-cli -h {address[0]} -p {address[1]} {words}"


def _hint_at_each(nodes: Sequence[Node], hint: str) -> str:
    """Lead a hint to several nodes, with a line for each."""
    return "\n".join(dict.fromkeys(_hint_at(one.server.address, hint) for one in nodes))


def _cluster(connection: Connection, nodes: Sequence[Node]) -> Check:
    """Ask each node whether all slots are served, and by how many."""
    down, told = dict[str, dict[str, str]](), dict[str, str]()
    for node in nodes:
        try:
            (reply,) = connection.ask_at(node.server, [("CLUSTER", "INFO")])
        except ConnectionFailed as error:
            reply = error
        if isinstance(reply, AccessDenied):
            return unread("cluster", "whether all slots are served is not known", reply)
        told = {} if isinstance(reply, PeerError) else info_fields(reply)
        if told.get("cluster_state") != "ok" or told.get("cluster_slots_ok") != str(SLOTS):
            down[node.name] = told
    if down:
        name, told = next(iter(down.items()))
        what = (
            f"{', '.join(down)}: cluster_state {told.get('cluster_state', 'unknown')}, "
            f"{told.get('cluster_slots_ok', 'unknown')} of {SLOTS:,} slots are served: what is in the others is away"
        )
        address = next(one.server.address for one in nodes if one.name == name)
        return Check("cluster", "critical", what, _hint_at(address, "redis-cli CLUSTER NODES"))
    masters = int(told["cluster_size"])
    if masters < LEAST_MASTERS:
        what = (
            f"only {counted(masters, 'master has', 'masters have')} slots: when one is gone, those left are no "
            "majority that could let a replica take its place, and the Cluster is down until it is back"
        )
        return Check("cluster", "warning", what, "redis-cli CLUSTER NODES")
    replicas = sum(one.master is not None for one in nodes)
    what = f"{counted(masters, 'master')} and {counted(replicas, 'replica')} serve all {SLOTS:,} slots"
    if "+cluster:" not in connection.address:
        what += ", found by the one that the URL names; redis+cluster://host:port,host:port can name several"
    return Check("cluster", "ok", what)


def _sentinels(servers: SentinelTopology) -> Check:
    """Look whether enough Sentinels are there to choose another master."""
    found = servers.view_sentinels()
    there = f"{found.alive} of {counted(found.total, 'Sentinel')}"
    if found.silent:
        there = f"{', '.join(found.silent)} {'does' if len(found.silent) == 1 else 'do'} not answer: {there}"
    hint = _hint_at(servers.sentinels[0].address, f"redis-cli SENTINEL CKQUORUM {servers.service}")
    if found.refusal or found.alive < found.needed:
        what = (
            f"{there} {'is' if found.alive == 1 else 'are'} there, and {found.needed} have to agree before a replica "
            "takes the master's place: when it is gone, nobody does"
        )
        return Check("sentinels", "critical", f"{what} ({found.refusal})" if found.refusal else what, hint)
    what = f"{there} are there, and {found.needed} are enough to have a replica take the master's place"
    return Check("sentinels", "warning" if found.silent else "ok", what, hint if found.silent else "")


def _replication(nodes: Sequence[Node]) -> Iterator[Check]:
    """Look whether each master has a replica that could take its place."""
    replicas = [one for one in nodes if one.master is not None]
    behind = [one for one in replicas if one.facts.info.get("master_link_status", "up") != "up"]
    for one in behind:
        what = f"{one.name} is not in step with its master: it could not take its place, and confirms nothing"
        yield Check(_OF_ALL, "warning", what, _hint_at(one.server.address, "redis-cli INFO replication"))
    ready = {one.master for one in replicas if one not in behind}
    alone = [one.name for one in nodes if one.master is None and one.server not in ready]
    if alone:
        what = (
            f"{', '.join(alone)}: no replica could take its place; when it is gone, so is its part of the runs, and "
            "level='replica' is never confirmed"
        )
        yield Check(_OF_ALL, "warning", what)
    elif not behind:
        yield Check(
            _OF_ALL, "ok", f"{counted(len(replicas), 'replica')} in step: each master has one at least"
        )
