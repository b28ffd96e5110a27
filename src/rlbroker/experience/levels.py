"""Confirmation levels: whether a server supports one, how to wait for it, and what is missing if that fails."""

from __future__ import annotations

from typing import Any

from rlbroker.backend.connection import Connection
from rlbroker.backend.deadline import try_seconds
from rlbroker.backend.replies import first_error
from rlbroker.backend.suitability import name_and_version
from rlbroker.backend.topology import Server
from rlbroker.config import Level
from rlbroker.errors import ConnectionFailed, PeerError, ServerFault, ServerUnsuitable, raise_again


class Confirmation:
    """The confirmation that a batch has reached its level. Not thread-safe.

    Attributes:
        level: what a batch must have reached to be safe.
        missing: why the last wait for the level failed; empty if it succeeded.
    """

    def __init__(self, connection: Connection, level: Level) -> None:
        """Set the level; nothing is sent yet."""
        self._connection, self.level = connection, level
        self.missing = ""

    @property
    def waits(self) -> bool:
        """Whether the server is asked to confirm each batch."""
        return self.level in ("replica", "fsync")

    def wait_command(self) -> tuple[Any, ...]:
        """Return the command that waits until the server has confirmed what its connection wrote last."""
        # Half of the remaining time, because a wait that the socket's timeout cuts off does not report what is missing.
        milliseconds = max(1, int(try_seconds(2 * self._connection.block_seconds) * 500))
        return ("WAIT", 1, milliseconds) if self.level == "replica" else ("WAITAOF", 1, 0, milliseconds)

    def accept(self, reply: Any) -> bool:
        """Return whether the reply to `wait_command` confirms the level; if so, clear `missing`."""
        if isinstance(reply, PeerError):
            if _has_no_file(reply):  # an outage, not a refusal: the file may be back soon
                return False
            raise_again(reply)
        confirmed = bool(reply if isinstance(reply, int) else reply[0])
        if confirmed:
            self.missing = ""
        return confirmed

    def fail(self, reply: Any, server: Server, batch: str) -> None:
        """Record what is missing for the level, and raise `ConnectionFailed`: like any outage, it may end soon."""
        node = self._name(server)
        if _has_no_file(reply):
            self.missing = (
                f"{node} has no append-only file for {batch}; CONFIG SET appendonly yes there to continue"
            )
        elif self.level == "replica":
            self.missing = (
                f"no replica of {node} has confirmed {batch} yet; bring one back or add one to continue"
            )
        else:
            self.missing = f"the disk of {node} has not confirmed {batch} yet"
        raise ConnectionFailed(self.missing)

    def check(self, stream_key: str, *, shards_known: bool) -> None:
        """Raise `ServerUnsuitable` if the stream's master cannot give the level.

        While the run's shards are unknown, raise it if no master can.
        """
        if not self.waits:
            return
        lacking = ""
        masters = [self._connection.master_for(stream_key)] if shards_known else self._connection.masters()
        for master in masters:
            try:
                lacking = self._find_lack(master)
            except ConnectionFailed:
                if shards_known:
                    raise
                return  # this master may be back before the run is opened
            if not lacking:
                return
        raise ServerUnsuitable(f"level {self.level!r} needs {lacking}")

    def _find_lack(self, master: Server) -> str:
        """Return what a master lacks for the level; empty if it can give it."""
        replica, node = self.level == "replica", self._name(master)
        probes = [("WAIT", 0, 1), ("INFO", "replication")] if replica else [("WAITAOF", 1, 0, 1)]
        replies = self._connection.execute_at(master, probes)
        refusal = first_error(replies)
        if refusal is None:
            if "connected_slaves:0" not in str(replies):
                return ""
            add_node = f"`redis-cli --cluster add-node HOST:PORT {node} --cluster-slave`"
            remedy = add_node if self._connection.servers.several else "REPLICAOF"
            return f"a replica, and {node} has none now; add one ({remedy}), or choose another level"
        if not isinstance(refusal, ServerFault):
            raise refusal
        if _has_no_file(refusal):
            return f"an append-only file, and {node} has none; `redis-cli CONFIG SET appendonly yes` there"
        version = "Redis or Valkey" if replica else "Redis 7.2 or newer, or Valkey"
        found = name_and_version(self._connection.server_info(master))
        return f"{version}; this is {found or 'another server'}"

    def _name(self, server: Server) -> str:
        return server.name if server.address else self._connection.address


def _has_no_file(reply: Any) -> bool:
    return isinstance(reply, ServerFault) and "appendonly" in str(reply)
