"""The longest argument that a server takes: how to notice that a request exceeds it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, Final

import redis
from redis import exceptions as redis_errors

from rlbroker.backend.deadline import try_seconds
from rlbroker.backend.resp import Argument, Pieces
from rlbroker.backend.tls import QUIET_SECONDS

#: No server can be set to take only shorter arguments than this (its `proto-max-bulk-len`).
LEAST_ARGUMENT_BYTES: Final = 1 << 20

#: What a server answers before it closes the connection.
LENGTH_REFUSAL: Final = "Protocol error: invalid bulk length"


def largest_of(commands: Iterable[Sequence[Argument | Pieces]]) -> Sequence[Argument | Pieces]:
    """Return the command with the longest argument; empty if there is no command."""
    return max(commands, key=argument_bytes, default=())


def argument_bytes(command: Sequence[object]) -> int:
    """Return the bytes of the longest argument of a command, which may be in pieces."""
    return max((_length(part) for part in command), default=0)


def _length(part: object) -> int:
    if isinstance(part, tuple):
        return sum(map(_length, part))
    return len(part) if isinstance(part, str | bytes | bytearray | memoryview) else 0


def exceeded_limit(pool: redis.ConnectionPool, size: int, error: redis_errors.RedisError) -> str:
    """Return the setting because of which the server takes no argument of this size; empty if it is another fault.

    The reply often cannot be read before the connection is closed, and for `client-query-buffer-limit` there is none.
    So announce such an argument over another connection and read the reply, then ask for the other setting.
    """
    if _is_length_refusal(error):
        return "proto-max-bulk-len"
    if type(error) is not redis_errors.ConnectionError:
        return ""
    connection: Any = None
    try:
        connection = pool.get_connection()
        connection.send_packed_command([b"*1\r\n$%d\r\n" % size], check_health=False)
        if connection.can_read(try_seconds(QUIET_SECONDS)):
            connection.read_response()
        connection.disconnect()
        connection.connect()
        return "client-query-buffer-limit" if size > _query_buffer_limit(connection) else ""
    except redis_errors.RedisError as reply:
        return "proto-max-bulk-len" if _is_length_refusal(reply) else ""
    finally:
        if connection is not None:
            connection.disconnect()
            pool.release(connection)


def _query_buffer_limit(connection: Any) -> float:
    """Return the bytes that the server keeps of a request that is not complete; infinity if it does not say."""
    connection.send_command("CONFIG", "GET", "client-query-buffer-limit", check_health=False)
    reply = connection.read_response()
    values = list(reply.values()) if isinstance(reply, dict) else reply[1::2]
    return float(values[0]) if values else math.inf


def _is_length_refusal(error: redis_errors.RedisError) -> bool:
    """Return whether the server closes the connection because an argument is too long for it."""
    return LENGTH_REFUSAL in str(error)
