"""The one boundary to Redis: channels, retries, scripts, and redis-py's errors turned into ours."""

from __future__ import annotations

import hashlib
import logging
import os
import re
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final, TypeVar

import redis
from redis import exceptions as redis_errors

from rlbroker.clients import bounded_client, client_from_url, stall_seconds
from rlbroker.config import (
    DEFAULT_URL,
    PASSWORD_FILE_VARIABLE,
    PASSWORD_VARIABLE,
    USERNAME_VARIABLE,
    positive_seconds,
    redacted_url,
    redis_url,
)
from rlbroker.deadline import Backoff, Deadline, within
from rlbroker.errors import (
    AccessDenied,
    ConnectionFailed,
    Fenced,
    ForkedProcess,
    InvalidArgument,
    PeerError,
    RunLost,
    ServerFault,
    ServerOutOfMemory,
    ServerUnsuitable,
    TlsFailed,
    WrongKeyType,
)
from rlbroker.packing import Argument as Argument
from rlbroker.packing import Pieces, packed
from rlbroker.refusals import refused, says_refused
from rlbroker.tls import answers_only_tls, refusal_of

logger = logging.getLogger("rlbroker")

#: The oldest server that is supported.
MIN_SERVER_VERSION: Final = (6, 2)

#: Longest that one blocking command waits on the server, so that a closing client is never far from noticing.
BLOCK_SECONDS: Final = 0.2

#: Connections that one client cannot do without.
MIN_CONNECTIONS: Final = 6

#: Bytes that are given to a socket at once: the stall timeout speaks of each such piece.
SEND_BYTES: Final = 1 << 20

#: How long a server that has accepted this user may refuse it: users may be set up only after a restart.
REFUSED_SECONDS: Final = 10.0

Result = TypeVar("Result")


@dataclass(frozen=True)
class Script:
    """A Lua script. Every script of rlbroker can be run again with the same arguments without harm."""

    name: str
    text: str

    @cached_property
    def sha(self) -> str:
        """The name under which the server caches it."""
        return hashlib.sha1(self.text.encode(), usedforsecurity=False).hexdigest()

    def call(self, keys: Sequence[str], arguments: Sequence[Argument] = ()) -> tuple[Argument, ...]:
        """Give the command that runs it."""
        return ("EVALSHA", self.sha, len(keys), *keys, *arguments)


#: Put before the first write of a script that must work on a full server too: the server refuses a script at
#: a first write that needs memory, and lets it pass after one that does not. For what frees memory, or is tiny.
ALSO_WHEN_FULL: Final = "redis.call('HDEL', KEYS[1], '')"


#: Put into scripts that only the learner may run that leads; KEYS[1] is `meta`, ARGV[1] the learner's epoch.
LEADER_ONLY: Final = """
    local leading = tonumber(redis.call('HGET', KEYS[1], 'epoch') or '0') or 0
    if leading > tonumber(ARGV[1]) then
      return redis.error_reply('FENCED a newer learner publishes in this run; ' ..
        'of several, make those that only collect experiences with publishes=False')
    elseif leading < tonumber(ARGV[1]) then
      return redis.error_reply('LOST the server has lost the run')
    end
"""


