"""Moving chunks between servers and memory without a copy in between.

On a Cluster the chunks of a version are on several nodes. One thread serves them all: it asks each for more than it is
taking from it, so that while one chunk is received, the others are under way.

redis-py connects, logs in and does TLS. The chunks themselves go through its connection's socket: out from where
the parts lie, and in to where they belong. Where there is no such socket, as with fakeredis, redis-py moves them.
"""

from __future__ import annotations

import math
import re
import ssl
import time
from collections import deque
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import suppress
from itertools import islice
from typing import Any, Final

from rlbroker.backend.connection import SEND_BYTES, Channel, Connection
from rlbroker.backend.deadline import Backoff, Deadline, try_seconds
from rlbroker.backend.topology import Server, any_of
from rlbroker.backend.unreadable import answered
from rlbroker.codec.format import byte_view
from rlbroker.errors import ConnectionFailed, PeerError, WireError

#: Bytes that are asked for and not received, or one chunk more than is being received: a server with nothing to do
#: costs a third of the speed over TCP. The server may hold so much in memory for each reader.
READ_WINDOW_BYTES: Final = 4 << 20

#: Bytes that are sent and not confirmed, besides the chunk that is being sent.
WRITE_WINDOW_BYTES: Final = 8 << 20

#: How long replicas are left alone after one did not answer: each version would wait for it again.
REPLICAS_AWAY_SECONDS: Final = 30.0

#: Bytes read at once where a line is expected: the beginning of a chunk that comes with it is copied.
LINE_BYTES: Final = 4096

#: No line of a reply is longer; errors are the longest.
LONGEST_LINE_BYTES: Final = 1 << 16

#: Pieces that one system call may take: 1,024 on Linux.
PIECES: Final = 512

Part = bytes | memoryview
Chunks = Sequence[tuple[str, memoryview]]


class ProgressTimeout:
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
        self._lines = _Lines(connection)
        #: Whether replicas are read. What one does not have yet comes from its master.
        self.from_replicas = False
        self._replicas_away = Deadline(0)

    @property
    def replicas_answer(self) -> bool:
        """Whether replicas can be read, as far as is known."""
        return self._replicas_away.over

    def leave_replicas(self) -> None:
        """Read from masters from now on, as something did not answer; replicas are worth another try after a while."""
        if self.from_replicas:
            self.from_replicas, self._replicas_away = False, Deadline(REPLICAS_AWAY_SECONDS)

    def read(self, chunks: Chunks) -> Iterator[int]:
        """Fill the memory of each chunk, in order, and give its index once it is filled.

        Who stops half-way drops the connections. Each step keeps the deadline that holds for its thread.

        Args:
            chunks: key and memory: writable, contiguous, of bytes, and as long as what is stored.

        Raises:
            WireError: a chunk is gone, or has another length; what its memory then holds means nothing.
            ConnectionFailed: a connection broke, or nothing came for too long.
            PeerError: a server refused.
        """
        self.close()
        lines = self._lines = _Lines(self._connection, replicas=self.from_replicas)
        return self._read(lines, chunks)

    def values(self, keys: Sequence[str]) -> dict[str, bytes]:
        """Give the values that are there, by key, in one round trip; for what is small.

        Raises:
            PeerError: a server refused, or could not be reached in time.
        """
        found: dict[str, bytes] = {}
        if self.from_replicas:
            lines = _Lines(self._connection, replicas=True)
            try:
                found = lines.values(keys)
            except ConnectionFailed:
                self.leave_replicas()
            finally:
                lines.close()
        missing = [key for key in keys if key not in found]
        values = answered(self._connection.ask([("GET", key) for key in missing]))
        return found | {key: value for key, value in zip(missing, values, strict=True) if value is not None}

    def close(self) -> None:
        """Give up what is being read. May be called again."""
        self._lines.close()

    def _read(self, lines: _Lines, chunks: Chunks) -> Iterator[int]:
        try:
            if chunks and lines.to(chunks[0][0]).sock is None:
                yield from _read_by_client(lines, chunks)
            else:
                yield from self._receive(lines, chunks)
            lines.give_back()
        finally:
            lines.close()

    def _receive(self, lines: _Lines, chunks: Chunks) -> Iterator[int]:
        ways = [lines.to(key) for key, _ in chunks]
        for way, (key, memory) in zip(ways, chunks, strict=True):
            way.wanted.append((key, len(memory)))
        for index, (way, (key, memory)) in enumerate(zip(ways, chunks, strict=True)):
            for each in lines.all:
                each.begin()
                each.ask()
            line = way.line()
            way.asked.popleft()
            if line in (b"$-1", b"_") and not way.is_replica:
                raise WireError(f"chunk {key} is gone")
            if line in (b"$-1", b"_") or line.startswith((b"-ASK ", b"-MOVED ")):
                if line.startswith(b"-"):
                    way.error(line)  # whoever keeps track of that
                _copy(key, self._connection.execute("GET", key), memory)
            else:
                if not re.fullmatch(rb"\$\d{1,18}", line):
                    raise way.error(line)
                _check(key, int(line[1:]), memory)
                way.fill(memory)
                if end := way.line():
                    raise way.error(end)
            yield index


