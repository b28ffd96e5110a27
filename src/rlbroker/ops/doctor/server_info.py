"""What a server reports to this user: INFO, settings, missing rights, latency and clock."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any, Final

from rlbroker.backend.connection import Connection
from rlbroker.backend.deadline import ONE_TRY, Deadline
from rlbroker.backend.replies import server_seconds, text_fields, whole_number
from rlbroker.backend.resp import Command
from rlbroker.backend.suitability import name_and_version
from rlbroker.backend.topology import Server
from rlbroker.errors import AccessDenied, PeerError

#: Settings that the checks read.
SETTINGS: Final = (
    "appendfsync",
    "client-output-buffer-limit",
    "dir",
    "maxclients",
    "maxmemory",
    "maxmemory-policy",
    "proto-max-bulk-len",
    "save",
    "tcp-keepalive",
    "timeout",
)

#: Round trips to measure; after this time fewer are enough, but not fewer than the least.
ROUND_TRIPS: Final = 20
_ROUND_TRIPS_SECONDS: Final = 1.0
_LEAST_ROUND_TRIPS: Final = 3

#: Server names in the reply to HELLO that rlbroker knows.
_SERVERS: Final = ("redis", "valkey")


@dataclass(frozen=True)
class Latency:
    """The round-trip time to a server, and the difference of the clocks.

    Attributes:
        trips: the number of measured round trips.
        ahead_seconds: by how much this machine's clock is ahead of the server's; None if the user may not run TIME.
    """

    median_seconds: float
    worst_seconds: float
    trips: int
    ahead_seconds: float | None


@dataclass(frozen=True)
class ServerInfo:
    """What a server reports to this user.

    Attributes:
        user: the user of the connection.
        name: the server's name and version; empty if unknown.
        version: the version of Redis that it is compatible with, such as (7, 2, 4); empty if unknown.
        role: `master` or `replica`; empty if unknown.
        fields: the fields of INFO.
        settings: the values of CONFIG GET.
        missing: by command, the ACL rule that this user lacks.
    """

    user: str
    name: str
    version: tuple[int, ...]
    role: str
    fields: Mapping[str, str] = field(default_factory=dict)
    settings: Mapping[str, str] = field(default_factory=dict)
    missing: Mapping[str, str] = field(default_factory=dict)

    def number(self, name: str) -> int | None:
        """Return an integer field of INFO or an integer setting; None if unknown."""
        return whole_number(self.fields.get(name, self.settings.get(name, "")))


def read_server_info(connection: Connection, server: Server | None = None) -> ServerInfo:
    """Read what a server reports; by default the only server."""
    fields = connection.server_info(server)
    names = ["ACL WHOAMI", "HELLO", "INFO server", *(f"CONFIG GET {name}" for name in SETTINGS)]
    commands = [tuple(name.split()) for name in names]
    replies = _ask(connection, server, commands)
    by_name = dict(zip(names, replies, strict=True))
    missing = {}
    for name, reply in by_name.items():
        if isinstance(reply, AccessDenied):
            missing[_command_of(name)] = reply.rule
    settings: dict[str, str] = {}
    for name in SETTINGS:
        reply = by_name[f"CONFIG GET {name}"]
        if not isinstance(reply, PeerError):
            settings |= text_fields(reply)
    whoami, hello = by_name["ACL WHOAMI"], by_name["HELLO"]
    greeting = {} if isinstance(hello, PeerError) else text_fields(hello)
    if greeting.get("server") not in _SERVERS:  # a fake server, whose version numbers mean something else
        greeting = {}
    version = fields.get("redis_version") or greeting.get("version", "")
    name = name_and_version(fields) or " ".join(
        word for word in (greeting.get("server", "").capitalize(), version) if word
    )
    role = fields.get("role") or greeting.get("role", "")
    return ServerInfo(
        user=connection.user if isinstance(whoami, PeerError) else whoami.decode(errors="replace"),
        name=name,
        version=tuple(int(part) for part in version.split(".") if part.isdecimal()),
        role="replica" if role == "slave" else role,
        fields=fields,
        settings=settings,
        missing=missing,
    )


def _ask(
    connection: Connection,
    server: Server | None,
    commands: Sequence[Command],
    deadline: Deadline | None = None,
) -> list[Any]:
    """Return the replies of a server, by default of the only one; a refusal is a `PeerError`."""
    if server:
        return connection.execute_at(server, commands)
    return connection.execute_all(commands, strict=False, deadline=deadline)


def _command_of(call: str) -> str:
    """Return the command of a call, without its arguments."""
    return "INFO" if call.startswith("INFO") else " ".join(call.split()[:2])


def measure_latency(connection: Connection, server: Server | None = None) -> Latency:
    """Measure round trips to a server, and the difference of the clocks; by default the only server."""
    taken: list[float] = []
    began = time.perf_counter()
    while len(taken) < ROUND_TRIPS:
        sent = time.perf_counter()
        _ask(connection, server, [("PING",)], deadline=ONE_TRY)
        taken.append(time.perf_counter() - sent)
        if len(taken) >= _LEAST_ROUND_TRIPS and time.perf_counter() - began > _ROUND_TRIPS_SECONDS:
            break
    differences: list[tuple[float, float]] = []  # each with the duration of its round trip
    for _ in range(_LEAST_ROUND_TRIPS):
        sent = time.perf_counter()
        (clock,) = _ask(connection, server, [("TIME",)])
        trip_seconds, now = time.perf_counter() - sent, time.time()
        if isinstance(clock, PeerError):
            break
        differences.append((trip_seconds, now - trip_seconds / 2 - server_seconds(clock)))
    _, ahead_seconds = min(differences, default=(0.0, None))  # the shortest round trip is the most exact
    return Latency(median(taken), max(taken), len(taken), ahead_seconds)
