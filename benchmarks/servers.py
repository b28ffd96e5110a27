"""The server that everyone uses, and names on it that are removed afterwards."""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import redis

from rlbroker.local import RedisServer

_numbers = itertools.count(1)

#: Keys that are deleted with one command.
_AT_ONCE = 500


@contextlib.contextmanager
def server(url: str | None) -> Iterator[str]:
    """Give the URL of the given server, or of an embedded one that ends with the block."""
    if url is not None:
        yield url
        return
    with RedisServer() as embedded:
        yield embedded.url


@contextlib.contextmanager
def scratch(url: str) -> Iterator[str]:
    """Give a name that nobody uses, for runs and keys; all that begins with it is deleted in the end."""
    name = f"bench-{os.getpid()}-{next(_numbers)}"
    try:
        yield name
    finally:
        client = redis.Redis.from_url(url)
        try:
            found = [key for pattern in ("", "rlb:{") for key in client.scan_iter(f"{pattern}{name}*", 1000)]
            for batch in (found[first : first + _AT_ONCE] for first in range(0, len(found), _AT_ONCE)):
                client.unlink(*batch)
        finally:
            client.close()


@dataclass(frozen=True)
class ServerFigures:
    """What a server has done and holds; `since` gives what it did between two readings."""

    cpu_seconds: float
    received_bytes: int
    sent_bytes: int
    commands: Mapping[str, int]  #: by name: calls
    memory_bytes: int
    peak_memory_bytes: int
    connections: int

    def since(self, before: ServerFigures) -> ServerFigures:
        """Give what was done after `before`; what it holds is that of now."""
        calls = {name: count - before.commands.get(name, 0) for name, count in self.commands.items()}
        return ServerFigures(
            self.cpu_seconds - before.cpu_seconds,
            self.received_bytes - before.received_bytes,
            self.sent_bytes - before.sent_bytes,
            {name: count for name, count in calls.items() if count},
            self.memory_bytes,
            self.peak_memory_bytes,
            self.connections,
        )


class Meter:
    """Reads the figures of one server, over a connection of its own that is not counted."""

    def __init__(self, url: str) -> None:
        self._client = redis.Redis.from_url(url)

    def read(self) -> ServerFigures:
        found = self._client.info("everything")
        return ServerFigures(
            found["used_cpu_sys"] + found["used_cpu_user"],
            found["total_net_input_bytes"],
            found["total_net_output_bytes"],
            {
                name.removeprefix("cmdstat_"): said["calls"]
                for name, said in found.items()
                if name.startswith("cmdstat_")
            },
            found["used_memory"],
            found["used_memory_peak"],
            found["connected_clients"] - 1,
        )

    def close(self) -> None:
        self._client.close()
