"""Chunks between servers and memory, without a copy in between.

On a Cluster the chunks of a version are on several nodes. One thread serves all of them: it requests more chunks from
each node than it is receiving, so that the others are on their way while one is received.

redis-py connects, logs in and does TLS. The chunks themselves are sent from the caller's memory and received into it
through the connection's socket. Without such a socket, as with fakeredis, redis-py moves them.
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

from rlbroker.backend.channel import Channel
from rlbroker.backend.connection import Connection
from rlbroker.backend.deadline import SHORTEST_TRY_SECONDS, Backoff, Deadline, try_seconds, within
from rlbroker.backend.exchange import SEND_BYTES
from rlbroker.backend.resp import Command, Piece
from rlbroker.backend.topology import Server, pick_server
from rlbroker.codec.format import byte_view
from rlbroker.errors import ConnectionFailed, PeerError, WireError

#: Bytes that may be requested and not yet received; one chunk beyond the one being received is always requested.
#: A server that has to wait for requests loses a third of the speed over TCP. It may buffer this much for each reader.
READ_WINDOW_BYTES: Final = 4 << 20

#: Bytes that may be sent and not yet confirmed, in addition to the chunk being sent.
WRITE_WINDOW_BYTES: Final = 8 << 20

#: How long to read from masters after a replica did not answer. Otherwise each version would wait for it again.
REPLICAS_AWAY_SECONDS: Final = 30.0

#: Bytes read at once while a line is expected; the part of a chunk that arrives with it is copied.
LINE_BYTES: Final = 4096

#: The longest line of a reply; errors are the longest lines.
LONGEST_LINE_BYTES: Final = 1 << 16

#: Pieces passed to one system call; Linux accepts up to 1,024.
PIECES: Final = 512

Chunks = Sequence[tuple[str, memoryview]]


class ProgressTimeout:
    """The limit on retries of a transfer after connection faults: it must make progress within the timeout."""

    def __init__(self, connection: Connection, deadline: Deadline | None = None) -> None:
        """Retry until the deadline; by default for the connection's timeout after the last progress."""
        self._connection, self._deadline = connection, deadline
        self._backoff = Backoff()
        self._limit = deadline or Deadline(connection.timeout_seconds)

    def outlast(self, fault: ConnectionFailed, *, progressed: bool) -> None:
        """Wait until the server answers again; raise the fault if that takes too long.

        Progress since the last fault, `progressed`, starts the timeout again.
        """
        if progressed and self._deadline is None:
            self._limit = Deadline(self._connection.timeout_seconds)
            self._backoff.reset()
        time.sleep(self._backoff.next(self._limit))
        if self._limit.over:
            raise fault
        self._connection.execute("PING", deadline=self._limit)


class ChunkReader:
    """Reads chunks directly into memory, one read at a time. Not safe to use from several threads at once."""

    def __init__(self, connection: Connection) -> None:
        """Create a reader; nothing is connected yet."""
        self._connection = connection
        self._pipes = _Pipes(connection)
        #: Whether to read from replicas. A chunk that a replica does not have yet comes from its master.
        self.from_replicas = False
        self._replicas_away = Deadline(0)

    @property
    def may_read_replicas(self) -> bool:
        """Whether replicas may be read: none has failed lately."""
        return self._replicas_away.over

    def avoid_replicas(self) -> None:
        """Read from masters for a while, because a replica did not answer."""
        if self.from_replicas:
            self.from_replicas, self._replicas_away = False, Deadline(REPLICAS_AWAY_SECONDS)

    def read(self, chunks: Chunks) -> Iterator[int]:
        """Fill the memory of each chunk, in order, and yield its index once it is filled.

        If the caller stops early, the connections are closed. Each step observes the thread's deadline.

        Args:
            chunks: key and memory of each; the memory is writable, contiguous, and as long as the stored value.

        Raises:
            WireError: a chunk is gone or has another length; the content of its memory is then undefined.
            ConnectionFailed: a connection broke, or nothing was received for too long.
        """
        self.close()
        pipes = self._pipes = _Pipes(self._connection, replicas=self.from_replicas)
        return self._read(pipes, chunks)

    def values(self, keys: Sequence[str]) -> dict[str, bytes]:
        """Return the values that exist, by key, in one round trip; for small values."""
        found: dict[str, bytes] = {}
        if self.from_replicas:
            pipes = _Pipes(self._connection, replicas=True)
            try:
                found = pipes.values(keys)
            except ConnectionFailed:
                self.avoid_replicas()
            finally:
                pipes.close()
        missing = [key for key in keys if key not in found]
        values = self._connection.execute_all([("GET", key) for key in missing])
        return found | {key: value for key, value in zip(missing, values, strict=True) if value is not None}

    def close(self) -> None:
        """Cancel the read in progress. May be called again."""
        self._pipes.close()

    def _read(self, pipes: _Pipes, chunks: Chunks) -> Iterator[int]:
        try:
            if chunks and pipes.for_key(chunks[0][0]).sock is None:
                yield from _read_by_client(pipes, chunks)
            else:
                yield from self._receive(pipes, chunks)
            pipes.give_back()
        finally:
            pipes.close()

    def _receive(self, pipes: _Pipes, chunks: Chunks) -> Iterator[int]:
        by_chunk = [pipes.for_key(key) for key, _ in chunks]
        for pipe, (key, memory) in zip(by_chunk, chunks, strict=True):
            pipe.wanted.append((key, len(memory)))
        for index, (pipe, (key, memory)) in enumerate(zip(by_chunk, chunks, strict=True)):
            for each in pipes.all:
                each.begin()
                each.request()
            line = pipe.read_line()
            pipe.requested.popleft()
            is_missing = line in (b"$-1", b"_")
            if is_missing and not pipe.is_replica:
                raise WireError(f"chunk {key} is gone")
            if is_missing or line.startswith((b"-ASK ", b"-MOVED ")):
                if not is_missing:
                    pipe.error(line)  # records that the slot has moved
                _copy(key, self._connection.execute("GET", key), memory)
            else:
                if not re.fullmatch(rb"\$\d{1,18}", line):
                    raise pipe.error(line)
                _check_length(key, int(line[1:]), memory)
                pipe.fill(memory)
                if end := pipe.read_line():
                    raise pipe.error(end)
            pipe.channel.note_answered()
            yield index


