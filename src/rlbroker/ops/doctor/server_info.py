"""What a server says of itself, as far as it tells this user; what it does not tell is missing, and no error."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from statistics import median
from typing import Final

from rlbroker.backend.connection import Connection
from rlbroker.backend.replies import server_seconds, text_fields, whole_number
from rlbroker.backend.topology import Server
from rlbroker.errors import AccessDenied, PeerError

#: Settings that matter to rlbroker.
SETTINGS: Final = (
    "appendfsync",
    "client-output-buffer-limit",
    "maxclients",
    "maxmemory",
    "maxmemory-policy",
    "proto-max-bulk-len",
    "save",
    "tcp-keepalive",
    "timeout",
)

#: Round trips that are measured, as long as there is time for them.
ROUND_TRIPS: Final = 20
_ROUND_TRIPS_SECONDS: Final = 1.0
_LEAST_ROUND_TRIPS: Final = 3


#: How servers that rlbroker knows call themselves when they are greeted.
_SERVERS: Final = ("redis", "valkey")


@dataclass(frozen=True)
class Latency:
    """How long the server takes to answer, and how far this machine's clock is from its.

    Attributes:
        median_seconds: of the round trips.
        worst_seconds: of the slowest one.
        trips: how many were measured.
        ahead_seconds: by how much this machine's clock is ahead of the server's; None where it may not be asked.
    """

    median_seconds: float
    worst_seconds: float
    trips: int
    ahead_seconds: float | None


@dataclass(frozen=True)
class ServerInfo:
    """What a server says of itself.

    Attributes:
        user: who asks.
        name: the server's name and version; empty if it does not tell.
        version: the version of Redis that it is like, such as (7, 2, 4); empty if it does not tell.
        role: `master` or `replica`; empty if it does not tell.
        info: what INFO gives.
        settings: what CONFIG GET gives.
        missing: by command, the rule that this user lacks; empty where the server does not know the command.
    """

    user: str
    name: str
    version: tuple[int, ...]
    role: str
    info: Mapping[str, str] = field(default_factory=dict)
    settings: Mapping[str, str] = field(default_factory=dict)
    missing: Mapping[str, str] = field(default_factory=dict)

    def number(self, name: str) -> int | None:
        """Give a whole number of INFO, or of a setting; None if the server does not tell it."""
        return whole_number(self.info.get(name, self.settings.get(name, "")))


def read_server_info(connection: Connection, server: Server | None = None) -> ServerInfo:
    """Ask a server, by default the only one, what it says of itself.

    Raises:
        PeerError: it could not be reached in time.
    """
    info = connection.server_info(server)
    names = ["ACL WHOAMI", "HELLO", "INFO server", *(f"CONFIG GET {name}" for name in SETTINGS)]
    commands = [tuple(name.split()) for name in names]
    replies = connection.ask_at(server, commands) if server else connection.ask(commands)
    answers = dict(zip(names, replies, strict=True))
    missing = {}
    for name, answer in answers.items():
        if isinstance(answer, AccessDenied):
            missing[_command(name)] = answer.rule
    settings: dict[str, str] = {}
    for name in SETTINGS:
        answer = answers[f"CONFIG GET {name}"]
        if not isinstance(answer, PeerError):
            settings |= text_fields(answer)
    whoami, hello = answers["ACL WHOAMI"], answers["HELLO"]
    greeting = {} if isinstance(hello, PeerError) else text_fields(hello)
    if greeting.get("server") not in _SERVERS:  # a fake, which counts its versions otherwise
        greeting = {}
    version = info.get("redis_version") or greeting.get("version", "")
    name = connection.server_version(info) or " ".join(
        word for word in (greeting.get("server", "").capitalize(), version) if word
    )
    role = info.get("role") or greeting.get("role", "")
    return ServerInfo(
        user=connection.user if isinstance(whoami, PeerError) else whoami.decode(errors="replace"),
        name=name,
        version=tuple(int(part) for part in version.split(".") if part.isdecimal()),
        role="replica" if role == "slave" else role,
        info=info,
        settings=settings,
        missing=missing,
    )


def _command(words: str) -> str:
    return words.removesuffix(" server") if words.startswith("INFO") else " ".join(words.split()[:2])


def measure_latency(connection: Connection, server: Server | None = None) -> Latency:
    """Measure round trips to a server, by default the only one, and the difference of the clocks.

    Raises:
        PeerError: the server could not be reached in time.
    """
    taken: list[float] = []
    began = time.perf_counter()
    while len(taken) < ROUND_TRIPS:
        sent = time.perf_counter()
        if server:
            connection.ask_at(server, [("PING",)])
        else:
            connection.execute_once("PING")
        taken.append(time.perf_counter() - sent)
        if len(taken) >= _LEAST_ROUND_TRIPS and time.perf_counter() - began > _ROUND_TRIPS_SECONDS:
            break
    best: tuple[float, float] | None = None  # of several answers, that of the shortest trip is the most exact
    for _ in range(_LEAST_ROUND_TRIPS):
        sent = time.perf_counter()
        (clock,) = connection.ask_at(server, [("TIME",)]) if server else connection.ask([("TIME",)])
        trip_seconds, now = time.perf_counter() - sent, time.time()
        if isinstance(clock, PeerError):
            break
        ahead_seconds = now - trip_seconds / 2 - server_seconds(clock)
        best = min(best or (trip_seconds, ahead_seconds), (trip_seconds, ahead_seconds))
    return Latency(median(taken), max(taken), len(taken), best[1] if best else None)
