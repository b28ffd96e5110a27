"""A Cluster and a Sentinel trio of real servers, each of which can be killed, frozen or cut off by itself.

Taken whole, either is like one server of servers.py: it has a URL and can be started, killed, emptied, frozen.
"""

from __future__ import annotations

import contextlib
import random
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Self

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry
from servers import FaultyServer

SLOTS = 16384
#: A Cluster's node listens for the others at this distance from its port.
BUS = 10_000
#: Ports of nodes; their buses are below those that the kernel gives to outgoing connections.
PORTS = range(11_000, 22_000)


class Node(FaultyServer):
    """One server of several, which comes back on the same port and in the role that it had."""

    def __init__(self, binary: Path, folder: Path, *config: str) -> None:
        """Prepare it; nothing is started yet."""
        super().__init__(binary, folder, *config)
        self.port, self._held = _hold_port()
        self._file = self._folder / "server.conf"
        self._file.touch()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._folder.name}, {self.port})"

    def _command(self) -> list[str]:
        program, *options = super()._command()
        return [program, str(self._file), *options]

    def give_up(self) -> None:
        """End it for good, and let others have its port."""
        self.kill()
        for held in self._held:
            held.close()

    def client(self) -> Any:
        return redis.Redis(
            host="127.0.0.1", port=self.port, protocol=2, socket_timeout=5.0, retry=Retry(NoBackoff(), 0)
        )

    def ask(self, *command: Any) -> Any:
        """Run a command there, and give what it answers as it comes."""
        with self.client() as client:
            # As bytes, so that redis-py knows no meaning of the answer.
            return client.execute_command(*(str(part).encode() for part in command))

    def ask_on_the_way(self, *command: Any) -> Any:
        """Run a command, after ASKING, on the one that a slot is moving to."""
        with self.client() as client, client.pipeline(transaction=False) as pipeline:
            pipeline.execute_command("ASKING")
            pipeline.execute_command(*command)
            return pipeline.execute()[1]

    def role(self) -> str:
        """Give `master`, `slave` or `sentinel`."""
        role: str = self.ask("ROLE")[0].decode()
        return role

    def in_step(self) -> bool:
        """Whether it is a replica whose link to its master is up."""
        return b"\r\nmaster_link_status:up\r\n" in self.ask("INFO", "replication")

    def is_replica_of(self, master: Node) -> bool:
        role, *rest = self.ask("ROLE")
        return bool(role == b"slave" and rest[1] == master.port)


class _Engine:
    """Several servers, which taken together are started, killed, emptied and frozen as one."""

    nodes: list[Node]

    def __enter__(self) -> Self:
        try:
            self.start()
        except BaseException:  # some may be running
            self.__exit__()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        for node in self._all():
            node.give_up()

    def start(self) -> None:
        raise NotImplementedError

    def _all(self) -> list[Node]:
        return self.nodes

    def kill(self) -> None:
        for node in self._all():
            node.kill()

    def empty(self) -> None:
        """Delete the data of all; they still know that they belong together."""
        for node in self.nodes:
            node.empty()

    def freeze(self) -> None:
        for node in self.nodes:
            node.freeze()

    def thaw(self) -> None:
        for node in self.nodes:
            node.thaw()

    @property
    def awake(self) -> list[Node]:
        return [node for node in self.nodes if node.awake]


