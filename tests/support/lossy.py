"""A Redis client that loses replies and breaks connections, also on fakeredis."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import redis


class Lossy:
    """A client that drops some replies and their connections after the server has run the commands."""

    def __init__(self, client: Any, loses: Callable[[], bool]) -> None:
        """Wrap a client that has no connections yet.

        Args:
            client: a client without retries.
            loses: returns, for each reply, whether it is lost.
        """
        self.client, self.lost = client, 0
        self._loses = loses
        self._connections: list[Any] = []
        pool = self._pool(client)
        pool.connection_class = self._make_lossy(pool.connection_class)

    def _pool(self, client: Any) -> Any:
        """Return the pool from which rlbroker takes the connection class: for a Cluster, that of the default node."""
        if isinstance(client, redis.RedisCluster):
            of_cluster: Any = client
            client = of_cluster.get_redis_connection(of_cluster.get_default_node())
        return client.connection_pool

    def break_connections(self) -> None:
        """Make every connection fail at its next use, before the server receives the command."""
        for connection in self._connections:
            connection.is_broken = True

    def _make_lossy(self, connection_class: Any) -> Any:
        lossy = self

        class LossyConnection(connection_class):  # type: ignore[misc] # the base class is dynamic
            def __init__(self, **settings: Any) -> None:
                self.is_broken = False
                super().__init__(**settings)
                lossy._connections.append(self)

            def send_packed_command(self, *arguments: Any, **options: Any) -> Any:
                if self.is_broken:
                    self.is_broken = False
                    self.disconnect()
                    raise redis.ConnectionError("the connection was broken")
                return super().send_packed_command(*arguments, **options)

            def read_response(self, *arguments: Any, **options: Any) -> Any:
                reply = super().read_response(*arguments, **options)
                if lossy._loses():
                    lossy.lost += 1
                    self.disconnect()
                    raise redis.ConnectionError("the reply was lost")
                return reply

        return LossyConnection