class Connection:
    """One client's way to the server.

    Every operation that rlbroker sends is harmless to repeat (explicit ids, compare-and-set scripts, plain
    writes of the same value), so a broken connection is answered by trying again until the deadline.
    redis-py's own retries are off, also for a client that was given: they repeat commands that we must look at
    first. No try waits for longer than what is left of the deadline that holds.
    """

    def __init__(
        self, url: str | None = None, *, client: redis.Redis | None = None, timeout_seconds: float = 10.0
    ) -> None:
        """Prepare a connection; nothing is sent yet.

        Args:
            url: `redis://`, `rediss://` or `unix://`; defaults to the environment, then localhost.
            client: a ready client instead of a URL, a fakeredis one too; it gives the way to the server, and itself
                stays untouched.
            timeout_seconds: how long any one operation may take, retries included.

        Raises:
            InvalidArgument: the URL, the client or the timeout cannot work.
        """
        self.timeout_seconds = positive_seconds("timeout", timeout_seconds)
        self._pid = os.getpid()
        self._scripts: dict[str, Script] = {}
        self._worked, self._hint = False, ""
        self._refused: Deadline | None = None
        if client is None:
            found = redis_url(url)
            self.address = redacted_url(found)
            if url is None and found == DEFAULT_URL:
                self._hint = (
                    "; this is the default: start `rlbroker server`, or name a server with RLBROKER_REDIS_URL"
                )
            client = client_from_url(found)
        elif url is not None:
            raise InvalidArgument("give either redis_url or redis_client, not both")
        elif not isinstance(client, redis.Redis):
            raise InvalidArgument(f"redis_client must be a redis.Redis; got {type(client).__name__}")
        else:
            settings = client.connection_pool.connection_kwargs
            host = f"{settings['host']}:{settings.get('port')}" if "host" in settings else ""
            self.address = str(settings.get("path") or host or "the given redis_client")
        pool = client.connection_pool
        if pool.connection_kwargs.get("decode_responses"):
            raise InvalidArgument("the client must not decode responses: batches and weights are bytes")
        if pool.max_connections < MIN_CONNECTIONS:
            raise InvalidArgument(
                f"the client's pool holds {pool.max_connections} connections; {MIN_CONNECTIONS} are needed, "
                "as the background waits on some of them"
            )
        stall = stall_seconds(self.timeout_seconds)
        #: Who this is to the server, as far as it was said.
        self.user = str(pool.connection_kwargs.get("username") or "default")
        #: How long a connection may be silent with an answer due.
        self.socket_seconds = min(stall, float(pool.connection_kwargs.get("socket_timeout") or stall))
        self._given = client  # a pool of Sentinel's is only remembered weakly by its connections
        self.client = bounded_client(client, self.timeout_seconds, self.socket_seconds)
        self._send: Callable[..., Any] = self.client.execute_command

    @property
    def block_seconds(self) -> float:
        """How long one blocking command may wait: well within the socket's timeout."""
        return min(BLOCK_SECONDS, self.timeout_seconds / 4, self.socket_seconds / 2)

    def close(self) -> None:
        """Close the connections; those of a client that the user gave are not among them."""
        if os.getpid() == self._pid:
            self.client.connection_pool.disconnect()

    def check_process(self) -> None:
        """Refuse to work in a forked child, where sockets and threads are the parent's.

        Raises:
            ForkedProcess: this is not the process that made the client.
        """
        if os.getpid() != self._pid:
            raise ForkedProcess(
                "this client was made before a fork; make a new one in the child process (or use the 'spawn' method)"
            )

    def execute(self, *command: Argument, deadline: Deadline | None = None) -> Any:
        """Run one command, again and again while the connection is broken, until the deadline.

        Raises:
            PeerError: the server refused, or could not be reached within the deadline.
        """
        return self.retry(lambda: self.execute_once(*command), deadline)

    def execute_once(self, *command: Argument) -> Any:
        """Run one command whose loss the caller handles, such as a blocking read.

        Raises:
            PeerError: the server refused or could not be reached.
        """
        return self._translated(lambda: self._send(*command, **_options(command)), command)

    def run(
        self,
        script: Script,
        keys: Sequence[str],
        arguments: Sequence[Argument] = (),
        *,
        deadline: Deadline | None = None,
    ) -> Any:
        """Run a script, loading it first where the server does not know it.

        Raises:
            Fenced: the script found that a newer process took over.
            PeerError: the server refused, or could not be reached within the deadline.
        """
        self._scripts[script.sha] = script
        return self.execute(*script.call(keys, arguments), deadline=deadline)

    def run_all(
        self,
        calls: Sequence[tuple[Script, Sequence[str], Sequence[Argument]]],
        *,
        deadline: Deadline | None = None,
    ) -> list[Any]:
        """Run many scripts in one round trip and give their results; the first error is raised."""
        self._scripts.update((script.sha, script) for script, _, _ in calls)
        return self.execute_all(
            [script.call(keys, arguments) for script, keys, arguments in calls], deadline=deadline
        )

    def execute_all(
        self,
        commands: Sequence[Sequence[Argument]],
        *,
        deadline: Deadline | None = None,
        atomic: bool = False,
    ) -> list[Any]:
        """Run many commands in one round trip and give their results; the first error is raised.

        Args:
            commands: what to run, in order.
            deadline: the connection's timeout by default.
            atomic: whether nothing else may run between them; their keys must live together.

        Raises:
            PeerError: the server refused one of them, or could not be reached within the deadline.
        """
        if not commands:
            return []

        def send() -> list[Any]:
            pipeline = self.client.pipeline(transaction=atomic)
            add: Callable[..., Any] = pipeline.execute_command
            for command in commands:
                add(*command, **_options(command))
            return pipeline.execute()

        return self.retry(lambda: self._translated(send), deadline)

    def ask(self, commands: Sequence[Sequence[Argument]], *, deadline: Deadline | None = None) -> list[Any]:
        """Run many commands in one round trip; what the server refused is given as a `PeerError`.

        Raises:
            ConnectionFailed: the server could not be reached in time.
        """
        if not commands:
            return []
        channel = Channel(self)
        try:
            return self.retry(lambda: channel.execute_all(commands), deadline)
        finally:
            channel.give_back()

    def append(
        self, key: str, entry_id: str, fields: Sequence[Argument], *, deadline: Deadline | None = None
    ) -> bool:
        """Add an entry with an explicit id to a stream; give False if the stream has passed that id.

        A sender whose reply was lost and which sends again, and one that was replaced, both get False.

        Raises:
            PeerError: the server refused, or could not be reached within the deadline.
        """
        try:
            self.execute("XADD", key, entry_id, *fields, deadline=deadline)
        except ServerFault as error:
            if "equal or smaller" in str(error):
                return False
            raise
        return True

    def pubsub(self) -> redis.client.PubSub:
        """Give a subscriber with a connection of its own."""
        make: Callable[..., redis.client.PubSub] = self.client.pubsub
        return make(ignore_subscribe_messages=True)

    def load(self, scripts: Sequence[Script]) -> None:
        """Put scripts into the server's cache, for processes that have no right to do so."""
        self.execute_all([("SCRIPT LOAD", script.text) for script in scripts])

    def load_missing(self, scripts: Sequence[Script]) -> None:
        """Put scripts back that the server's cache has lost, if it has lost any."""
        if not all(self.execute("SCRIPT EXISTS", *(script.sha for script in scripts))):
            self.load(scripts)

    def check_server(self, *, allow_eviction: bool = False) -> None:
        """Refuse a server that is too old or that would evict keys; servers that do not tell are taken.

        Raises:
            ServerUnsuitable: with what to change.
            PeerError: the server cannot be reached, or refuses the user.
        """
        self.execute("PING")
        found = self.server_info()
        if "redis_version" not in found:
            return
        version = found["redis_version"]
        if tuple(int(part) for part in version.split(".")[:2] if part.isdigit()) < MIN_SERVER_VERSION:
            wanted = ".".join(map(str, MIN_SERVER_VERSION))
            raise ServerUnsuitable(f"{self.address} runs Redis {version}; rlbroker needs {wanted} or newer")
        policy = found.get("maxmemory_policy", "noeviction")
        if policy.startswith("allkeys") and not allow_eviction:
            raise ServerUnsuitable(
                f"{self.address} has maxmemory-policy {policy}, which deletes weights and experiences when memory is "
                "short; set its maxmemory-policy to noeviction (see `rlbroker doctor`), or pass allow_eviction=True"
            )

    def server_version(self, found: Mapping[str, str] | None = None) -> str:
        """Give the name and version of the server, as its `server_info` has them; empty if it does not tell."""
        found = self.server_info() if found is None else found
        if "valkey_version" in found:
            return f"Valkey {found['valkey_version']}"
        return f"Redis {found['redis_version']}" if "redis_version" in found else ""

    def server_info(self) -> dict[str, str]:
        """Give what the server says of itself (INFO); nothing where it does not tell this user.

        Raises:
            PeerError: the server could not be reached in time.
        """
        try:
            return {str(name): str(value) for name, value in dict(self.execute("INFO")).items()}
        except AccessDenied:
            logger.info("%s does not let this user read INFO", self.address)
        except ServerFault as error:  # fakeredis has no INFO
            if "unknown command" not in str(error).lower():
                raise
        return {}

    def retry(self, operation: Callable[[], Result], deadline: Deadline | None = None) -> Result:
        """Do what may be repeated until it is done or the deadline is over: the only retry policy there is.

        A broken connection, and a run that its learner has yet to restore, are waited for in growing pauses. After
        a try that hung, none follows that would hang far beyond the deadline.

        Args:
            operation: raises our errors; doing it again must be harmless.
            deadline: the connection's timeout by default.

        Raises:
            ConnectionFailed: in the end it was not done, and of one of the tries nobody knows what it did.
            RunLost: the server lost the run, and no learner restored it in time.
            PeerError: the server refused.
        """
        with within(deadline or Deadline(self.timeout_seconds)) as holds:
            return self._retry(operation, holds)

    def _retry(self, operation: Callable[[], Result], deadline: Deadline) -> Result:
        backoff: Backoff | None = None
        unknown: ConnectionFailed | None = None
        while True:
            began = time.monotonic()
            try:
                return operation()
            except (ConnectionFailed, RunLost) as error:
                took_seconds = time.monotonic() - began
                unknown = error if isinstance(error, ConnectionFailed) else unknown
                backoff = backoff or Backoff()
                pause = backoff.next(deadline)
                if deadline.over or deadline.remaining < took_seconds / 2:
                    if unknown not in (None, error):
                        raise unknown from error
                    raise
                logger.debug("%s; trying again in %.2f s", error, pause)
                time.sleep(pause)

    def drop_idle(self) -> None:
        """Close the connections that nobody uses: what broke one of them has broken the others too."""
        self.client.connection_pool.disconnect(inuse_connections=False)

    def _translated(self, operation: Callable[[], Result], command: Sequence[Argument] = ()) -> Result:
        self.check_process()
        try:
            try:
                result = operation()
            except redis_errors.NoScriptError:
                for script in list(self._scripts.values()):
                    self._load_known(script)
                result = operation()
        except redis_errors.RedisError as error:
            ours = self.ours(error, command)
            if isinstance(ours, ConnectionFailed):
                self.drop_idle()
            raise ours from error
        self.note_answer()
        return result

    def _load_known(self, script: Script) -> None:
        try:
            self._send("SCRIPT LOAD", script.text)
        except redis_errors.NoPermissionError as error:
            raise scripts_missing(self.address) from error

    def note_answer(self) -> None:
        """Be told that the server has answered this user."""
        self._worked, self._refused = True, None

    def ours(self, error: redis_errors.RedisError, command: Sequence[Argument | Pieces] = ()) -> PeerError:
        """Give our error for one of redis-py's; a user that was accepted before is refused only after a while.

        Args:
            error: what redis-py raised.
            command: what was sent; a server that refuses a key does not say which.
        """
        insecure = refusal_of(error)
        if self._worked and (insecure or _is_refusal(error)):
            self._refused = self._refused or Deadline(REFUSED_SECONDS)
            if not self._refused.over:
                what = "can be reached by TLS no" if insecure else "does not accept this user any"
                return ConnectionFailed(f"{self.address} {what} more: {error}; was it restarted?")
        ours = translated(error, self.address, command=command, user=self.user)
        if not self._worked and isinstance(ours, ConnectionFailed):
            if answers_only_tls(self.client.connection_pool, error):
                return TlsFailed(f"{self.address} speaks TLS, and the URL says redis://: write rediss://")
            return ConnectionFailed(f"{ours}{self._hint}")
        return ours


