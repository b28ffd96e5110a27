"""The nodes of a Cluster and the slots of keys.

See https://redis.io/docs/latest/operate/oss_and_stack/reference/cluster-spec/.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Final

import redis
from redis import exceptions as redis_errors
from redis.crc import key_slot

from rlbroker.backend.deadline import Deadline, within
from rlbroker.backend.topology import (
    QUERY_TIMEOUT_SECONDS,
    UNREACHABLE,
    Address,
    DiscoveredTopology,
    MakeClient,
    Server,
    as_text,
    discovery_error,
    query,
)
from rlbroker.errors import ServerUnsuitable

#: Number of slots in a Cluster.
SLOTS: Final = 16_384


@lru_cache(maxsize=SLOTS)
def slot_of(key: str) -> int:
    """Return the slot of a key in a Cluster."""
    return key_slot(key.encode())


class ClusterTopology(DiscoveredTopology):
    """The masters of a Cluster with their slots and replicas."""

    several = True

    def __init__(self, make_client: MakeClient, seeds: Iterable[Address], address: str) -> None:
        """Create a topology; no node is asked yet.

        Args:
            seeds: the nodes that are asked first for the others.
            address: name of the Cluster in messages.
        """
        super().__init__(make_client, "nodes of the Cluster")
        self._seeds, self._address = tuple(seeds), address
        self._order: list[Address] = list(self._seeds)  #: the order in which nodes are asked
        self._owners: list[Server | None] = [None] * SLOTS
        self._masters: list[Server] = []  #: the owners of slots, each once
        self._replicas: dict[Address, list[Address]] = {}
        self._lost: list[Address] = []
        self._newest_term = 0  #: the highest config epoch that any node has reported

    def master_for(self, key: str) -> Server:
        """Return the master that has a key; any master for an empty key."""
        self._ensure_fresh()
        if not key:
            return self.masters()[0]
        slot = slot_of(key)
        found = self._owners[slot]
        if found is None:
            self._stale = True
            raise redis_errors.ConnectionError(f"no node of the Cluster has the slot {slot} now")
        return found

    def masters(self) -> Sequence[Server]:
        """Return every master."""
        self._ensure_fresh()
        return self._masters

    def replicas_of(self, master: Server) -> Sequence[Server]:
        """Return the replicas of a master."""
        return [self.at(one) for one in self._replicas.get(master.address or ("", 0), ())]

    def lost(self) -> Sequence[Server]:
        """Return the nodes without slots that the others consider failed: replicas, and masters after a failover."""
        return [self.at(one) for one in self._lost]

    def mark_stale(self, server: Server | None = None) -> None:
        """Read the roles again before they are next used; ask this server last."""
        if server is not None and server.address is not None:
            self._ask_last(server.address)
        super().mark_stale()

    def _ask_last(self, address: Address) -> None:
        self._order = [*(one for one in self._order if one != address), address]

    def note_moved(self, slot: int, address: Address) -> None:
        """Use the owner of a slot that a MOVED reply named, until the next refresh."""
        known = self._owners[slot]
        if known is None or known.address != address:
            self._owners[slot] = owner = self.at(address)
            if all(one.address != address for one in self._masters):
                self._masters = [*self._masters, owner]

    def _refresh(self) -> None:
        """Ask nodes until one answers that knows of the latest change and is not cut off from the other masters."""
        best: _NodeView | None = None
        without_slots: Address | None = None
        problems: list[redis_errors.RedisError | OSError | str] = []
        for address in list(dict.fromkeys((*self._order, *self._seeds))):
            try:
                with within(Deadline(QUERY_TIMEOUT_SECONDS)):
                    view = _NodeView(self._clients.at(address), address)
            except UNREACHABLE as error:
                problems.append(error)
                self._ask_last(address)
                continue
            except redis_errors.ResponseError as error:
                if unsuitable := self._unsuitable(address, error):
                    raise unsuitable from error
                raise
            if not view.ranges:
                problems.append(f"{address[0]}:{address[1]} knows of no node with slots")
                self._ask_last(address)
                without_slots = address
                continue
            if best is None or view.newest_term > best.newest_term:
                best = view
            if best is view and view.newest_term >= self._newest_term and not view.is_cut_off:
                break
        if best is None and without_slots and not self._masters:
            raise ServerUnsuitable(
                f"{self._address}: {without_slots[0]}:{without_slots[1]} is a node of a Cluster that has no slots yet; "
                "assign them with redis-cli --cluster create HOST:PORT HOST:PORT HOST:PORT"
            )
        if best is None:
            raise discovery_error("no node of the Cluster answers", problems)
        self._adopt(best)

    def _unsuitable(self, address: Address, error: redis_errors.ResponseError) -> ServerUnsuitable | None:
        name = f"{address[0]}:{address[1]}"
        if "cluster support disabled" in str(error):
            return ServerUnsuitable(
                f"{self._address}: {name} is a single server, not a node of a Cluster; write redis://{name}"
            )
        if "unknown command" in str(error).lower():
            return ServerUnsuitable(
                f"{self._address}: {name} is not a node of a Cluster, as it does not know CLUSTER SLOTS; for a "
                f"Sentinel write redis+sentinel://{name}/service, for a proxy the URL of the servers behind it"
            )
        return None

    def _adopt(self, view: _NodeView) -> None:
        owners: list[Server | None] = [None] * SLOTS
        masters = {
            one.master: Server(self._clients.at(one.master), one.master, one.term) for one in view.ranges
        }
        for one in view.ranges:
            owners[one.first : one.last + 1] = [masters[one.master]] * (one.last - one.first + 1)
        self._owners, self._masters, self._newest_term = owners, list(masters.values()), view.newest_term
        self._replicas = {one.master: one.replicas for one in view.ranges}
        self._lost = view.lost
        known = [address for one in view.ranges for address in (one.master, *one.replicas)]
        first = [view.address] if view.address in known else []
        in_order = [one for one in self._order if one in known]
        self._order = list(dict.fromkeys((*first, *in_order, *known)))


@dataclass(frozen=True)
class _SlotRange:
    """A range of slots with its master and replicas."""

    first: int
    last: int
    master: Address
    term: int
    replicas: list[Address]


class _NodeView:
    """The state of a Cluster as one node reports it."""

    def __init__(self, client: redis.Redis, address: Address) -> None:
        """Ask the node."""
        self.address = address
        slots = query(client, "CLUSTER SLOTS")
        nodes_by_place = query(client, "CLUSTER NODES")
        rows = list(nodes_by_place.values())
        terms = {row["node_id"]: int(row["epoch"]) for row in rows}
        masters = [row for row in rows if row["slots"]]
        self.newest_term = max(terms.values(), default=0)
        self.ranges = [
            _SlotRange(
                int(first),
                int(last),
                _address(nodes[0], address),
                terms.get(as_text(nodes[0][2]), 0),
                [_address(node, address) for node in nodes[1:]],
            )
            for first, last, *nodes in slots
        ]
        with_slots = {as_text(node[2]) for _, _, *nodes in slots for node in nodes}
        failed = [
            place.rpartition(":")
            for place, row in nodes_by_place.items()
            if row["node_id"] not in with_slots and "fail" in row["flags"] and "noaddr" not in row["flags"]
        ]
        #: Nodes that it considers failed; CLUSTER SLOTS leaves them out.
        self.lost = [_address((host, port), address) for host, _, port in failed]
        #: Whether it cannot reach most masters, which may have decided on a failover without it.
        self.is_cut_off = 2 * sum("fail" in row["flags"] for row in masters) >= max(1, len(masters))


def _address(node: Sequence[Any], asked: Address) -> Address:
    """Return a node's address from a reply; the node that was asked may not know its own host."""
    host = as_text(node[0])
    return (asked[0] if host in ("", "?") else host), int(node[1])
