"""A master, two replicas and three Sentinels, each of which can be killed, frozen or cut off by itself."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import redis
from nodes import Node, NodeGroup, cut_off, launch_nodes, wait_for


class Sentinel(Node):
    """A Sentinel, which keeps its state on disk."""

    def __init__(self, binary: Path, folder: Path, *lines: str) -> None:
        """Prepare a Sentinel with these lines of configuration, without starting it."""
        super().__init__(binary, folder)
        self.write(*lines)

    def write(self, *lines: str) -> None:
        """Replace the configuration and the saved state; the Sentinel must not be running."""
        self._file.write_text(
            "\n".join((f"port {self.port}", "bind 127.0.0.1", f"dir {self.folder}", *lines, ""))
        )

    def _command(self) -> list[str]:
        return [str(self._binary), str(self._file), "--sentinel"]

    def wait_ready(self) -> None:
        super().wait_ready()
        # Poll often, and leave TILT mode, which a busy machine causes, after 0.5 s instead of 30 s.
        for pace in ("INFO-PERIOD", "PUBLISH-PERIOD", "PING-PERIOD", "TILT-PERIOD"):
            with contextlib.suppress(redis.ResponseError):  # before 7.0
                self.ask("SENTINEL", "DEBUG", pace, 500)


class SentinelTrio(NodeGroup):
    """A master, two replicas, and three Sentinels."""

    service = "mymaster"

    def __init__(self, binary: Path, folder: Path, *config: str) -> None:
        """Prepare a trio without starting it.

        Args:
            binary: the program.
            folder: the parent of the servers' folders.
            config: further command-line options of the data servers.
        """
        options = ("--repl-diskless-sync-delay", "0", *config)
        self.nodes = [Node(binary, folder / f"node-{number}", *options) for number in range(3)]
        lines = self._config_lines(self.nodes[0])
        self.sentinels = [Sentinel(binary, folder / f"sentinel-{number}", *lines) for number in range(3)]
        self._joined = False

    def _config_lines(self, master: Node, changes: int = 0) -> Sequence[str]:
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
        """Return a client of the master."""
        return self.master().client()

    def start(self) -> None:
        """Start all nodes and Sentinels, and wait until the trio is stable."""
        launch_nodes(self.nodes)
        if not self._joined:
            for node in self.nodes[1:]:
                node.ask("REPLICAOF", "127.0.0.1", self.nodes[0].port)
                node.ask("CONFIG", "REWRITE")
            self._joined = True
        self.start_sentinels()
        self.wait_until_stable()

    def _all_nodes(self) -> list[Node]:
        return [*self.sentinels, *self.nodes]

    def stop_sentinels(self) -> None:
        for sentinel in self.sentinels:
            sentinel.kill()

    def start_sentinels(self) -> None:
        """Start the Sentinels that are not running, with their saved state."""
        launch_nodes([sentinel for sentinel in self.sentinels if not sentinel.is_responsive])

    def replace_sentinels(self, changes: int = 0) -> None:
        """Restart the Sentinels without saved state: they know only the master and the number of its changes."""
        lines = self._config_lines(self.master(), changes)
        self.stop_sentinels()
        for sentinel in self.sentinels:
            sentinel.write(*lines)
        self.start_sentinels()
        self.wait_until_stable()

    def master(self) -> Node:
        """Return the master; if several nodes claim the role, the one that the Sentinels name."""
        found = [node for node in self.responsive_nodes if node.role() == "master"]
        return found[0] if len(found) == 1 else self._named_masters()[0]

    def replicas(self) -> list[Node]:
        return [node for node in self.responsive_nodes if node.role() == "slave"]

    def fail_over(self) -> Node:
        """Let the Sentinels promote a replica now, and return the new master."""
        old = self.master()
        self.sentinels[0].ask("SENTINEL", "FAILOVER", self.service)
        return self.wait_until_promoted(old)

    def wait_until_promoted(self, old: Node, seconds: float = 60.0) -> Node:
        """Wait until the running Sentinels name another master, and return it."""

        def promoted() -> Node | None:
            first, *others = self._named_masters()
            is_new = first is not old and all(other is first for other in others)
            return first if is_new and first.is_responsive and first.role() == "master" else None

        found: Node = wait_for(f"{old} is no longer the master", promoted, seconds)
        return found

    def wait_until_stable(self, seconds: float = 60.0) -> None:
        """Wait until the Sentinels agree and know all servers, and the responsive replicas are synced."""
        wait_for("the trio is stable", self._is_stable, seconds)

    @contextlib.contextmanager
    def isolated(self) -> Iterator[Node]:
        """Isolate the master with its clients and one Sentinel; it still accepts writes.

        At the end of the block the master is frozen and a replica promoted. Then the master comes back as a
        replica and loses what it accepted in isolation.

        Yields:
            The master.
        """
        master = self.master()
        with cut_off(master, self.replicas()):
            for sentinel in self.sentinels[1:]:
                sentinel.kill()
            yield master
            self.sentinels[0].kill()
            master.freeze()
        launch_nodes(self.sentinels[1:])
        self.wait_until_promoted(master)
        master.thaw()
        launch_nodes(self.sentinels[:1])
        self.wait_until_stable()

    @contextlib.contextmanager
    def two_masters(self) -> Iterator[tuple[Node, Node]]:
        """Replace the master while only its clients can reach it: it continues to serve them.

        The old master is killed at the end of the block.

        Yields:
            The old master, and the one that the Sentinels name.
        """
        old = self.master()
        with old.client() as client:
            client.config_set("requirepass", "locks out new connections")
            for one in client.client_list():
                if one["name"].startswith("sentinel") or "S" in one["flags"]:
                    client.client_kill_filter(_id=one["id"])
        yield old, self.wait_until_promoted(old)
        old.kill()

    def _named_masters(self) -> list[Node]:
        """Return the master that each running Sentinel names."""
        places = [
            int(sentinel.ask("SENTINEL", "GET-MASTER-ADDR-BY-NAME", self.service)[1])
            for sentinel in self.sentinels
            if sentinel.is_responsive
        ]
        return [next(node for node in self.nodes if node.port == port) for port in places]

    def _is_stable(self) -> bool:
        master, *others = self._named_masters()
        return (
            all(other is master for other in others)
            and all(self._knows_all_nodes(sentinel) for sentinel in self.sentinels if sentinel.is_responsive)
            and master.is_responsive
            and master.role() == "master"
            and all(
                node.is_replica_of(master) and node.is_synced()
                for node in self.responsive_nodes
                if node is not master
            )
        )

    def _knows_all_nodes(self, sentinel: Sentinel) -> bool:
        reply = sentinel.ask("SENTINEL", "MASTER", self.service)
        fields = dict(zip(reply[::2], reply[1::2], strict=True))
        return (fields[b"flags"], fields[b"num-slaves"], fields[b"num-other-sentinels"]) == (
            b"master",
            b"%d" % (len(self.nodes) - 1),
            b"%d" % (len(self.sentinels) - 1),
        )