class _Care:
    """Has a function called with each error in its block. (A generator would be slower.)"""

    __slots__ = ("_failed",)

    def __init__(self, failed: Callable[[BaseException], None]) -> None:
        self._failed = failed

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if error is not None:
            self._failed(error)


class Channel:
    """One physical connection of its own, for what must be ordered after a look at the server's state.

    A server can lose what it has acknowledged only by breaking its connections: it was restarted, or another
    one took its place. So whoever looks (`connect` gave True) and then writes over the same channel writes to
    the state that it looked at. Not safe to use from several threads at once.
    """

    def __init__(self, connection: Connection) -> None:
        """Prepare a channel; nothing is connected yet."""
        self._connection = connection
        self._wire: Any = None
        self.care = _Care(self._break)

    def connect(self) -> bool:
        """Make sure that there is a connection; give whether it is a new one.

        Raises:
            ConnectionFailed: the server cannot be reached.
            AccessDenied: it refuses this user.
        """
        self._connection.check_process()
        if self._wire is not None:
            return False
        with self.care:
            self._wire = self._connection.client.connection_pool.get_connection()
        return True

    def execute(self, *command: Argument) -> Any:
        """Run one command, once.

        Raises:
            PeerError: the server refused. After `ConnectionFailed` the next `connect` makes a new connection.
        """
        (result,) = self.execute_all([command])
        if isinstance(result, PeerError):
            raise result
        return result

    def execute_all(
        self, commands: Sequence[Sequence[Argument | Pieces]], *, strict: bool = False
    ) -> list[Any]:
        """Run many commands in one round trip, once; what the server refused is given as a `PeerError`.

        Args:
            commands: what to run, in order; a last argument may be in pieces: large ones are not copied.
            strict: whether the first of these errors is raised instead.

        Raises:
            ConnectionFailed: the connection broke; what was done is not known.
        """
        self.send(commands)
        results = self.receive(len(commands), commands)
        if strict:
            for result in results:
                if isinstance(result, PeerError):
                    raise result
        return results

    def send(self, commands: Sequence[Sequence[Argument | Pieces]]) -> None:
        """Send commands, and leave the answers to `receive`; who does not want them any more has to `close`.

        Raises:
            ConnectionFailed: the connection broke; what was done is not known.
        """
        self.connect()
        with self.care:
            for piece in packed(commands, piece_bytes=SEND_BYTES):
                self._wire.send_packed_command([piece], check_health=False)

    def receive(self, answers: int, commands: Sequence[Sequence[Argument | Pieces]] = ()) -> list[Any]:
        """Give the next answers to what was sent; what the server refused is given as a `PeerError`.

        Args:
            answers: how many.
            commands: what was sent, so that errors can name it.

        Raises:
            ConnectionFailed: the connection broke; what was done is not known.
        """
        results = []
        with self.care:
            for number in range(answers):
                try:
                    results.append(self._wire.read_response())
                except redis_errors.ResponseError as error:
                    refusal = self._ours(error, commands[number] if commands else ())
                    if isinstance(refusal, ConnectionFailed):  # it must not be used now: a replica, say
                        raise refusal from error
                    results.append(refusal)
        self._connection.note_answer()
        return results

    def run(self, script: Script, keys: Sequence[str], arguments: Sequence[Argument] = ()) -> Any:
        """Run a script, once, loading it first where the server does not know it.

        Raises:
            PeerError: as `execute`.
        """
        try:
            return self.execute(*script.call(keys, arguments))
        except ServerFault as error:
            if not script_is_unknown(error):
                raise
        try:
            self.execute("SCRIPT LOAD", script.text)
        except AccessDenied as error:
            raise scripts_missing(self._connection.address) from error
        return self.execute(*script.call(keys, arguments))

    @property
    def raw_socket(self) -> socket.socket | None:
        """The connection's own socket, no byte of which is read ahead; None where redis-py must be used.

        There is none with fakeredis, behind redis-py's cache, and in releases that we do not know.
        """
        found = getattr(self._wire, "_sock", None)
        parser = getattr(self._wire, "_parser", None)
        return found if isinstance(found, socket.socket) and hasattr(parser, "parse_error") else None

    def refusal(self, line: bytes) -> PeerError:
        """Give the error for a reply of the server that was read from the socket; without its `-`."""
        return self._ours(self._wire._parser.parse_error(line.decode(errors="replace")))

    def give_back(self) -> None:
        """Leave the connection to others: every answer was read."""
        wire, self._wire = self._wire, None
        if wire is not None:
            self._connection.note_answer()
            self._connection.client.connection_pool.release(wire)

    def close(self) -> None:
        """Give the connection up. May be called again."""
        wire, self._wire = self._wire, None
        if wire is not None:
            wire.disconnect()
            self._connection.client.connection_pool.release(wire)

    def _break(self, error: BaseException) -> None:
        """Leave no half-read answer behind, and speak our errors."""
        self.close()
        if not isinstance(
            error, (redis_errors.RedisError, OSError)
        ):  # ours; or Ctrl-C in the middle of an answer
            return
        self._connection.drop_idle()
        if not isinstance(error, redis_errors.RedisError):
            error = redis_errors.ConnectionError(str(error))
        raise self._connection.ours(error) from error

    def _ours(self, error: redis_errors.RedisError, command: Sequence[Argument | Pieces] = ()) -> PeerError:
        ours = self._connection.ours(error, command)
        ours.__cause__ = error
        return ours


