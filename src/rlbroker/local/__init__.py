"""Processes on this machine: an embedded server, and a supervisor of worker processes."""

from rlbroker.local.redis_server import RedisServer, find_binary

__all__ = ["RedisServer", "find_binary"]
