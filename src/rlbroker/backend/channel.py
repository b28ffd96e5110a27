"""A dedicated connection to one server, for commands that must follow a read of the server's state."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from redis import exceptions as redis_errors

from rlbroker.backend.argument_limit import largest_of
from rlbroker.backend.error_mapping import (
    breaks_connection,
    is_ask_redirect,
    missing_scripts_error,
    script_is_unknown,
)
from rlbroker.backend.exchange import Exchange
from rlbroker.backend.replies import raise_first_error
from rlbroker.backend.resp import Argument, Command
from rlbroker.backend.scripts import Script, loading_commands
from rlbroker.backend.topology import Server
from rlbroker.errors import AccessDenied, ConnectionFailed, PeerError

if TYPE_CHECKING:
    from rlbroker.backend.connection import Connection


class Channel(Exchange):
    """A dedicated connection to one server, for commands that must follow a read of the server's state.

    A server loses acknowledged writes only by a restart or a failover, and both break its connections. So a caller
    that reads the state after `connect` returned True, and then writes over the same channel, writes to the state that
    it has read.

    Errors are rlbroker's. After `ConnectionFailed`, commands that were sent may have been applied, and the next
    `connect` makes a new connection; so it does after an interrupt. Replies are as the server sends them. Not safe to
    use from several threads at once.
    """

    def __init__(self, connection: Connection, key: str = "", *, server: Server | None = None) -> None:
        """Create a channel; nothing is connected yet.

        Args:
            key: connect to the master that has this key.
            server: connect to this server instead.
        """
        super().__init__(None)
        self._connection = connection
        self._key, self._fixed_server = key, server
        self._server = server
        #: Whether another node has answered, because a Cluster is moving a key to it. The caller resets this.
        self.redirected = False

    def connect(self) -> bool:
        """Connect if there is no connection, or one with unanswered commands; return whether the connection is new."""
        self._connection.check_process()
        with self.closing_on_error():
            if self._redis_connection is not None and self._wanted_server() != self._server:
                self.close()
            return self.open()

    def _open(self) -> None:
        self._server = self._wanted_server()
        self._pool = self._server.client.connection_pool
        super()._open()

    def _wanted_server(self) -> Server:
        return self._fixed_server or self._connection.servers.master_for(self._key)

    def execute(self, *command: Argument) -> Any:
        """Return the reply to one command, sent once."""
        return raise_first_error(self.execute_all([command]))[0]

    def run(self, script: Script, keys: Sequence[str], arguments: Sequence[Argument] = ()) -> Any:
        """Return the reply of a script, run once."""
        return self.execute(*script.call(keys, arguments))

    def execute_all(self, commands: Sequence[Command], *, strict: bool = False) -> list[Any]:
        """Return the replies to many commands, sent once in one round trip.

        Scripts that the server lacks are loaded, and all commands sent again.

        Args:
            commands: an argument may be in pieces, of which large ones are not copied.
            strict: whether the first refusal is raised; otherwise each is returned as a `PeerError`.
        """
        self.send(commands)
        replies = self._receive_with_scripts(commands)
        return raise_first_error(replies) if strict else replies

    def send(self, commands: Sequence[Command]) -> None:
        """Send commands without waiting for the replies: `receive` returns them, or `close` discards them."""
        self._connection.check_process()
        try:
            self.put(commands)
        except BaseException as error:
            self._break(error)
            raise

    def receive(self, count: int) -> list[Any]:
        """Return the next replies to what was sent; a refusal is returned as a `PeerError`."""
        try:
            replies = self.get(count)
        except BaseException as error:
            self._break(error)
            raise
        self._connection.errors.record_answer()
        return replies

    def receive_all(self) -> list[Any]:
        """Return the replies to all that was sent, as `execute_all` does."""
        return self._receive_with_scripts(list(self._unanswered))

    def _receive_with_scripts(self, commands: Sequence[Command]) -> list[Any]:
        replies = self.receive(len(commands))
        if not any(map(_lacks_script, replies)):
            return replies
        loading = loading_commands(commands)
        self.send(loading)
        for reply in self.receive(len(loading)):
            if isinstance(reply, AccessDenied):
                raise missing_scripts_error(self._connection.address) from reply
        self.send(commands)
        replies = self.receive(len(commands))
        if any(map(_lacks_script, replies)):
            raise ConnectionFailed(f"{self._connection.address} has lost rlbroker's scripts again")
        return replies

    def _refusal(self, error: redis_errors.ResponseError, command: Command) -> Any:
        """Return rlbroker's error for a refusal, or the reply of the node to which the server redirects the command.

        Raise it if the server cannot be used now, such as a replica.
        """
        if is_ask_redirect(error):
            self.redirected = True
            node = self._connection.servers.at((str(error.host), int(error.port)))
            channel = Channel(self._connection, server=node)
            try:
                asking, reply = channel.execute_all([("ASKING",), command])
                return asking if isinstance(asking, PeerError) else reply
            finally:
                channel.give_back()
        refusal = self._connection.failure(error, command, self._server)
        if breaks_connection(refusal):
            raise refusal from error
        return refusal

    @property
    def server(self) -> Server | None:
        """The server of the present or last connection; None before the first."""
        return self._server

    @contextmanager
    def closing_on_error(self) -> Iterator[None]:
        """Close the channel at an error in this block, and raise it as rlbroker's error."""
        try:
            yield
        except BaseException as error:
            self._break(error)
            raise

    def parse_error(self, line: bytes) -> PeerError:
        """Return the error for an error reply that was read from the raw socket, without its leading `-`."""
        error = self._redis_connection._parser.parse_error(line.decode(errors="replace"))
        return self._connection.failure(error, (), self._server)

    def explain(self, error: ConnectionFailed, sent: Sequence[bytes | memoryview]) -> PeerError:
        """Return the error for a raw socket that broke while this argument, in pieces, was sent."""
        cause = error.__cause__
        if not isinstance(cause, redis_errors.RedisError):
            return error
        return self._connection.failure(cause, [tuple(sent)], self._server)

    def _break(self, error: BaseException) -> None:
        """Close the connection, so that no half-read reply stays behind, and raise rlbroker's error."""
        command = largest_of(self._unanswered)
        self.close()
        if isinstance(error, PeerError) or not isinstance(error, (redis_errors.RedisError, OSError)):
            return  # translated already, or an interrupt in the middle of a reply
        if not isinstance(error, redis_errors.RedisError):
            error = redis_errors.ConnectionError(str(error))
        translated = self._connection.failure(error, command, self._server)
        if not isinstance(translated, ConnectionFailed):
            self._connection.record_failure(error, self._server)
        try:
            raise translated from error
        finally:
            del translated  # otherwise the error refers to this frame and this frame to the error


def _lacks_script(reply: Any) -> bool:
    """Return whether the server lacks the script that a command called."""
    return isinstance(reply, PeerError) and script_is_unknown(reply)
