"""Moving chunks between the server and memory without a copy in between.

redis-py connects, logs in and does TLS. The chunks themselves go through its connection's socket: out from where
the parts lie, and in to where they belong. Where there is no such socket, as with fakeredis, redis-py moves them.
"""

from __future__ import annotations

import math
import re
import socket
import ssl
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from itertools import islice
from typing import Final

from rlbroker.connection import SEND_BYTES, Channel, Connection
from rlbroker.deadline import Backoff, Deadline, try_seconds
from rlbroker.errors import ConnectionFailed, PeerError, WireError
from rlbroker.wire.format import byte_view

#: Bytes that are asked for and not received, or one chunk more than is being received: a server with nothing to do
#: costs a third of the speed over TCP. The server may hold so much in memory for each reader.
READ_WINDOW_BYTES: Final = 4 << 20

#: Bytes that are sent and not confirmed, besides the chunk that is being sent.
WRITE_WINDOW_BYTES: Final = 8 << 20

#: Bytes read at once where a line is expected: the beginning of a chunk that comes with it is copied.
LINE_BYTES: Final = 4096

#: No line of a reply is longer; errors are the longest.
LONGEST_LINE_BYTES: Final = 1 << 16

#: Pieces that one system call may take: 1,024 on Linux.
PIECES: Final = 512

Part = bytes | memoryview
Chunks = Sequence[tuple[str, memoryview]]


class Patience:
    """How long moving goes on over faults of the connection: as long as something gets through in time."""

    def __init__(self, connection: Connection, deadline: Deadline | None = None) -> None:
        """Wait until the deadline; by default for the connection's timeout, from when something moved last."""
        self._connection, self._deadline = connection, deadline
        self._backoff = Backoff()
        self._quiet = deadline or Deadline(connection.timeout_seconds)

    def outlast(self, fault: ConnectionFailed, *, moved: bool) -> None:
        """Wait until the server answers again; raise the fault if that takes too long.

        Args:
            fault: what happened.
            moved: whether something had got through since the fault before.
        """
        if moved and self._deadline is None:
            self._quiet = Deadline(self._connection.timeout_seconds)
            self._backoff.reset()
        time.sleep(self._backoff.next(self._quiet))
        if self._quiet.over:
            raise fault
        self._connection.execute("PING", deadline=self._quiet)


class ChunkReader:
    """Reads chunks straight into memory. One read at a time; not for several threads at once."""

    def __init__(self, connection: Connection) -> None:
        """Prepare a reader; nothing is connected yet."""
        self._connection = connection
        self._channel = Channel(connection)

    def read(self, chunks: Chunks) -> Iterator[int]:
        """Fill the memory of each chunk, in order, and give its index once it is filled.

        Who stops half-way drops the connection. Each step keeps the deadline that holds for its thread.

        Args:
            chunks: key and memory: writable, contiguous, of bytes, and as long as what is stored.

        Raises:
            WireError: a chunk is gone, or has another length; what its memory then holds means nothing.
            ConnectionFailed: the connection broke, or nothing came for too long.
            PeerError: the server refused.
        """
        self.close()
        channel = self._channel = Channel(self._connection)
        return self._read(channel, chunks)

    def close(self) -> None:
        """Give up what is being read. May be called again."""
        self._channel.close()

    def _read(self, channel: Channel, chunks: Chunks) -> Iterator[int]:
        try:
            channel.connect()
            sock = channel.raw_socket
            if sock is None:
                yield from _read_by_client(channel, chunks)
            else:
                yield from _receive(_Pipe(channel, sock, self._connection.socket_seconds), chunks)
            channel.give_back()
        finally:
            channel.close()


class ChunkWriter:
    """Stores chunks straight from memory. One write at a time; not for several threads at once."""

    def __init__(self, connection: Connection) -> None:
        """Prepare a writer; nothing is connected yet."""
        self._connection = connection
        self._channel = Channel(connection)
        #: How many of the chunks of the last `write` are stored for certain, from the first on.
        self.confirmed = 0

    def write(self, chunks: Iterable[tuple[str, Sequence[Part]]], *, expire_seconds: int) -> None:
        """Store chunks, which are made while earlier ones are under way; once, within the deadline that holds.

        Args:
            chunks: key, and the parts that make up the value when joined. The parts must stay as they are until
                all is written; after an error, those from `confirmed` on may be stored or not.
            expire_seconds: how long they stay, unless told otherwise later.

        Raises:
            ServerOutOfMemory: the server is full.
            ConnectionFailed: the connection broke, or nothing moved for too long.
            PeerError: the server refused.
        """
        self.close()
        self.confirmed = 0
        channel = self._channel = Channel(self._connection)
        try:
            channel.connect()
            sock = channel.raw_socket
            if sock is None:
                self._write_by_client(channel, chunks, expire_seconds)
            else:
                self._send(_Pipe(channel, sock, self._connection.socket_seconds), chunks, expire_seconds)
            channel.give_back()
        finally:
            channel.close()

    def close(self) -> None:
        """Give the connection up. May be called again."""
        self._channel.close()

    def _send(self, pipe: _Pipe, chunks: Iterable[tuple[str, Sequence[Part]]], expire_seconds: int) -> None:
        under_way: deque[int] = deque()
        try:
            for key, parts in chunks:
                views = [byte_view(part) for part in parts]
                size = sum(map(len, views))
                head = b"*5\r\n$3\r\nSET\r\n%b$%d\r\n" % (_bulk(key), size)
                pipe.send([head, *views, b"\r\n$2\r\nEX\r\n" + _bulk(str(expire_seconds))])
                under_way.append(size)
                while sum(under_way) > WRITE_WINDOW_BYTES:
                    self._confirm(pipe, under_way)
            while under_way:
                self._confirm(pipe, under_way)
        except BaseException:  # Ctrl-C too
            with suppress(PeerError):  # nothing may still arrive when the caller clears what was stored
                for _ in under_way:
                    pipe.line()
            raise

    def _confirm(self, pipe: _Pipe, under_way: deque[int]) -> None:
        line = pipe.line()
        under_way.popleft()
        if line != b"+OK":
            raise pipe.error(line)
        self.confirmed += 1

    def _write_by_client(
        self, channel: Channel, chunks: Iterable[tuple[str, Sequence[Part]]], expire_seconds: int
    ) -> None:
        for key, parts in chunks:
            channel.execute("SET", key, b"".join(parts), "EX", expire_seconds)
            self.confirmed += 1


