"""A Redis Cluster of real servers, each of which can be killed, frozen or cut off by itself."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import redis
from nodes import Node, NodeGroup, cut_off, launch_nodes, wait_for

SLOTS = 16384


class Cluster(NodeGroup):
    """Masters with replicas; the slots are divided evenly among the masters."""

    def __init__(self, binary: Path, folder: Path, masters: int = 3, replicas: int = 1, *config: str) -> None:
        """Prepare a Cluster without starting it.

        Args:
            binary: the program.
            folder: the parent of the nodes' folders.
            masters: the number of masters.
            replicas: the number of replicas of each master.
            config: further command-line options, for example `--cluster-node-timeout 1000`.
        """
        options = (
            *("--cluster-enabled", "yes", "--cluster-node-timeout", "2000"),
            *("--cluster-replica-validity-factor", "0", "--repl-diskless-sync-delay", "0", *config),
        )
        self._masters = masters
        self._new_node: Callable[[int], Node] = lambda number: Node(
            binary, folder / f"node-{number}", *options
        )
        self.nodes = [self._new_node(number) for number in range(masters * (1 + replicas))]
        self._ids: dict[bytes, Node] = {}

    @property
    def url(self) -> str:
        """The URL, with the addresses of the first masters."""
        addresses = ",".join(f"127.0.0.1:{node.port}" for node in self.nodes[: self._masters])
        return f"redis+cluster://{addresses}/0"

    def client(self) -> Any:
        """Return a Cluster client of redis-py."""
        return redis.RedisCluster(
            host="127.0.0.1", port=self.responsive_nodes[0].port, protocol=2, socket_timeout=5.0
        )

    def start(self) -> None:
        """Start all nodes, form the Cluster on the first start, and wait until it is stable."""
        launch_nodes(self.nodes)
        if not self._ids:
            self._join()
        self.wait_until_stable()

    def _join(self) -> None:
        masters, others = self.nodes[: self._masters], self.nodes[self._masters :]
        self._ids = {node.ask("CLUSTER", "MYID"): node for node in self.nodes}
        for number, node in enumerate(self.nodes):
            node.ask("CLUSTER", "SET-CONFIG-EPOCH", number + 1)
            for earlier in self.nodes[:number]:
                node.ask("CLUSTER", "MEET", "127.0.0.1", earlier.port)
        for number, node in enumerate(masters):
            first, end = SLOTS * number // len(masters), SLOTS * (number + 1) // len(masters)
            node.ask("CLUSTER", "ADDSLOTS", *range(first, end))
        for number, node in enumerate(others):
            master = self._id(masters[number % len(masters)])
            wait_for(f"{node} knows its master", partial(self._knows_node, node, master))
            node.ask("CLUSTER", "REPLICATE", master.decode())

    def add_node(self) -> Node:
        """Start a node, let it join without slots, and return it."""
        new = self._new_node(len(self.nodes))
        self.nodes.append(new)
        launch_nodes([new])
        self._ids[new.ask("CLUSTER", "MYID")] = new
        new.ask("CLUSTER", "MEET", "127.0.0.1", self.nodes[0].port)
        wait_for(f"{new} has joined", lambda: all(map(self._sees_all_nodes, self.responsive_nodes)))
        return new

    def masters(self) -> list[Node]:
        """Return the responsive nodes that own slots."""
        return [node for node in self.responsive_nodes if self._slots(node)]

    def owner_of(self, slot: int) -> Node:
        """Return the responsive owner of a slot; of several claimants, the one with the highest epoch."""
        return max(
            (node for node in self.responsive_nodes if slot in self._slots(node)),
            key=lambda node: int(self._view(node)[self._id(node)][6]),
        )

    def replica_of(self, master: Node) -> Node:
        """Return a replica of a master; both must be responsive."""
        return next(node for node in self.responsive_nodes if node.is_replica_of(master))

    def slot_of(self, key: str) -> int:
        slot: int = self.responsive_nodes[0].ask("CLUSTER", "KEYSLOT", key)
        return slot

    def move_slot(self, slot: int, to: Node, halfway: Callable[[], object] = lambda: None) -> None:
        """Move a slot key by key, as redis-cli does.

        Args:
            slot: the slot.
            to: the new owner.
            halfway: called when half of the keys have moved. During the whole move clients get ASK redirections,
                and TRYAGAIN for commands with several keys.
        """
        source = self.owner_of(slot)
        self._start_move(source, slot, to)
        self._migrate(source, slot, to, source.ask("CLUSTER", "COUNTKEYSINSLOT", slot) // 2)
        halfway()
        self.move_keys(slot, to)
        self.finish_move(slot, to)

    def move_keys(self, slot: int, to: Node) -> None:
        """Move all keys of a slot, but not the slot: its owner answers with ASK redirections."""
        source = self.owner_of(slot)
        self._start_move(source, slot, to)
        while self._migrate(source, slot, to, 100):
            pass

    def finish_move(self, slot: int, to: Node) -> None:
        """Assign a slot to the node that has its keys, on all masters."""
        source = self.owner_of(slot)
        for node in (to, source, *(one for one in self.masters() if one not in (to, source))):
            node.ask("CLUSTER", "SETSLOT", slot, "NODE", self._id(to).decode())

    def _start_move(self, source: Node, slot: int, to: Node) -> None:
        to.ask("CLUSTER", "SETSLOT", slot, "IMPORTING", self._id(source).decode())
        source.ask("CLUSTER", "SETSLOT", slot, "MIGRATING", self._id(to).decode())

    @property
    def can_move_slots_at_once(self) -> bool:
        """Whether the servers have CLUSTER MIGRATESLOTS."""
        return bool(self.responsive_nodes[0].ask("COMMAND", "INFO", "CLUSTER|MIGRATESLOTS")[0])

    def move_slot_at_once(self, slot: int, to: Node) -> None:
        """Move a slot atomically with CLUSTER MIGRATESLOTS of Valkey 9: clients get MOVED, never ASK."""
        source = self.owner_of(slot)
        source.ask("CLUSTER", "MIGRATESLOTS", "SLOTSRANGE", slot, slot, "NODE", self._id(to).decode())
        wait_for(f"{to} has slot {slot}", lambda: slot in self._slots(to))

    def fail_over(self, replica: Node) -> None:
        """Promote a replica by a planned failover, which loses nothing."""
        replica.ask("CLUSTER", "FAILOVER")
        self.wait_until_promoted(replica)

    def take_over(self, replica: Node) -> None:
        """Promote the replica of a dead master without a vote."""
        replica.ask("CLUSTER", "FAILOVER", "TAKEOVER")
        self.wait_until_promoted(replica)

    def without_replication(self, replica: Node, master: Node) -> contextlib.AbstractContextManager[None]:
        """Freeze a replica during the block; it never receives what its master does meanwhile."""
        return cut_off(master, [replica])

    def wait_until_promoted(self, replica: Node, seconds: float = 30.0) -> None:
        """Wait until a replica owns slots and the Cluster is stable."""
        wait_for(f"{replica} is promoted", lambda: self._slots(replica), seconds)
        self.wait_until_stable(seconds)

    def wait_until_stable(self, seconds: float = 30.0) -> None:
        """Wait until the responsive nodes report `ok`, agree on the owners, and replicas are synced."""
        wait_for("the Cluster is stable", self._is_stable, seconds)

    @contextlib.contextmanager
    def isolated(self, master: Node) -> Iterator[Node]:
        """Isolate a master with its clients; it accepts writes until it detects that it is in a minority.

        At the end of the block the master is frozen and its replica promoted. Then the master comes back as a
        replica and loses what it accepted in isolation.

        Yields:
            The replica that will be promoted.
        """
        replica = self.replica_of(master)
        others = [node for node in self.nodes if node is not master and node.is_responsive]
        with cut_off(master, others):
            yield replica
            master.freeze()
        self.wait_until_promoted(replica)
        master.thaw()
        wait_for(f"{master} follows {replica}", lambda: master.is_replica_of(replica))
        self.wait_until_stable()

    def _migrate(self, source: Node, slot: int, to: Node, count: int) -> int:
        """Move up to `count` keys of a slot, and return the number of moved keys."""
        keys = source.ask("CLUSTER", "GETKEYSINSLOT", slot, count)
        if keys:
            names = [key.decode() for key in keys]
            source.ask("MIGRATE", "127.0.0.1", to.port, "", 0, 5000, "KEYS", *names)
        return len(keys)

    def _id(self, node: Node) -> bytes:
        return next(name for name, one in self._ids.items() if one is node)

    def _view(self, node: Node) -> dict[bytes, list[bytes]]:
        """Return the lines of CLUSTER NODES of a node by node id."""
        return {line[:40]: line.split() for line in node.ask("CLUSTER", "NODES").splitlines()}

    def _knows_node(self, node: Node, other: bytes) -> bool:
        return other in self._view(node)

    def _sees_all_nodes(self, node: Node) -> bool:
        links = {name: row[7] for name, row in self._view(node).items()}
        return all(links.get(name) == b"connected" for name in self._ids) and self._is_ok(node)

    @staticmethod
    def _is_ok(node: Node) -> bool:
        return b"cluster_state:ok" in node.ask("CLUSTER", "INFO")

    def _slots(self, node: Node, view: dict[bytes, list[bytes]] | None = None) -> set[int]:
        """Return the slots that a node owns, in its own view or in another one."""
        found: set[int] = set()
        for piece in (view or self._view(node)).get(self._id(node), [])[8:]:
            if not piece.startswith(b"["):  # a slot that is moving
                first, _, last = piece.partition(b"-")
                found.update(range(int(first), int(last or first) + 1))
        return found

    def _is_stable(self) -> bool:
        views = [self._view(node) for node in self.responsive_nodes]
        owners = [[self._slots(node, view) for node in self.nodes] for view in views]
        return (
            all(len(view) == len(self.nodes) for view in views)
            and all(one == owners[0] for one in owners)
            and all(map(self._is_ok, self.responsive_nodes))
            and all(
                self._slots(node) if node.role() == "master" else node.is_synced()
                for node in self.responsive_nodes
            )
        )