class ChunkWriter:
    """Stores chunks straight from memory. One write at a time; not for several threads at once."""

    def __init__(self, connection: Connection) -> None:
        """Prepare a writer; nothing is connected yet."""
        self._connection = connection
        self._lines = _Lines(connection)
        #: How many of the chunks of the last `write` are stored for certain, from the first on.
        self.confirmed = 0
        self._stored: set[int] = set()  #: those behind them

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
        self.confirmed, self._stored = 0, set()
        lines = self._lines = _Lines(self._connection)
        try:
            self._send(lines, chunks, expire_seconds)
            lines.give_back()
        finally:
            lines.close()

    def close(self) -> None:
        """Give the connections up. May be called again."""
        self._lines.close()

    def _send(self, lines: _Lines, chunks: Iterable[tuple[str, Sequence[Part]]], expire_seconds: int) -> None:
        try:
            for number, (key, parts) in enumerate(chunks):
                way = lines.to(key)
                if way.sock is None:
                    self._write_by_client(way, key, parts, expire_seconds)
                    self._note(number)
                    continue
                views = [byte_view(part) for part in parts]
                size = sum(map(len, views))
                head = b"*5\r\n$3\r\nSET\r\n%b$%d\r\n" % (_bulk(key), size)
                way.send([head, *views, b"\r\n$2\r\nEX\r\n" + _bulk(str(expire_seconds))])
                way.sent.append((number, size, key, parts))
                while sum(size for _, size, *_ in way.sent) > WRITE_WINDOW_BYTES:
                    self._confirm(way, expire_seconds)
            for way in lines.all:
                while way.sent:
                    self._confirm(way, expire_seconds)
        except BaseException:  # Ctrl-C too
            for way in lines.all:
                with suppress(PeerError):  # nothing may still arrive when the caller clears what was stored
                    for _ in way.sent:
                        way.line()
            raise

    def _confirm(self, way: _Pipe, expire_seconds: int) -> None:
        line = way.line()
        number, _, key, parts = way.sent.popleft()
        if line.startswith((b"-ASK ", b"-MOVED ")):
            way.error(line)  # whoever keeps track of that
            self._connection.execute("SET", key, b"".join(parts), "EX", expire_seconds)
        elif line != b"+OK":
            raise way.error(line)
        self._note(number)

    def _write_by_client(self, way: _Pipe, key: str, parts: Sequence[Part], expire_seconds: int) -> None:
        way.channel.execute("SET", key, b"".join(parts), "EX", expire_seconds)

    def _note(self, number: int) -> None:
        self._stored.add(number)
        while self.confirmed in self._stored:
            self._stored.remove(self.confirmed)
            self.confirmed += 1


class _Lines:
    """A connection to each server that has some of the chunks, made when it is wanted first."""

    def __init__(self, connection: Connection, *, replicas: bool = False) -> None:
        self._connection, self._replicas = connection, replicas
        self._by_master: dict[Server, _Pipe] = {}

    @property
    def all(self) -> Collection[_Pipe]:
        """Those that were made."""
        return self._by_master.values()

    def to(self, key: str) -> _Pipe:
        """Give the connection to where a key lives, or to one of the replicas there."""
        master = self._connection.holding(key)
        found = self._by_master.get(master)
        if found is None:
            replicas = self._connection.replicas_of(master) if self._replicas else ()
            server = any_of(replicas) if replicas else master
            channel = Channel(self._connection, server=server)
            found = self._by_master[master] = _Pipe(channel, self._connection.socket_seconds)
            found.is_replica = bool(replicas)
            if replicas and self._connection.servers.several:
                channel.execute("READONLY")
        return found

    def values(self, keys: Sequence[str]) -> dict[str, bytes]:
        """Give the values that are there, by key."""
        ways = [self.to(key) for key in keys]
        for way, key in zip(ways, keys, strict=True):
            way.channel.send([("GET", key)])
        found = [way.channel.receive(1)[0] for way in ways]
        self.give_back()
        return {key: value for key, value in zip(keys, found, strict=True) if isinstance(value, bytes)}

    def give_back(self) -> None:
        """Leave the connections to others: every answer was read."""
        for one in self._by_master.values():
            if one.is_replica and self._connection.servers.several:
                one.channel.close()  # others are not to read what is old
            one.channel.give_back()

    def close(self) -> None:
        """Give the connections up. May be called again."""
        for one in self._by_master.values():
            one.channel.close()


