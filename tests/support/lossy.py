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
        self._made: list[Any] = []
        pool = self._pool(client)
        pool.connection_class = self._lossy(pool.connection_class)

    def _pool(self, client: Any) -> Any:
        """Give the pool whose kind of connections rlbroker makes: of a Cluster's client, that of its first node."""
        if isinstance(client, redis.RedisCluster):
            of_cluster: Any = client
            client = of_cluster.get_redis_connection(of_cluster.get_default_node())
        return client.connection_pool

    def break_connections(self) -> None:
        """Have every connection fail at its next use, before the server gets what is sent."""
        for connection in self._made:
            connection.is_broken = True

    def _lossy(self, connection_class: Any) -> Any:
        line = self

        class LossyConnection(connection_class):  # type: ignore[misc] # known only when it runs
            def __init__(self, **settings: Any) -> None:
                self.is_broken = False
                super().__init__(**settings)
                line._made.append(self)

            def send_packed_command(self, *arguments: Any, **options: Any) -> Any:
                if self.is_broken:
                    self.is_broken = False
                    self.disconnect()
                    raise redis.ConnectionError("the connection was broken")
                return super().send_packed_command(*arguments, **options)

            def read_response(self, *arguments: Any, **options: Any) -> Any:
                reply = super().read_response(*arguments, **options)
                if line._loses():
                    line.lost += 1
                    self.disconnect()
                    raise redis.ConnectionError("the reply was lost")
                return reply

        return LossyConnection