class ChunkWriter:
    """Stores chunks directly from memory, one write at a time. Not safe to use from several threads at once."""

    def __init__(self, connection: Connection) -> None:
        """Create a writer; nothing is connected yet."""
        self._connection = connection
        self._pipes = _Pipes(connection)
        #: How many chunks of the last `write` are confirmed without a gap, counted from the first.
        self.confirmed = 0
        self._stored: set[int] = set()  #: indexes of confirmed chunks after the first gap

    def write(self, chunks: Iterable[tuple[str, Sequence[Piece]]], *, expire_seconds: int) -> None:
        """Store each chunk once, within the thread's deadline; chunks are taken while earlier ones are in flight.

        Args:
            chunks: key, and the parts that make up the value when joined. The parts must not change until all chunks
                are written. After an error, chunks from `confirmed` on may or may not be stored.
            expire_seconds: the lifetime of the chunks, unless it is changed later.

        Raises:
            ServerOutOfMemory: the server's memory limit is reached.
            ConnectionFailed: the connection broke, or there was no progress for too long.
        """
        self.close()
        self.confirmed, self._stored = 0, set()
        pipes = self._pipes = _Pipes(self._connection)
        try:
            self._send(pipes, chunks, expire_seconds)
            pipes.give_back()
        finally:
            pipes.close()

    def close(self) -> None:
        """Cancel the write in progress. May be called again."""
        self._pipes.close()

    def _send(
        self, pipes: _Pipes, chunks: Iterable[tuple[str, Sequence[Piece]]], expire_seconds: int
    ) -> None:
        try:
            for number, (key, parts) in enumerate(chunks):
                pipe = pipes.for_key(key)
                if pipe.sock is None:
                    pipe.channel.execute("SET", key, b"".join(parts), "EX", expire_seconds)
                    self._record(number)
                    continue
                views = tuple(byte_view(part) for part in parts)
                size = sum(map(len, views))
                pipe.send([("SET", key, views, "EX", expire_seconds)])
                pipe.sent.append((number, size, key, parts))
                while sum(size for _, size, *_ in pipe.sent) > WRITE_WINDOW_BYTES:
                    self._confirm(pipe, expire_seconds)
            for pipe in pipes.all:
                while pipe.sent:
                    self._confirm(pipe, expire_seconds)
        except BaseException:  # Ctrl-C too
            # A late SET must not store a chunk after the caller has deleted it; at worst the chunk expires.
            with within(Deadline(SHORTEST_TRY_SECONDS)):
                for pipe in pipes.all:
                    pipe.begin()
                    with suppress(PeerError):
                        for _ in pipe.sent:
                            pipe.read_line()
            raise

    def _confirm(self, pipe: _Pipe, expire_seconds: int) -> None:
        line = pipe.read_line()
        pipe.channel.note_answered()
        number, _, key, parts = pipe.sent.popleft()
        if line.startswith((b"-ASK ", b"-MOVED ")):
            pipe.error(line)  # records that the slot has moved
            self._connection.execute("SET", key, b"".join(parts), "EX", expire_seconds)
        elif line != b"+OK":
            raise pipe.error(line)
        self._record(number)

    def _record(self, number: int) -> None:
        self._stored.add(number)
        while self.confirmed in self._stored:
            self._stored.remove(self.confirmed)
            self.confirmed += 1