class _Pipe:
    """The socket of a channel, as requests and replies need it."""

    def __init__(self, channel: Channel, socket_seconds: float) -> None:
        self.channel, self._socket_seconds = channel, socket_seconds
        channel.connect()
        self.sock: Any = channel.raw_socket
        self.is_replica = False
        #: Keys and sizes of chunks that are to be read, and sizes of those that were asked for.
        self.wanted: deque[tuple[str, int]] = deque()
        self.asked: deque[int] = deque()
        #: Number, size, key and parts of chunks that were sent and not confirmed.
        self.sent: deque[tuple[int, int, str, Sequence[Part]]] = deque()
        self._buffer = memoryview(bytearray(LINE_BYTES))
        self._unread = self._buffer[:0]
        self.begin()

    def begin(self) -> None:
        """Have what follows keep the deadline that now holds for this thread."""
        self._deadline = Deadline(try_seconds(math.inf))

    def ask(self) -> None:
        """Ask for what is to be read next, as much as may be under way."""
        requests = []
        while self.wanted and (
            len(self.asked) < 2 or sum(self.asked) + self.wanted[0][1] <= READ_WINDOW_BYTES
        ):
            key, size = self.wanted.popleft()
            requests.append(b"*2\r\n$3\r\nGET\r\n" + _bulk(key))
            self.asked.append(size)
        if requests:
            self.send([b"".join(requests)])

    def send(self, parts: Sequence[Part]) -> None:
        """Send parts, one after the other; the first is not empty."""
        left: deque[memoryview] = deque(memoryview(part) for part in parts)
        with self.channel.care:
            while left:
                self._bound()
                if isinstance(self.sock, ssl.SSLSocket):
                    sent = self.sock.send(left[0][:SEND_BYTES])
                else:
                    sent = self.sock.sendmsg(list(islice(left, PIECES)))
                while left and sent >= len(left[0]):
                    sent -= len(left.popleft())
                if sent:
                    left[0] = left[0][sent:]

    def line(self) -> bytes:
        """Receive the next line of a reply, without its end."""
        found = bytearray()
        with self.channel.care:
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
        with self.channel.care:
            while have < len(memory):
                have += self._receive(memory[have:])

    def error(self, line: bytes) -> PeerError:
        """Give the error for a reply that is not what was asked for."""
        if line.startswith(b"-"):
            return self.channel.refusal(line[1:])
        return self.channel.refusal(b"unexpected reply %r" % line)

    def _receive(self, memory: memoryview) -> int:
        self._bound()
        received: int = self.sock.recv_into(memory)
        if not received:
            raise ConnectionResetError("the server closed the connection")
        return received

    def _bound(self) -> None:
        limit = min(self._socket_seconds, self._deadline.remaining)
        if not limit:
            raise TimeoutError("timed out")
        if self.sock.gettimeout() != limit:
            self.sock.settimeout(limit)


def _read_by_client(lines: _Lines, chunks: Chunks) -> Iterator[int]:
    for index, (key, memory) in enumerate(chunks):
        _copy(key, lines.to(key).channel.execute("GET", key), memory)
        yield index


def _copy(key: str, data: bytes | None, memory: memoryview) -> None:
    if data is None:
        raise WireError(f"chunk {key} is gone")
    _check(key, len(data), memory)
    memory[:] = data


def _check(key: str, length: int, memory: memoryview) -> None:
    if length != len(memory):
        raise WireError(f"chunk {key} has {length} bytes instead of {len(memory)}")


def _bulk(text: str) -> bytes:
    data = text.encode()
    return b"$%d\r\n%b\r\n" % (len(data), data)
