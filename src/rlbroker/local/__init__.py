"""Processes on this machine that never outlive this process: an embedded server, and guarded commands."""

from rlbroker.local.embedded_server import RedisServer, find_binary

__all__ = ["RedisServer", "find_binary"]
