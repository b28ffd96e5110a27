"""The choice of the shards over which a new run is spread."""

from __future__ import annotations

import re
from collections import Counter

from rlbroker.backend.connection import Connection
from rlbroker.backend.keys import Keys
from rlbroker.errors import InvalidArgument

#: The value of a shard's key: the numbers of all shards of the run.
_SHARDS = re.compile(rb"\d{1,4}( \d{1,4})*")


def choose_shards(connection: Connection, keys: Keys, count: int | None) -> str:
    """Return the shards for a run: those it has, or new ones, spread evenly over the masters of a Cluster.

    Args:
        count: the number of shards of a new run; None for one on each master.

    Returns:
        The numbers of the shards, separated by spaces; empty without a Cluster.

    Raises:
        InvalidArgument: `count` asks for several shards, and the server is not a Cluster.
    """
    if not connection.servers.several:
        if count not in (None, 1):
            raise InvalidArgument(f"shards need a Cluster, and {connection.address} is not one")
        return ""
    if not connection.execute("EXISTS", keys.meta) and (found := _read_shards(connection, keys)):
        return found
    masters = len(connection.masters())
    return keys.choose_shards(count or masters, masters, connection.master_for)


def _read_shards(connection: Connection, keys: Keys) -> str:
    """Return the shards of a run whose `meta` was lost with its node, from the keys of its other shards."""
    replies = connection.execute_all([("GET", key) for key in keys.one_of_likely_shards], strict=False)
    votes = Counter(text.decode() for text in replies if isinstance(text, bytes) and _SHARDS.fullmatch(text))
    return max(votes, key=votes.__getitem__, default="")
