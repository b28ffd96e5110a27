"""The master of a service, found by asking its Sentinels."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import redis
from redis import exceptions as redis_errors

from rlbroker.backend.deadline import Deadline, within
from rlbroker.backend.threads import OutageLog
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

logger = logging.getLogger("rlbroker")


@dataclass(frozen=True)
class SentinelView:
    """The state of a master's Sentinels, as reported by those that answer.

    Attributes:
        silent: names of the Sentinels that do not answer: those in the URL, and others that these know.
        total: number of Sentinels.
        alive: number of Sentinels that answer.
        needed: number of Sentinels that must agree on a failover: the quorum, and the majority.
        refusal: the report of a Sentinel that sees too few others; empty if all see enough.
    """

    silent: Sequence[str]
    total: int
    alive: int
    needed: int
    refusal: str


class SentinelTopology(DiscoveredTopology):
    """The master of one service, as its Sentinels report it."""

    def __init__(
        self, make_client: MakeClient, sentinels: Iterable[redis.Redis], service: str, address: str
    ) -> None:
        """Create a topology; no Sentinel is asked yet.

        Args:
            service: name of the master.
            address: name of the Sentinels in messages.
        """
        super().__init__(make_client, f"master of {service!r}")
        self._sentinels, self._address = list(sentinels), address
        self.service = service  #: the Sentinels' name of the master
        self._master: Server | None = None
        self._outage = OutageLog(address)

    def master_for(self, key: str) -> Server:
        """Return the master."""
        self._ensure_fresh()
        assert self._master is not None
        return self._master

    def masters(self) -> Sequence[Server]:
        """Return the master."""
        return [self.master_for("")]

    def replicas_of(self, master: Server) -> Sequence[Server]:
        """Return the replicas of a master."""
        return self._clients.replicas_of(master)

    def lost(self) -> Sequence[Server]:
        """Return the replicas that a Sentinel cannot reach, and those that have lost their master."""
        for sentinel in self._sentinels:
            with suppress(*UNREACHABLE, redis_errors.ResponseError), within(Deadline(QUERY_TIMEOUT_SECONDS)):
                # redis-py cannot parse SENTINEL REPLICAS.
                rows = query(sentinel, "SENTINEL SLAVES", self.service)
                return [
                    self.at((str(row["ip"]), int(row["port"])))
                    for row in rows
                    if _is_unreachable(row) or row.get("master-link-status") == "err"
                ]
        return ()

    @property
    def sentinels(self) -> Sequence[Server]:
        """The Sentinels of the URL, beginning with the one that answered last."""
        return [Server(sentinel, _address_of(sentinel)) for sentinel in self._sentinels]

    def view_sentinels(self) -> SentinelView:
        """Ask each Sentinel of the URL about itself and the others, and return what they report together."""
        answering, silent = set[str](), list[str]()
        others, quorum, refusal = dict[str, dict[str, Any]](), 0, ""
        for sentinel in self._sentinels:
            if _name_of(sentinel) in {_name_in(row) for row in others.values() if _is_unreachable(row)}:
                silent.append(_name_of(sentinel))  # another Sentinel cannot reach it; do not wait for it
                continue
            try:
                with within(Deadline(QUERY_TIMEOUT_SECONDS)):
                    answering.add(as_text(query(sentinel, "SENTINEL MYID")))
                    quorum = max(quorum, int(query(sentinel, "SENTINEL MASTER", self.service)["quorum"]))
                    rows = query(sentinel, "SENTINEL SENTINELS", self.service)
                    others |= {row["runid"]: row for row in rows}
                    query(sentinel, "SENTINEL CKQUORUM", self.service)
            except UNREACHABLE:
                silent.append(_name_of(sentinel))
            except redis_errors.NoPermissionError:
                continue
            except redis_errors.ResponseError as error:
                refusal = f"{_name_of(sentinel)} reports {error}"
        known = {run_id: _name_in(row) for run_id, row in others.items() if run_id not in answering}
        away = {
            run_id: name
            for run_id, name in known.items()
            if name in silent or _is_unreachable(others[run_id])
        }
        total = len(answering) + len(known)
        return SentinelView(
            silent=list(dict.fromkeys((*silent, *away.values()))),
            total=total,
            alive=total - len(away),
            needed=max(quorum, total // 2 + 1),
            refusal=refusal,
        )

    def close(self) -> None:
        """Close the connections."""
        super().close()
        for sentinel in self._sentinels:
            sentinel.connection_pool.disconnect()

    def _refresh(self) -> None:
        """Ask one Sentinel after the other for the master; if none knows it, keep the last one."""
        problems: list[redis_errors.RedisError | OSError | str] = []
        older: list[Server] = []
        services: set[str] = set()
        for sentinel in self._sentinels:
            try:
                with within(Deadline(QUERY_TIMEOUT_SECONDS)):
                    monitored = query(sentinel, "SENTINEL MASTERS")
            except UNREACHABLE as error:
                problems.append(error)
                # The next refresh begins with a Sentinel that answers.
                self._sentinels = [*(one for one in self._sentinels if one is not sentinel), sentinel]
                continue
            except redis_errors.ResponseError as error:
                if "unknown command" in str(error).lower():
                    raise ServerUnsuitable(
                        f"{self._address}: {_name_of(sentinel)} is not a Sentinel; for a server write "
                        "redis://host:port, for Sentinels their own port (usually 26379)"
                    ) from error
                raise
            state = monitored.get(self.service)
            services.update(monitored)
            if state is None or not state["is_master"] or state["is_sdown"] or state["is_odown"]:
                problems.append(f"{_name_of(sentinel)} has no master {self.service!r} that answers")
                continue
            address = str(state["ip"]), int(state["port"])
            found = Server(self._clients.at(address), address, int(state["config-epoch"]))
            if self._master is None or found.term >= self._master.term:
                self._set_master(found)
                return
            older.append(found)  # this Sentinel may not know of the latest failover
        if len({one.address for one in older}) == 1 and 2 * len(older) > len(self._sentinels):
            self._set_master(older[0])  # a majority agrees: the Sentinels' epochs were reset
            return
        if services and self.service not in services:
            raise ServerUnsuitable(
                f"{self._address}: the Sentinels monitor no master {self.service!r}, but "
                f"{', '.join(sorted(services))}; its name comes last in the URL, as in "
                "redis+sentinel://host:26379/mymaster"
            )
        unknown = discovery_error("no Sentinel knows the master now", problems)
        if self._master is None:
            raise unknown
        self._outage.report(unknown, "the last one is used")

    def _set_master(self, master: Server) -> None:
        before, self._master = self._master, master
        self._outage.end()
        if before is not None and before.address != master.address:
            logger.warning("%s: the master is now %s:%d", self._address, *(master.address or ()))
            before.client.connection_pool.disconnect(inuse_connections=False)


def _address_of(client: redis.Redis) -> Address:
    settings = client.connection_pool.connection_kwargs
    return str(settings["host"]), int(settings["port"])


def _name_of(client: redis.Redis) -> str:
    host, port = _address_of(client)
    return f"{host}:{port}"


def _name_in(row: Mapping[str, Any]) -> str:
    return f"{row['ip']}:{row['port']}"


def _is_unreachable(row: Mapping[str, Any]) -> bool:
    """Return whether a Sentinel cannot reach the server or Sentinel that the row describes."""
    return bool(row["is_sdown"] or row["is_disconnected"])
