"""The longest argument that a server takes (its `proto-max-bulk-len`): how to notice that a request exceeds it."""

from __future__ import annotations

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


def refuses_argument(pool: redis.ConnectionPool, size: int, error: redis_errors.RedisError) -> bool:
    """Return whether a connection broke because the server takes no argument of this size.

    The reply often cannot be read before the connection is closed. So announce such an argument over another
    connection, and read the reply.
    """
    if _is_length_refusal(error) or type(error) is not redis_errors.ConnectionError:
        return _is_length_refusal(error)
    connection: Any = None
    try:
        connection = pool.get_connection()
        connection.send_packed_command([b"*1\r\n$%d\r\n" % size], check_health=False)
        if connection.can_read(try_seconds(QUIET_SECONDS)):
            connection.read_response()
    except redis_errors.RedisError as reply:
        return _is_length_refusal(reply)
    finally:
        if connection is not None:
            connection.disconnect()
            pool.release(connection)
    return False


def _is_length_refusal(error: redis_errors.RedisError) -> bool:
    """Return whether the server closes the connection because an argument is too long for it."""
    return LENGTH_REFUSAL in str(error)
