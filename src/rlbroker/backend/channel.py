"""A dedicated connection to one server, for commands that must follow a read of the server's state."""

from __future__ import annotations

import socket
from collections import deque
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Final

from redis import exceptions as redis_errors

from rlbroker.backend.error_mapping import is_ask_redirect, missing_scripts_error, script_is_unknown
from rlbroker.backend.replies import raise_first_error
from rlbroker.backend.resp import Argument, Pieces, pack_commands
from rlbroker.backend.scripts import Script
from rlbroker.backend.topology import Server
from rlbroker.errors import (
    AccessDenied,
    ConnectionFailed,
    PeerError,
    ServerFault,
    raise_again,
    without_frames,
)

if TYPE_CHECKING:
    from rlbroker.backend.connection import Connection

#: The most bytes given to a socket at once. The socket's timeout applies to each such piece.
SEND_BYTES: Final = 1 << 20


class Channel:
    """A dedicated connection to one server, for commands that must follow a read of the server's state.

    A server loses acknowledged writes only by a restart or a failover, and both break its connections. So a caller
    that reads the state after `connect` returned True, and then writes over the same channel, writes to the state that
    it has read.

    Errors are rlbroker's. After `ConnectionFailed`, commands that were sent may have been applied, and the next
    `connect` makes a new connection. Not safe to use from several threads at once.
    """

    def __init__(self, connection: Connection, key: str = "", *, server: Server | None = None) -> None:
        """Create a channel; nothing is connected yet.

        Args:
            key: connect to the master that has this key.
            server: connect to this server instead.
        """
        self._connection, self._router = connection, connection.router
        self._key, self._fixed_server = key, server
        self._server = server
        self._redis_connection: Any = None
        self._unanswered: deque[Sequence[Argument | Pieces]] = deque()
        #: Whether another node has answered, because a Cluster is moving a key to it. The caller resets this.
        self.redirected = False

    @property
    def closing_on_error(self) -> _OnError:
        """A block in which an error closes the channel and is raised as rlbroker's error."""
        # Not stored: a channel that refers to itself would keep its connections until the garbage collector runs.
        return _OnError(self._break)

    def connect(self) -> bool:
        """Connect if there is no connection; return whether the connection is new."""
        self._router.check_process()
        with self.closing_on_error:
            if self._redis_connection is not None:
                if self._fixed_server or self._router.servers.master_for(self._key) == self._server:
                    return False
                self.close()
            self._open()
        return True

    def _open(self) -> None:
        self._server = self._fixed_server or self._router.servers.master_for(self._key)
        self._redis_connection = self._server.client.connection_pool.get_connection()

    def execute(self, *command: Argument) -> Any:
        """Return the reply to one command, sent once."""
        (result,) = self.execute_all([command], strict=True)
        return result

    def execute_all(
        self, commands: Sequence[Sequence[Argument | Pieces]], *, strict: bool = False
    ) -> list[Any]:
        """Return the replies to many commands, sent once in one round trip.

        Args:
            commands: the last argument of each may be in pieces, of which large ones are not copied.
            strict: whether the first refusal is raised; otherwise each is returned as a `PeerError`.
        """
        self.send(commands)
        results = self.receive(len(commands))
        return raise_first_error(results) if strict else results

    def send(self, commands: Sequence[Sequence[Argument | Pieces]]) -> None:
        """Send commands without waiting for the replies: `receive` returns them, or `close` discards them."""
        self._router.check_process()
        with self.closing_on_error:
            if self._redis_connection is None:
                self._open()
            self._unanswered.extend(commands)
            for piece in pack_commands(commands, piece_bytes=SEND_BYTES):
                self._redis_connection.send_packed_command([piece], check_health=False)

    def receive(self, count: int) -> list[Any]:
        """Return the next replies to what was sent; a refusal is returned as a `PeerError`."""
        results = []
        with self.closing_on_error:
            for _ in range(count):
                command = self._unanswered.popleft()
                try:
                    results.append(self._redis_connection.read_response())
                except redis_errors.ResponseError as error:
                    if is_ask_redirect(error):
                        results.append(self._follow(error, command))
                        continue
                    refusal = self._translate(error, command)
                    if isinstance(refusal, ConnectionFailed):  # the server cannot be used now: a replica
                        raise refusal from error
                    results.append(without_frames(refusal))
        self._router.errors.record_answer()
        return results

    def _follow(self, redirect: redis_errors.AskError, command: Sequence[Argument | Pieces]) -> Any:
        self.redirected = True
        try:
            return follow_redirect(self._connection, redirect, command)
        except ConnectionFailed:
            raise
        except PeerError as error:
            return error

    def run(self, script: Script, keys: Sequence[str], arguments: Sequence[Argument] = ()) -> Any:
        """Return the reply of a script, run once; it is loaded first if the server lacks it."""
        self._router.scripts.remember(script)
        try:
            return self.execute(*script.call(keys, arguments))
        except ServerFault as error:
            if not script_is_unknown(error):
                raise
        try:
            self.execute("SCRIPT LOAD", script.text)
        except AccessDenied as error:
            raise missing_scripts_error(self._router.address) from error
        return self.execute(*script.call(keys, arguments))

    @property
    def server(self) -> Server | None:
        """The server of the present or last connection; None before the first."""
        return self._server

    @property
    def raw_socket(self) -> socket.socket | None:
        """The connection's socket, with nothing read ahead; None if redis-py must read and write itself.

        That is so with fakeredis, with redis-py's client-side cache, and with unknown releases of redis-py.
        """
        found = getattr(self._redis_connection, "_sock", None)
        parser = getattr(self._redis_connection, "_parser", None)
        return found if isinstance(found, socket.socket) and hasattr(parser, "parse_error") else None

    def parse_error(self, line: bytes) -> PeerError:
        """Return the error for an error reply that was read from the raw socket, without its leading `-`."""
        return self._translate(self._redis_connection._parser.parse_error(line.decode(errors="replace")))

    def give_back(self) -> None:
        """Return the connection to the pool; every reply must have been read."""
        redis_connection, self._redis_connection = self._redis_connection, None
        if redis_connection is not None:
            self._router.errors.record_answer()
            self._pool.release(redis_connection)

    def close(self) -> None:
        """Close the connection. May be called again."""
        redis_connection, self._redis_connection = self._redis_connection, None
        self._unanswered.clear()
        if redis_connection is not None:
            redis_connection.disconnect()
            self._pool.release(redis_connection)

    @property
    def _pool(self) -> Any:
        assert self._server is not None
        return self._server.client.connection_pool

    def _break(self, error: BaseException) -> None:
        """Close the connection, so that no half-read reply stays behind, and raise rlbroker's error."""
        self.close()
        if isinstance(error, PeerError) or not isinstance(error, (redis_errors.RedisError, OSError)):
            return  # translated already, or an interrupt in the middle of a reply
        if not isinstance(error, redis_errors.RedisError):
            error = redis_errors.ConnectionError(str(error))
        translated = self._translate(error)
        if not isinstance(translated, ConnectionFailed):
            self._router.record_failure(error, self._server)
        try:
            raise translated from error
        finally:
            del translated  # otherwise the error refers to this frame and this frame to the error

    def _translate(
        self, error: redis_errors.RedisError, command: Sequence[Argument | Pieces] = ()
    ) -> PeerError:
        translated = self._router.translate(error, command, self._server)
        translated.__cause__ = error
        if isinstance(translated, ConnectionFailed):
            self._router.record_failure(error, self._server)
        return translated


class _OnError:
    """A block whose error is passed to a function. A class, because a generator would be slower."""

    __slots__ = ("_handle",)

    def __init__(self, handle: Callable[[BaseException], None]) -> None:
        self._handle = handle

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if error is not None:
            self._handle(error)


def follow_redirect(
    connection: Connection, redirect: redis_errors.AskError, command: Sequence[Argument | Pieces]
) -> Any:
    """Return the reply to a command from the node to which a Cluster is moving its key; sent once."""
    router = connection.router
    channel = Channel(connection, server=router.servers.at((str(redirect.host), int(redirect.port))))
    try:
        for _ in range(2):
            asking, reply = channel.execute_all([("ASKING",), command])
            if not isinstance(reply, PeerError) or not script_is_unknown(reply):
                break
            channel.execute_all([("SCRIPT LOAD", script.text) for script in router.scripts.used])
        for one in (asking, reply):
            if isinstance(one, PeerError):
                raise_again(one)
        return reply
    finally:
        channel.give_back()
