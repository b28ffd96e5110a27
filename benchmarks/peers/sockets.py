"""The lower limit: the same bytes through the same server, over plain sockets with a minimal client."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from urllib.parse import parse_qs, unquote, urlsplit

import numpy as np
import torch

from benchmarks.models import State, load_arrays, to_arrays

#: A chunk is complete when it has at least this size.
CHUNK_BYTES = 4 << 20


class RespSocket:
    """A connection to Redis that knows the exact replies to expect."""

    def __init__(self, url: str) -> None:
        """Connect and authenticate, over TCP or a Unix socket, without TLS."""
        parts = urlsplit(url)
        if parts.scheme == "unix":
            self._socket = socket.socket(socket.AF_UNIX)
            self._socket.connect(unquote(parts.path))
        elif parts.scheme == "redis":
            self._socket = socket.create_connection((parts.hostname or "localhost", parts.port or 6379))
            self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        else:
            raise ValueError(f"plain sockets support redis:// and unix://, not {parts.scheme}://")
        if parts.password:
            user = [unquote(parts.username)] if parts.username else []
            self.execute(b"+OK\r\n", "AUTH", *user, unquote(parts.password))
        database = (
            parts.path.strip("/") if parts.scheme == "redis" else parse_qs(parts.query).get("db", [""])[0]
        )
        if database:
            self.execute(b"+OK\r\n", "SELECT", database)

    def close(self) -> None:
        self._socket.close()

    def execute(self, expected: bytes, *words: str) -> None:
        self.write(*(word.encode() for word in words))
        self.expect(expected)

    def write(self, *words: bytes) -> None:
        lines = b"".join(b"$%d\r\n%s\r\n" % (len(word), word) for word in words)
        self._socket.sendall(b"*%d\r\n" % len(words) + lines)

    def write_set(self, key: str, parts: list[memoryview]) -> None:
        """Send SET with a value in several parts, without copying them."""
        size = sum(len(part) for part in parts)
        name = key.encode()
        self._socket.sendall(b"*3\r\n$3\r\nSET\r\n$%d\r\n%s\r\n$%d\r\n" % (len(name), name, size))
        for part in parts:
            self._socket.sendall(part)
        self._socket.sendall(b"\r\n")

    def expect(self, expected: bytes) -> None:
        found = bytearray(len(expected))
        self.read_into(memoryview(found))
        if found != expected:
            raise RuntimeError(f"the server replied {bytes(found)!r}, not {expected!r}")

    def read_into(self, view: memoryview) -> None:
        while len(view):
            count = self._socket.recv_into(view)
            if not count:
                raise RuntimeError("the server closed the connection")
            view = view[count:]


class SocketSender:
    """Sends all SETs without waiting for the replies, then PUBLISH."""

    def __init__(self, url: str, key: str, workers: int) -> None:
        self._socket, self._key, self._workers = RespSocket(url), key, workers

    def send(self, weights: State) -> None:
        count = 0
        for count, parts in enumerate(_chunks(weights), start=1):
            self._socket.write_set(f"{self._key}:{count}", parts)
        for _ in range(count):
            self._socket.expect(b"+OK\r\n")
        self._socket.execute(b":%d\r\n" % self._workers, "PUBLISH", self._key, "new")

    def close(self) -> None:
        self._socket.close()


class SocketReceiver:
    """Receives the replies to GET directly into existing memory."""

    def __init__(self, url: str, key: str, number: int) -> None:
        self._socket, self._notices, self._key = RespSocket(url), RespSocket(url), key
        name = key.encode()
        self._notices.write(b"SUBSCRIBE", name)
        self._notices.expect(b"*3\r\n$9\r\nsubscribe\r\n$%d\r\n%s\r\n:1\r\n" % (len(name), name))
        self._notice = b"*3\r\n$7\r\nmessage\r\n$%d\r\n%s\r\n$3\r\nnew\r\n" % (len(name), name)
        self._arrays: dict[str, np.ndarray] = {}

    def receive(self, model: torch.nn.Module) -> None:
        if not self._arrays:
            self._arrays = {name: np.zeros_like(value.numpy()) for name, value in model.state_dict().items()}
        self._notices.expect(self._notice)
        chunks = list(_group_into_chunks(self._arrays))
        for number in range(1, len(chunks) + 1):
            self._socket.write(b"GET", f"{self._key}:{number}".encode())
        for parts in chunks:
            self._socket.expect(b"$%d\r\n" % sum(len(part) for part in parts))
            for part in parts:
                self._socket.read_into(part)
            self._socket.expect(b"\r\n")
        load_arrays(model, self._arrays)

    def close(self) -> None:
        self._socket.close()
        self._notices.close()


def _chunks(weights: State) -> Iterator[list[memoryview]]:
    return _group_into_chunks(to_arrays(weights))


def _group_into_chunks(values: dict[str, np.ndarray]) -> Iterator[list[memoryview]]:
    """Yield the parts of each chunk: the memory of the arrays, in order."""
    parts: list[memoryview] = []
    for value in values.values():
        parts.append(value.data.cast("B"))
        if sum(len(part) for part in parts) >= CHUNK_BYTES:
            yield parts
            parts = []
    if parts:
        yield parts
