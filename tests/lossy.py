"""A client whose replies can be lost, and whose connections can break, on fakeredis too."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import redis


class Lossy:
    """Loses replies of a client, after the server has done what was asked; the connection breaks with them."""

    def __init__(self, client: Any, loses: Callable[[], bool]) -> None:
        """Take over a client that has no connections yet.

        Args:
            client: the client; it must not try again by itself.
            loses: is asked at each reply whether that one is lost.
        """
        self.client, self.lost = client, 0
        self._loses = loses
        self._wrapped: set[Any] = set()
        self._broken: set[Any] = set()
        give = client.connection_pool.get_connection
        client.connection_pool.get_connection = lambda *arguments: self._wrap(give(*arguments))

    def break_connections(self) -> None:
        """Have every connection fail at its next use, before the server gets what is sent."""
        self._broken |= self._wrapped

    def _wrap(self, connection: Any) -> Any:
        if connection in self._wrapped:
            return connection
        self._wrapped.add(connection)
        send, read = connection.send_packed_command, connection.read_response

        def send_or_break(*arguments: Any, **options: Any) -> Any:
            if connection in self._broken:
                self._broken.discard(connection)
                connection.disconnect()
                raise redis.ConnectionError("the connection was broken")
            return send(*arguments, **options)

        def read_or_lose(*arguments: Any, **options: Any) -> Any:
            reply = read(*arguments, **options)
            if self._loses():
                self.lost += 1
                connection.disconnect()
                raise redis.ConnectionError("the reply was lost")
            return reply

        connection.send_packed_command, connection.read_response = send_or_break, read_or_lose
        return connection