def _options(command: Sequence[Argument]) -> dict[str, bool]:
    """Tell redis-py which of two replies will come: XPENDING with a range lists entries."""
    if command[0] == "XPENDING" and len(command) > 3:
        return {"parse_detail": True}
    return {}


def flat(fields: Mapping[str, Any]) -> list[Any]:
    """Give fields as commands take them: name, value, name, value."""
    return [part for pair in fields.items() for part in pair]


def translated(
    error: redis_errors.RedisError,
    address: str,
    *,
    command: Sequence[object] = (),
    user: str = "default",
) -> PeerError:
    """Give our error for one of redis-py's.

    Args:
        error: what redis-py raised.
        address: the server's, without its password.
        command: what was sent, as far as it is known.
        user: who sent it.
    """
    # Redis 6.2 says what was refused within a script after where that was.
    text = re.sub(r"^Error running script .*?: -(?=[A-Z]+ )", "", str(error)).rstrip(".")
    if isinstance(error, redis_errors.NoPermissionError) or says_refused(text):
        return refused(text, address, command=command, user=user)
    if insecure := refusal_of(error):
        return TlsFailed(f"{address} {insecure}")
    if _is_refusal(error):
        return AccessDenied(
            f"{address} refused: {text}; check user and password in the server's URL, or where it has none, in "
            f"{USERNAME_VARIABLE} and {PASSWORD_VARIABLE} (or {PASSWORD_FILE_VARIABLE})"
        )
    away = (redis_errors.ConnectionError, redis_errors.TimeoutError, redis_errors.ReadOnlyError)
    if isinstance(error, away) or text.startswith(("LOADING", "BUSY ", "MASTERDOWN", "READONLY")):
        return ConnectionFailed(f"cannot reach {address}: {text}")
    if isinstance(error, redis_errors.OutOfMemoryError) or text.startswith("OOM"):
        return ServerOutOfMemory(
            f"{address} has reached its maxmemory: {text}; raise maxmemory, or lower max_queue_bytes or max_queue_size"
        )
    if "FENCED" in text:
        return Fenced(text.partition("FENCED")[2].strip())
    if "LOST" in text:
        return RunLost(f"{address}: {text.partition('LOST')[2].strip()}")
    if "unknown command" in text.lower() and "eval" in text.lower():
        return ServerUnsuitable(f"{address} runs no Lua scripts; with fakeredis, install 'fakeredis[lua]'")
    if "WRONGTYPE" in text:
        return WrongKeyType(
            f"{address} has a key of another type than rlbroker writes ({_asked(text, command)}): another program "
            "uses the run's keys"
        )
    return ServerFault(f"{address} answered: {text}")


def _asked(text: str, command: Sequence[object]) -> str:
    """Give the command that an error is about: redis-py says it where it was one of many."""
    found = re.match(r"Command # \d+ \((.*?)\) of pipeline", text, re.DOTALL)
    words = found[1] if found else " ".join(str(word) for word in command if isinstance(word, str | int))
    return words[:200] or text


def script_is_unknown(error: PeerError) -> bool:
    """Whether the server has lost a script that it was to run."""
    return "NOSCRIPT" in str(error) or "No matching script" in str(error)


def scripts_missing(address: str) -> RunLost:
    """Give the error for scripts that only the learner may load."""
    return RunLost(
        f"{address} does not have rlbroker's scripts, and this user may not load them; the run's learner does when it "
        "starts: is it running?"
    )


def _is_refusal(error: redis_errors.RedisError) -> bool:
    """Whether the server did not let the user in; authorization errors are said when it connects."""
    refusal = (redis_errors.AuthenticationError, redis_errors.AuthorizationError)
    return isinstance(error, refusal) or str(error).startswith(("WRONGPASS", "NOAUTH"))
