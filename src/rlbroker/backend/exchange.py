"""Requests and their replies over one connection: the only place that sends."""

from __future__ import annotations

import socket
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any, Final

from redis import exceptions as redis_errors

from rlbroker.backend.resp import Command, Piece, pack_commands

#: The most bytes given to a socket at once. The socket's timeout applies to each such piece.
SEND_BYTES: Final = 1 << 20


class Exchange:
    """Requests and their replies over one connection of a pool. Its errors are redis-py's.

    An exception of a signal handler may end a call at any point. So a request counts as unanswered from before its
    first byte is sent until its reply was read, and each new use begins with a look: if anything is unanswered, the
    connection is closed, and another one opened. Nothing depends on what an interrupted call still did.
    """

    def __init__(self, pool: Any) -> None:
        """Create an exchange; nothing is connected yet."""
        self._pool = pool
        self._redis_connection: Any = None
        self._unanswered: deque[Command] = deque()

    def open(self) -> bool:
        """Open a connection unless there is one without unanswered requests; return whether it is new."""
        if self._redis_connection is not None:
            if self._redis_connection.is_connected and not self._unanswered:
                return False
            self.close()
        self._open()
        return True

    def _open(self) -> None:
        self._redis_connection = self._pool.get_connection()

    def put(self, commands: Sequence[Command]) -> None:
        """Send commands; `get` returns the replies."""
        if self._unanswered or self._redis_connection is None or not self._redis_connection.is_connected:
            self.open()
        send = self._redis_connection.send_packed_command
        for piece in self.noting(commands):
            send([piece], check_health=False)

    def noting(self, commands: Sequence[Command]) -> Iterator[Piece]:
        """Return what to send for commands, which are noted as unanswered."""
        self._unanswered.extend(commands)
        return pack_commands(commands, piece_bytes=SEND_BYTES)

    def get(self, count: int) -> list[Any]:
        """Return the next replies; each error reply is what `_refusal` makes of it."""
        if self._redis_connection is None:
            raise redis_errors.ConnectionError("the connection was closed")
        read, unanswered = self._redis_connection.read_response, self._unanswered
        replies: list[Any] = []
        while len(replies) < count:
            command = unanswered[0]
            try:
                replies.append(read())
            except redis_errors.ResponseError as error:
                # Without its traceback, the frames of which would keep the connection alive.
                replies.append(self._refusal(error.with_traceback(None), command))
            unanswered.popleft()
        return replies

    def _refusal(self, error: redis_errors.ResponseError, command: Command) -> Any:
        return error

    def note_answered(self) -> None:
        """Note that the next reply was read."""
        self._unanswered.popleft()

    def give_back(self) -> None:
        """Return the connection to its pool, or close it if a reply is unread. May be called again."""
        if self._unanswered:
            self.close()
        redis_connection, self._redis_connection = self._redis_connection, None
        if redis_connection is not None:
            self._pool.release(redis_connection)

    def close(self) -> None:
        """Close the connection. May be called again."""
        redis_connection, self._redis_connection = self._redis_connection, None
        self._unanswered = deque()  # another thread may still be reading; it meets the closed connection
        if redis_connection is not None:
            redis_connection.disconnect()
            self._pool.release(redis_connection)

    @property
    def raw_socket(self) -> socket.socket | None:
        """The connection's socket, with nothing read ahead; None if redis-py must read and write itself.

        That is so with fakeredis, with redis-py's client-side cache, and with unknown releases of redis-py.
        """
        found = getattr(self._redis_connection, "_sock", None)
        parser = getattr(self._redis_connection, "_parser", None)
        return found if isinstance(found, socket.socket) and hasattr(parser, "parse_error") else None
