"""The reader of a run's control stream, which waits for new entries on a connection of its own."""

from __future__ import annotations

import socket
from collections.abc import Callable
from typing import Any, Final

from rlbroker.backend.channel import Channel
from rlbroker.backend.connection import Connection
from rlbroker.backend.deadline import Deadline, within
from rlbroker.backend.keys import Keys
from rlbroker.backend.replies import stream_entries
from rlbroker.errors import PeerError, raise_again

#: Longest time that one read waits on the server.
READ_SECONDS: Final = 2.0

#: The most entries that one read returns.
READ_COUNT: Final = 100


class ControlReader:
    """Reads the control stream for one worker. Other threads may call only `has_position` and `restart`."""

    def __init__(
        self,
        connection: Connection,
        keys: Keys,
        position: str,
        *,
        wait_for: Callable[[socket.socket, float], bool],
    ) -> None:
        """Prepare a reader; nothing is read yet.

        Args:
            position: id of the entry to read after.
            wait_for: waits until a socket is readable and returns whether it is; returns early to interrupt `read`.
        """
        self._connection, self._stream_key, self._wait_for = connection, keys.control, wait_for
        self._channel = Channel(connection, keys.control)
        #: The id of the last entry that was handled.
        self.position = position
        self._restart = False
        #: When the reply to a read must have arrived; None if no read was sent.
        self.reply_due: Deadline | None = None

    def read(self) -> list[tuple[str, dict[bytes, bytes]]]:
        """Wait for entries after `position`, and return their ids and fields; none on a timeout or interruption."""
        if self._restart:
            self._restart, self.position = False, "0-0"
            self.close()
        return [
            (entry_id, fields or {})
            for _, entries in stream_entries(self._receive())
            for entry_id, fields in entries
        ]

    def has_position(self, channel: Channel) -> bool:
        """Return whether the server still has the entry at `position`; if not, it lost or trimmed the stream."""
        return bool(channel.execute("XRANGE", self._stream_key, self.position, self.position))

    def restart(self) -> None:
        """Make the next `read` begin at the first entry of the stream."""
        self._restart = True

    def close(self) -> None:
        """Close the connection."""
        self.reply_due = None
        self._channel.close()

    def _receive(self) -> Any:
        """Return the reply to a read. An interrupted read stays sent, and the next call waits for its reply."""
        if self.reply_due is None:
            self._channel.connect()
        sock = self._channel.raw_socket
        connection = self._connection
        if self.reply_due is None:
            seconds = min(READ_SECONDS, connection.timeout_seconds / 4, connection.socket_seconds / 2)
            if sock is None:  # the read cannot be interrupted
                seconds = connection.block_seconds
            block = "BLOCK", max(1, int(seconds * 1000))
            self._channel.send(
                [("XREAD", "COUNT", READ_COUNT, *block, "STREAMS", self._stream_key, self.position)]
            )
            self.reply_due = Deadline(seconds + connection.socket_seconds)
        due = self.reply_due
        if sock is not None and not self._wait_for(sock, due.remaining) and not due.over:
            return None
        self.reply_due = None
        with within(due):
            (reply,) = self._channel.receive(1)
        if isinstance(reply, PeerError):
            raise_again(reply)
        return reply