class _Pipe:
    """The socket of a channel, as requests and replies need it."""

    def __init__(self, channel: Channel, sock: socket.socket, socket_seconds: float) -> None:
        self._channel, self._sock, self._socket_seconds = channel, sock, socket_seconds
        self._buffer = memoryview(bytearray(LINE_BYTES))
        self._unread = self._buffer[:0]
        self.begin()

    def begin(self) -> None:
        """Have what follows keep the deadline that now holds for this thread."""
        self._deadline = Deadline(try_seconds(math.inf))

    def send(self, parts: Sequence[Part]) -> None:
        """Send parts, one after the other; the first is not empty."""
        left: deque[memoryview] = deque(memoryview(part) for part in parts)
        with self._channel.care:
            while left:
                self._bound()
                if isinstance(self._sock, ssl.SSLSocket):
                    sent = self._sock.send(left[0][:SEND_BYTES])
                else:
                    sent = self._sock.sendmsg(list(islice(left, PIECES)))
                while left and sent >= len(left[0]):
                    sent -= len(left.popleft())
                if sent:
                    left[0] = left[0][sent:]

    def line(self) -> bytes:
        """Receive the next line of a reply, without its end."""
        found = bytearray()
        with self._channel.care:
            while not found.endswith(b"\r\n"):
                if len(found) > LONGEST_LINE_BYTES:
                    raise ConnectionError("a line of a reply does not end")
                if not self._unread:
                    self._unread = self._buffer[: self._receive(self._buffer)]
                end = bytes(self._unread).find(b"\n") + 1 or len(self._unread)
                found += self._unread[:end]
                self._unread = self._unread[end:]
        return bytes(found[:-2])

    def fill(self, memory: memoryview) -> None:
        """Receive as many bytes as fit."""
        have = min(len(memory), len(self._unread))
        memory[:have] = self._unread[:have]
        self._unread = self._unread[have:]
        with self._channel.care:
            while have < len(memory):
                have += self._receive(memory[have:])

    def error(self, line: bytes) -> PeerError:
        """Give the error for a reply that is not what was asked for."""
        if line.startswith(b"-"):
            return self._channel.refusal(line[1:])
        return self._channel.refusal(b"unexpected reply %r" % line)

    def _receive(self, memory: memoryview) -> int:
        self._bound()
        received = self._sock.recv_into(memory)
        if not received:
            raise ConnectionResetError("the server closed the connection")
        return received

    def _bound(self) -> None:
        limit = min(self._socket_seconds, self._deadline.remaining)
        if not limit:
            raise TimeoutError("timed out")
        if self._sock.gettimeout() != limit:
            self._sock.settimeout(limit)


def _receive(pipe: _Pipe, chunks: Chunks) -> Iterator[int]:
    asked = under_way = 0
    for index, (key, memory) in enumerate(chunks):
        pipe.begin()
        requests = []
        while asked < len(chunks) and (
            asked <= index + 1 or under_way + len(chunks[asked][1]) <= READ_WINDOW_BYTES
        ):
            requests.append(b"*2\r\n$3\r\nGET\r\n" + _bulk(chunks[asked][0]))
            under_way += len(chunks[asked][1])
            asked += 1
        if requests:
            pipe.send([b"".join(requests)])
        line = pipe.line()
        if line in (b"$-1", b"_"):
            raise WireError(f"chunk {key} is gone")
        if not re.fullmatch(rb"\$\d{1,18}", line):
            raise pipe.error(line)
        _check(key, int(line[1:]), memory)
        pipe.fill(memory)
        if end := pipe.line():
            raise pipe.error(end)
        under_way -= len(memory)
        yield index


def _read_by_client(channel: Channel, chunks: Chunks) -> Iterator[int]:
    for index, (key, memory) in enumerate(chunks):
        data = channel.execute("GET", key)
        if data is None:
            raise WireError(f"chunk {key} is gone")
        _check(key, len(data), memory)
        memory[:] = data
        yield index


def _check(key: str, length: int, memory: memoryview) -> None:
    if length != len(memory):
        raise WireError(f"chunk {key} has {length} bytes instead of {len(memory)}")


def _bulk(text: str) -> bytes:
    data = text.encode()
    return b"$%d\r\n%b\r\n" % (len(data), data)