class Cluster(_Engine):
    """Masters with replicas, among which the slots are divided evenly."""

    def __init__(self, binary: Path, folder: Path, masters: int = 3, replicas: int = 1, *config: str) -> None:
        """Prepare a Cluster; nothing is started yet.

        Args:
            binary: the program.
            folder: where the nodes' folders go.
            masters: how many masters.
            replicas: how many replicas each master has.
            config: further options, as on the command line; `--cluster-node-timeout 1000`, say.
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
        """Names those that were masters in the beginning; the others are found through them."""
        places = ",".join(f"127.0.0.1:{node.port}" for node in self.nodes[: self._masters])
        return f"redis+cluster://{places}/0"

    def client(self) -> Any:
        """Give redis-py's client, which finds the way to the node of each key."""
        return redis.RedisCluster(host="127.0.0.1", port=self.awake[0].port, protocol=2, socket_timeout=5.0)

    def start(self) -> None:
        """Start all, join them if they are new, and wait until every one is in its place."""
        _launch(self.nodes)
        if not self._ids:
            self._join()
        self.wait_ok()

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
            _wait(f"{node} knows its master", partial(self._knows, node, master))
            node.ask("CLUSTER", "REPLICATE", master.decode())

    def add(self) -> Node:
        """Let a node join that holds nothing, and give it."""
        new = self._new_node(len(self.nodes))
        self.nodes.append(new)
        _launch([new])
        self._ids[new.ask("CLUSTER", "MYID")] = new
        new.ask("CLUSTER", "MEET", "127.0.0.1", self.nodes[0].port)
        _wait(f"{new} has joined", lambda: all(map(self._sees_everyone, self.awake)))
        return new

    def masters(self) -> list[Node]:
        """Give those that are awake and hold slots."""
        return [node for node in self.awake if self._slots(node)]

    def owner_of(self, slot: int) -> Node:
        """Give the one that holds a slot, among those that are awake."""
        return max(
            (node for node in self.awake if slot in self._slots(node)),
            key=lambda node: int(self._view(node)[self._id(node)][6]),
        )

    def replica_of(self, master: Node) -> Node:
        """Give a replica of a master; both must be awake."""
        return next(node for node in self.awake if node.is_replica_of(master))

    def slot_of(self, key: str) -> int:
        slot: int = self.awake[0].ask("CLUSTER", "KEYSLOT", key)
        return slot

    def move_slot(self, slot: int, to: Node, halfway: Callable[[], object] = lambda: None) -> None:
        """Move a slot key by key, as redis-cli does.

        Args:
            slot: the slot.
            to: the master that gets it.
            halfway: called when half of its keys have moved; until then and after it there are redirections
                by ASK, and TRYAGAIN for what needs several of its keys.
        """
        source = self.owner_of(slot)
        self._begin_move(source, slot, to)
        self._migrate(source, slot, to, source.ask("CLUSTER", "COUNTKEYSINSLOT", slot) // 2)
        halfway()
        self.move_keys(slot, to)
        self.end_move(slot, to)

    def move_keys(self, slot: int, to: Node) -> None:
        """Move all keys of a slot, and leave the slot where it is: whoever asks there is redirected by ASK."""
        source = self.owner_of(slot)
        self._begin_move(source, slot, to)
        while self._migrate(source, slot, to, 100):
            pass

    def end_move(self, slot: int, to: Node) -> None:
        """Let all know that a slot belongs to the one that has its keys."""
        source = self.owner_of(slot)
        for node in (to, source, *(one for one in self.masters() if one not in (to, source))):
            node.ask("CLUSTER", "SETSLOT", slot, "NODE", self._id(to).decode())

    def _begin_move(self, source: Node, slot: int, to: Node) -> None:
        to.ask("CLUSTER", "SETSLOT", slot, "IMPORTING", self._id(source).decode())
        source.ask("CLUSTER", "SETSLOT", slot, "MIGRATING", self._id(to).decode())

    @property
    def moves_at_once(self) -> bool:
        """Whether these servers can move a slot as a whole."""
        return bool(self.awake[0].ask("COMMAND", "INFO", "CLUSTER|MIGRATESLOTS")[0])

    def move_slot_at_once(self, slot: int, to: Node) -> None:
        """Move a slot as a whole: Valkey 9's CLUSTER MIGRATESLOTS, after which there is one MOVED and no ASK."""
        source = self.owner_of(slot)
        source.ask("CLUSTER", "MIGRATESLOTS", "SLOTSRANGE", slot, slot, "NODE", self._id(to).decode())
        _wait(f"{to} has slot {slot}", lambda: slot in self._slots(to))

    def fail_over(self, replica: Node) -> None:
        """Let a replica take its master's place, as for maintenance: they hand over without a loss."""
        replica.ask("CLUSTER", "FAILOVER")
        self.wait_promoted(replica)

    def take_over(self, replica: Node) -> None:
        """Let a replica take the place of its master, which is dead, without asking the others."""
        replica.ask("CLUSTER", "FAILOVER", "TAKEOVER")
        self.wait_promoted(replica)

    def behind(self, replica: Node, master: Node) -> contextlib.AbstractContextManager[None]:
        """Let a replica hear nothing of what its master does meanwhile, not even later."""
        return _cut_off(master, [replica])

    def wait_promoted(self, replica: Node, seconds: float = 30.0) -> None:
        """Wait until it holds slots, and all who are awake agree."""
        _wait(f"{replica} is promoted", lambda: self._slots(replica), seconds)
        self.wait_ok(seconds)

    def wait_ok(self, seconds: float = 30.0) -> None:
        """Wait until all who are awake say that all is well, agree on who holds what, and are in step."""
        _wait("the Cluster is in order", self._in_order, seconds)

    @contextlib.contextmanager
    def alone(self, master: Node) -> Iterator[Node]:
        """Leave a master alone with its clients: a minority, which takes writes until it notices.

        Afterwards the others are there and it is not; its replica is promoted in its place. Then it comes back
        as a replica, and what it took alone is gone.

        Returns:
            The replica that will be promoted.
        """
        replica = self.replica_of(master)
        others = [node for node in self.nodes if node is not master and node.awake]
        with _cut_off(master, others):
            yield replica
            master.freeze()
        self.wait_promoted(replica)
        master.thaw()
        _wait(f"{master} follows {replica}", lambda: master.is_replica_of(replica))
        self.wait_ok()

    def _migrate(self, source: Node, slot: int, to: Node, count: int) -> int:
        """Move so many of the slot's keys, and give how many there were."""
        keys = source.ask("CLUSTER", "GETKEYSINSLOT", slot, count)
        if keys:
            names = [key.decode() for key in keys]
            source.ask("MIGRATE", "127.0.0.1", to.port, "", 0, 5000, "KEYS", *names)
        return len(keys)

    def _id(self, node: Node) -> bytes:
        return next(name for name, one in self._ids.items() if one is node)

    def _view(self, node: Node) -> dict[bytes, list[bytes]]:
        """Give the lines of CLUSTER NODES by the nodes' ids, as this one sees them."""
        return {line[:40]: line.split() for line in node.ask("CLUSTER", "NODES").splitlines()}

    def _knows(self, node: Node, other: bytes) -> bool:
        return other in self._view(node)

    def _sees_everyone(self, node: Node) -> bool:
        links = {name: row[7] for name, row in self._view(node).items()}
        return all(links.get(name) == b"connected" for name in self._ids) and self._is_ok(node)

    @staticmethod
    def _is_ok(node: Node) -> bool:
        return b"cluster_state:ok" in node.ask("CLUSTER", "INFO")

    def _slots(self, node: Node, view: dict[bytes, list[bytes]] | None = None) -> set[int]:
        """Give the slots that a node holds, as itself sees it, or as another does."""
        found: set[int] = set()
        for piece in (view or self._view(node)).get(self._id(node), [])[8:]:
            if not piece.startswith(b"["):  # one that is being moved
                first, _, last = piece.partition(b"-")
                found.update(range(int(first), int(last or first) + 1))
        return found

    def _in_order(self) -> bool:
        views = [self._view(node) for node in self.awake]
        owners = [[self._slots(node, view) for node in self.nodes] for view in views]
        return (
            all(len(view) == len(self.nodes) for view in views)
            and all(one == owners[0] for one in owners)
            and all(map(self._is_ok, self.awake))
            and all(self._slots(node) if node.role() == "master" else node.in_step() for node in self.awake)
        )


class Sentinel(Node):
    """A Sentinel; what it learnt is in its folder, and there again after a kill."""

    def __init__(self, binary: Path, folder: Path, *lines: str) -> None:
        """Prepare it; the lines go to its file."""
        super().__init__(binary, folder)
        self.write(*lines)

    def write(self, *lines: str) -> None:
        """Have these lines in its file, and nothing of what it learnt; it must not be running."""
        self._file.write_text(
            "\n".join((f"port {self.port}", "bind 127.0.0.1", f"dir {self._folder}", *lines, ""))
        )

    def _command(self) -> list[str]:
        return [str(self._binary), str(self._file), "--sentinel"]

    def wait_ready(self) -> None:
        super().wait_ready()
        # Looks around often, and after a moment of a busy machine (TILT) not only half a minute later.
        for pace in ("INFO-PERIOD", "PUBLISH-PERIOD", "PING-PERIOD", "TILT-PERIOD"):
            with contextlib.suppress(redis.ResponseError):  # before 7.0
                self.ask("SENTINEL", "DEBUG", pace, 500)


class SentinelTrio(_Engine):
    """A master, two replicas, and three Sentinels that promote one of them."""

    service = "mymaster"

    def __init__(self, binary: Path, folder: Path, *config: str) -> None:
        """Prepare a trio; nothing is started yet.

        Args:
            binary: the program.
            folder: where the servers' folders go.
            config: further options of the data's servers, as on the command line.
        """
        options = ("--repl-diskless-sync-delay", "0", *config)
        self.nodes = [Node(binary, folder / f"node-{number}", *options) for number in range(3)]
        lines = self._lines(self.nodes[0])
        self.sentinels = [Sentinel(binary, folder / f"sentinel-{number}", *lines) for number in range(3)]
        self._joined = False

    def _lines(self, master: Node, changes: int = 0) -> Sequence[str]:
        name = self.service
        return (
            f"sentinel monitor {name} 127.0.0.1 {master.port} 2",
            f"sentinel down-after-milliseconds {name} 1000",
            f"sentinel failover-timeout {name} 5000",
            f"sentinel config-epoch {name} {changes}",
            f"sentinel current-epoch {changes}",
        )

    @property
    def url(self) -> str:
        places = ",".join(f"127.0.0.1:{sentinel.port}" for sentinel in self.sentinels)
        return f"redis+sentinel://{places}/{self.service}"

    def client(self) -> Any:
        """Give a client of the master."""
        return self.master().client()

    def start(self) -> None:
        """Start all, and wait until the Sentinels know everyone and the replicas are in step."""
        _launch(self.nodes)
        if not self._joined:
            for node in self.nodes[1:]:
                node.ask("REPLICAOF", "127.0.0.1", self.nodes[0].port)
                node.ask("CONFIG", "REWRITE")
            self._joined = True
        self.start_sentinels()
        self.wait_ok()

    def _all(self) -> list[Node]:
        return [*self.sentinels, *self.nodes]

    def stop_sentinels(self) -> None:
        for sentinel in self.sentinels:
            sentinel.kill()

    def start_sentinels(self) -> None:
        """Start those that are not there, with what they knew."""
        _launch([sentinel for sentinel in self.sentinels if not sentinel.awake])

    def renew_sentinels(self, changes: int = 0) -> None:
        """Put others in the Sentinels' places, which are only told the master, and how often it has changed."""
        lines = self._lines(self.master(), changes)
        self.stop_sentinels()
        for sentinel in self.sentinels:
            sentinel.write(*lines)
        self.start_sentinels()
        self.wait_ok()

    def master(self) -> Node:
        """Give the master: the one that the Sentinels name, if more than one says that it is."""
        found = [node for node in self.awake if node.role() == "master"]
        return found[0] if len(found) == 1 else self._named()[0]

    def replicas(self) -> list[Node]:
        return [node for node in self.awake if node.role() == "slave"]

    def fail_over(self) -> Node:
        """Let the Sentinels promote a replica now, and give it."""
        old = self.master()
        self.sentinels[0].ask("SENTINEL", "FAILOVER", self.service)
        return self.wait_promoted(old)

    def wait_promoted(self, old: Node, seconds: float = 60.0) -> Node:
        """Wait until the Sentinels that are there name another master, and give it."""

        def promoted() -> Node | None:
            first, *others = self._named()
            is_new = first is not old and all(other is first for other in others)
            return first if is_new and first.awake and first.role() == "master" else None

        found: Node = _wait(f"another master is there than {old}", promoted, seconds)
        return found

    def wait_ok(self, seconds: float = 60.0) -> None:
        """Wait until the Sentinels agree and know everyone, and the replicas that are awake are in step."""
        _wait("the trio is in order", self._in_order, seconds)

    @contextlib.contextmanager
    def alone(self) -> Iterator[Node]:
        """Leave the master alone with its clients and one Sentinel: a minority, which still takes writes.

        Afterwards the others are there and it is not; they promote a replica in its place. Then it comes back,
        becomes a replica, and what it took alone is gone.

        Returns:
            The master.
        """
        master = self.master()
        with _cut_off(master, self.replicas()):
            for sentinel in self.sentinels[1:]:
                sentinel.kill()
            yield master
            self.sentinels[0].kill()
            master.freeze()
        _launch(self.sentinels[1:])
        self.wait_promoted(master)
        master.thaw()
        _launch(self.sentinels[:1])
        self.wait_ok()

    @contextlib.contextmanager
    def two_masters(self) -> Iterator[tuple[Node, Node]]:
        """Have the master replaced while its clients, and nobody else, reach it: it goes on to serve them.

        Afterwards it is no more.

        Returns:
            That master, and the one that the Sentinels name.
        """
        old = self.master()
        with old.client() as client:
            client.config_set("requirepass", "nobody new")
            for one in client.client_list():
                if one["name"].startswith("sentinel") or "S" in one["flags"]:
                    client.client_kill_filter(_id=one["id"])
        yield old, self.wait_promoted(old)
        old.kill()

    def _named(self) -> list[Node]:
        """Give the master that each Sentinel names."""
        places = [
            int(sentinel.ask("SENTINEL", "GET-MASTER-ADDR-BY-NAME", self.service)[1])
            for sentinel in self.sentinels
            if sentinel.awake
        ]
        return [next(node for node in self.nodes if node.port == port) for port in places]

    def _in_order(self) -> bool:
        master, *others = self._named()
        return (
            all(other is master for other in others)
            and all(self._knows_everyone(sentinel) for sentinel in self.sentinels if sentinel.awake)
            and master.awake
            and master.role() == "master"
            and all(
                node.is_replica_of(master) and node.in_step() for node in self.awake if node is not master
            )
        )

    def _knows_everyone(self, sentinel: Sentinel) -> bool:
        answer = sentinel.ask("SENTINEL", "MASTER", self.service)
        fields = dict(zip(answer[::2], answer[1::2], strict=True))
        return (fields[b"flags"], fields[b"num-slaves"], fields[b"num-other-sentinels"]) == (
            b"master",
            b"%d" % (len(self.nodes) - 1),
            b"%d" % (len(self.sentinels) - 1),
        )


@contextlib.contextmanager
def _cut_off(master: Node, others: Sequence[Node]) -> Iterator[None]:
    """Let the others stand still meanwhile, and hear nothing of what the master does, not even later."""
    for node in others:
        node.freeze()
    try:
        # What is sent to a process that stands still waits for it in the kernel.
        master.ask("CLIENT", "KILL", "TYPE", "replica")
        yield
    finally:
        for node in others:
            node.thaw()


def _launch(nodes: Sequence[Node]) -> None:
    for node in nodes:
        node.launch()
    for node in nodes:
        node.wait_ready()


def _hold_port() -> tuple[int, list[socket.socket]]:
    """Give a port that is free together with its bus port, and what keeps others from taking either."""
    while True:
        port, held = random.choice(PORTS), list[socket.socket]()
        try:
            for one in (port, port + BUS):
                held.append(socket.socket())
                held[-1].bind(("127.0.0.1", one))
        except OSError:
            for one_held in held:
                one_held.close()
            continue
        for one_held in held:
            # Only now, so that two who hold never share, and yet a server can listen beside us.
            one_held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        return port, held


def _wait(what: str, condition: Callable[[], Any], seconds: float = 30.0) -> Any:
    """Wait until something holds, also over answers that don't come yet, and give it."""
    end = time.monotonic() + seconds
    while True:
        with contextlib.suppress(redis.RedisError):
            if found := condition():
                return found
        assert time.monotonic() < end, f"waited {seconds:g} s in vain until {what}"
        time.sleep(0.02)
