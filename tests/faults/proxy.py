"""A TCP proxy on loopback that injects network faults."""

from __future__ import annotations

import contextlib
import random
import socket
import threading
import time
from collections.abc import Iterator

#: The most bytes that are forwarded at once.
PIECE_BYTES = 1 << 16


class Proxy:
    """A proxy between clients and one server. The caller sets the faults; `injected` counts those that occurred."""

    def __init__(self, target: tuple[str, int], seed: int = 0) -> None:
        """Start to listen; clients connect to `url`."""
        self.target = target
        self.injected = 0
        self._chance = random.Random(seed)
        self._lose: tuple[bytes, float, int] = (b"", 0.0, 0)
        self._cut_after: int | None = None
        self._delay_seconds = 0.0
        self._bytes_per_second = 0.0
        self._silent = threading.Event()
        self._drops_silently = False
        self._lock = threading.Lock()
        self._links: set[_Link] = set()
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=256)
        self.port: int = self._listener.getsockname()[1]
        self._closed = False
        threading.Thread(target=self._accept, daemon=True, name="proxy").start()

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0"

    def close(self) -> None:
        self._closed = True
        self._listener.close()
        self.cut_all()

    # Faults

    def lose_replies(self, command: bytes, part: float = 1.0, count: int = 1 << 30) -> None:
        """Drop the reply and the connection after the server has run a command.

        Args:
            command: the name of the command, as it is sent.
            part: the probability for each command.
            count: the most replies to drop.
        """
        self._lose = (b"\r\n" + command + b"\r\n", part, count)

    def cut_within_replies(self, after_bytes: int | None) -> None:
        """Cut each connection after so many bytes of replies; None ends this fault."""
        self._cut_after = after_bytes

    def slow_down(self, delay_seconds: float = 0.0, bytes_per_second: float = 0.0) -> None:
        self._delay_seconds, self._bytes_per_second = delay_seconds, bytes_per_second

    def cut_all(self) -> None:
        """Break every connection."""
        with self._lock:
            links = list(self._links)
        for link in links:
            link.close()
            self.injected += 1

    @contextlib.contextmanager
    def silence(self, *, dropping: bool) -> Iterator[None]:
        """Keep every connection open, and drop what arrives in this block, or forward it afterwards."""
        self._drops_silently = dropping
        self._silent.set()
        self.injected += 1
        try:
            yield
        finally:
            self._silent.clear()

    # Forwarding

    def _accept(self) -> None:
        while not self._closed:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(client,), daemon=True, name="proxy").start()

    def _serve(self, client: socket.socket) -> None:
        self._wait_while_silent()
        try:
            server = socket.create_connection(self.target, timeout=5.0)
        except OSError:
            client.close()
            return
        server.settimeout(None)
        for one in (client, server):
            one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        link = _Link(client, server)
        with self._lock:
            self._links.add(link)
        back = threading.Thread(target=self._replies, args=(link,), daemon=True, name="proxy")
        back.start()
        self._requests(link)
        back.join()
        with self._lock:
            self._links.discard(link)

    def _requests(self, link: _Link) -> None:
        tail = b""
        while data := link.receive(link.client):
            if self._drop_or_wait():
                continue
            if self._should_lose_reply(tail + data):
                link.lose_reply = True
            tail = data[-32:]
            link.send(link.server, data)
        link.close()

    def _replies(self, link: _Link) -> None:
        passed = 0
        while data := link.receive(link.server):
            if self._drop_or_wait():
                continue
            if link.lose_reply:
                self.injected += 1
                break
            if self._delay_seconds:
                time.sleep(self._delay_seconds)
            if self._bytes_per_second:
                time.sleep(len(data) / self._bytes_per_second)
            limit = self._cut_after
            if limit is not None and passed + len(data) > limit:
                link.send(link.client, data[: max(0, limit - passed)])
                self.injected += 1
                break
            passed += len(data)
            link.send(link.client, data)
        link.close()

    def _should_lose_reply(self, data: bytes) -> bool:
        with self._lock:
            command, part, left = self._lose
            if not left or command not in data or self._chance.random() >= part:
                return False
            self._lose = (command, part, left - 1)
            return True

    def _drop_or_wait(self) -> bool:
        """Return whether to drop the data; wait until the silence ends if data is forwarded afterwards."""
        if not self._silent.is_set():
            return False
        if self._drops_silently:
            return True
        self._wait_while_silent()
        return False

    def _wait_while_silent(self) -> None:
        while self._silent.is_set() and not self._closed:
            time.sleep(0.01)


class _Link:
    """The connection of a client, and the one to the server."""

    def __init__(self, client: socket.socket, server: socket.socket) -> None:
        self.client, self.server, self.lose_reply = client, server, False

    def receive(self, side: socket.socket) -> bytes:
        try:
            return side.recv(PIECE_BYTES)
        except OSError:
            return b""

    def send(self, side: socket.socket, data: bytes) -> None:
        try:
            side.sendall(data)
        except OSError:
            self.close()

    def close(self) -> None:
        for side in (self.client, self.server):
            with contextlib.suppress(OSError):
                side.shutdown(socket.SHUT_RDWR)
            side.close()
