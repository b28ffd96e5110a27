"""The server that everyone uses, and names on it that are removed afterwards."""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Iterator

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