class _Pipes:
    """Connections to the servers that have the chunks, each made when it is first needed."""

    def __init__(self, connection: Connection, *, replicas: bool = False) -> None:
        self._connection, self._replicas = connection, replicas
        self._pipes_by_master: dict[Server, _Pipe] = {}

    @property
    def all(self) -> Collection[_Pipe]:
        """The connections made so far."""
        return self._pipes_by_master.values()

    def for_key(self, key: str) -> _Pipe:
        """Return the connection to the master that has a key, or to one of its replicas."""
        master = self._connection.master_for(key)
        found = self._pipes_by_master.get(master)
        if found is None:
            replicas = self._connection.replicas_of(master) if self._replicas else ()
            server = pick_server(replicas) if replicas else master
            channel = Channel(self._connection, server=server)
            found = self._pipes_by_master[master] = _Pipe(channel, self._connection.socket_seconds)
            found.is_replica = bool(replicas)
            if replicas and self._connection.servers.several:
                channel.execute("READONLY")
        return found

    def values(self, keys: Sequence[str]) -> dict[str, bytes]:
        """Return the values that exist, by key."""
        by_key = {key: self.for_key(key) for key in keys}
        for pipe in self.all:
            pipe.channel.send([("GET", key) for key in keys if by_key[key] is pipe])
        values = {pipe: iter(pipe.channel.receive_all()) for pipe in self.all}
        found = {key: next(values[by_key[key]]) for key in keys}
        self.give_back()
        return {key: value for key, value in found.items() if isinstance(value, bytes)}

    def give_back(self) -> None:
        """Return the connections to their pools; every reply must have been read."""
        for one in self._pipes_by_master.values():
            if one.is_replica and self._connection.servers.several:
                one.channel.close()  # after READONLY, its next user could read stale data
            one.channel.give_back()

    def close(self) -> None:
        """Close the connections. May be called again."""
        for one in self._pipes_by_master.values():
            one.channel.close()


class _Pipe:
    """The socket of a channel, with its requests and replies."""

    def __init__(self, channel: Channel, socket_seconds: float) -> None:
        self.channel, self._socket_seconds = channel, socket_seconds
        channel.connect()
        self.sock: Any = channel.raw_socket
        self.is_replica = False
        #: Keys and sizes of the chunks to request, and sizes of the chunks that were requested.
        self.wanted: deque[tuple[str, int]] = deque()
        self.requested: deque[int] = deque()
        #: Index, size, key and parts of the chunks that were sent and not confirmed.
        self.sent: deque[tuple[int, int, str, Sequence[Piece]]] = deque()
        self._buffer = memoryview(bytearray(LINE_BYTES))
        self._unread = self._buffer[:0]
        self.begin()

    def begin(self) -> None:
        """Begin a step with the thread's present deadline."""
        self._deadline = Deadline(try_seconds(math.inf))

    def request(self) -> None:
        """Request the next chunks, up to the window."""
        requests = []
        while self.wanted and (
            len(self.requested) < 2 or sum(self.requested) + self.wanted[0][1] <= READ_WINDOW_BYTES
        ):
            key, size = self.wanted.popleft()
            requests.append(("GET", key))
            self.requested.append(size)
        if requests:
            self.send(requests)

    def send(self, commands: Sequence[Command]) -> None:
        """Send commands; the channel must be told of each answer."""
        with self.channel.closing_on_error():
            left = deque(memoryview(piece) for piece in self.channel.noting(commands))
            while left:
                self._set_timeout()
                if isinstance(self.sock, ssl.SSLSocket):
                    sent = self.sock.send(left[0][:SEND_BYTES])
                else:
                    sent = self.sock.sendmsg(list(islice(left, PIECES)))
                while left and sent >= len(left[0]):
                    sent -= len(left.popleft())
                if sent:
                    left[0] = left[0][sent:]

    def read_line(self) -> bytes:
        """Return the next line of a reply without its line end."""
        found = bytearray()
        with self.channel.closing_on_error():
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
        """Receive bytes until the memory is full."""
        have = min(len(memory), len(self._unread))
        memory[:have] = self._unread[:have]
        self._unread = self._unread[have:]
        with self.channel.closing_on_error():
            while have < len(memory):
                have += self._receive(memory[have:])

    def error(self, line: bytes) -> PeerError:
        """Return the error for an error reply or an unexpected one."""
        if line.startswith(b"-"):
            return self.channel.parse_error(line[1:])
        return self.channel.parse_error(b"unexpected reply %r" % line)

    def _receive(self, memory: memoryview) -> int:
        self._set_timeout()
        received: int = self.sock.recv_into(memory)
        if not received:
            raise ConnectionResetError("the server closed the connection")
        return received

    def _set_timeout(self) -> None:
        limit = min(self._socket_seconds, self._deadline.remaining)
        if not limit:
            raise TimeoutError("timed out")
        if self.sock.gettimeout() != limit:
            self.sock.settimeout(limit)


def _read_by_client(pipes: _Pipes, chunks: Chunks) -> Iterator[int]:
    for index, (key, memory) in enumerate(chunks):
        _copy(key, pipes.for_key(key).channel.execute("GET", key), memory)
        yield index


def _copy(key: str, data: bytes | None, memory: memoryview) -> None:
    if data is None:
        raise WireError(f"chunk {key} is gone")
    _check_length(key, len(data), memory)
    memory[:] = data


def _check_length(key: str, length: int, memory: memoryview) -> None:
    if length != len(memory):
        raise WireError(f"chunk {key} has {length} bytes instead of {len(memory)}")
