"""Processes on this machine: an embedded server, and a supervisor of child processes."""

from rlbroker.local.embedded_server import RedisServer, find_binary
from rlbroker.local.supervisor import ProcessStatus, Supervisor

__all__ = ["ProcessStatus", "RedisServer", "Supervisor", "find_binary"]
