"""What rlbroker does about each answer of a server: `ANSWERS`. Translates redis-py's errors into rlbroker's."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Final, TypeGuard

import redis
from redis import exceptions as redis_errors

from rlbroker.backend.argument_limit import (
    LEAST_ARGUMENT_BYTES,
    LENGTH_REFUSAL,
    argument_bytes,
    exceeded_limit,
)
from rlbroker.backend.deadline import Deadline
from rlbroker.backend.missing_rights import missing_right_error
from rlbroker.backend.tls import requires_tls, tls_refusal
from rlbroker.config import PASSWORD_FILE_VARIABLE, PASSWORD_VARIABLE, USERNAME_VARIABLE
from rlbroker.errors import (
    AccessDenied,
    ConnectionFailed,
    Fenced,
    IncompatibleFormat,
    PeerError,
    RunLost,
    ServerFault,
    ServerOutOfMemory,
    ServerUnsuitable,
    TlsFailed,
    WrongKeyType,
)

#: How long a server may refuse a user that it once accepted, or a right that a client has had, before that counts as
#: final. After a restart, an administrator or a script may still have to create the users.
REFUSAL_GRACE_SECONDS: Final = 10.0

#: A right that was not missed for this long had been granted: the next refusal begins a time of its own.
_REGAINED_SECONDS: Final = 5.0


class SlotMigrating(ConnectionFailed):
    """The Cluster is moving a key's slot, or has just moved it. Nothing is broken, and the command had no effect."""


class RequestTooLarge(ServerUnsuitable):
    """An argument of a command is longer than the server takes. The command had no effect, and never will have one."""


class Reaction(StrEnum):
    """What rlbroker does about an answer of a server; `docs/errors.md` explains each."""

    WAITED_OUT = "waited out"
    WAITED_BRIEFLY = f"waited out for {REFUSAL_GRACE_SECONDS:g} s"
    REPAIRED = "repaired"
    REFUSED = "refused"
    FINAL = "final"


@dataclass(frozen=True)
class Answer:
    """One kind of answer, and what it means for the caller.

    Attributes:
        name: the word that it begins with, or what it says.
        reaction: what rlbroker does.
        error: the error that the caller gets, if any.
        meaning: why a server answers so; for the docs.
        pattern: what its text matches; by default the name at the beginning.
        kinds: redis-py's classes for it, from whose text the name is missing.
        say: the message; `{address}` and `{text}` are replaced.
    """

    name: str
    reaction: Reaction
    error: type[PeerError]
    meaning: str
    pattern: str = ""
    kinds: tuple[type[redis_errors.RedisError], ...] = ()
    say: str = "cannot reach {address}: {text}"
    _regex: re.Pattern[str] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        """Compile the pattern."""
        pattern = self.pattern or rf"^{re.escape(self.name)}\b"
        object.__setattr__(self, "_regex", re.compile(pattern, re.IGNORECASE if self.pattern else 0))

    def matches(self, error: redis_errors.RedisError, text: str) -> bool:
        """Return whether an error, with this text, is an answer of this kind."""
        return isinstance(error, self.kinds) or self._regex.search(text) is not None


_NO_WRITES: Final = "{address} refuses writes for now: {text}; "
_LOGIN: Final = (
    "{address} refused: {text}; check user and password in the server's URL, or where it has none, in "
    f"{USERNAME_VARIABLE} and {PASSWORD_VARIABLE} (or {PASSWORD_FILE_VARIABLE})"
)
_ANSWERED: Final = "{address} answered: {text}"

#: Every answer that needs a decision, the first match counts. Nothing else in rlbroker decides what is waited out;
#: `docs/errors.md` shows this table.
ANSWERS: Final = (
    Answer(
        "NOPERM",
        Reaction.WAITED_BRIEFLY,
        AccessDenied,
        "the user lacks a right for a command, a key or a channel",
        pattern=r"^NOPERM\b|ACL failure in script|The user executing the script can't",
        kinds=(redis_errors.NoPermissionError,),
    ),
    Answer(
        "WRONGPASS",
        Reaction.WAITED_BRIEFLY,
        AccessDenied,
        "wrong user or password",
        kinds=(redis_errors.AuthenticationError, redis_errors.AuthorizationError),
        say=_LOGIN,
    ),
    Answer("NOAUTH", Reaction.WAITED_BRIEFLY, AccessDenied, "a password is needed", say=_LOGIN),
    Answer(
        "DENIED",
        Reaction.WAITED_BRIEFLY,
        AccessDenied,
        "protected mode: the server accepts only its own host",
        say="{address} refused: {text}",
    ),
    Answer(
        "MOVED",
        Reaction.REPAIRED,
        SlotMigrating,
        "another node of the Cluster has the key",
        kinds=(redis_errors.MovedError,),
    ),
    Answer(
        "ASK",
        Reaction.REPAIRED,
        SlotMigrating,
        "the key is being moved to another node",
        kinds=(redis_errors.AskError,),
    ),
    Answer(
        "TRYAGAIN",
        Reaction.WAITED_OUT,
        SlotMigrating,
        "keys of a script are being moved to another node",
        kinds=(redis_errors.TryAgainError,),
    ),
    Answer(
        "OOM",
        Reaction.WAITED_OUT,
        ServerOutOfMemory,
        "the server reached its `maxmemory`",
        kinds=(redis_errors.OutOfMemoryError,),
        say="{address} has reached its maxmemory: {text}; raise maxmemory, or lower max_queue_bytes or max_queue_size",
    ),
    Answer("LOADING", Reaction.WAITED_OUT, ConnectionFailed, "the server is reading its data"),
    Answer("BUSY", Reaction.WAITED_OUT, ConnectionFailed, "a slow script blocks the server"),
    Answer("UNKILLABLE", Reaction.WAITED_OUT, ConnectionFailed, "a slow script that wrote blocks the server"),
    Answer("MASTERDOWN", Reaction.WAITED_OUT, ConnectionFailed, "a replica has lost its master"),
    Answer(
        "READONLY",
        Reaction.WAITED_OUT,
        ConnectionFailed,
        "the server has become a replica",
        kinds=(redis_errors.ReadOnlyError,),
    ),
    Answer(
        "CLUSTERDOWN",
        Reaction.WAITED_OUT,
        ConnectionFailed,
        "slots of the Cluster have no master",
        kinds=(redis_errors.ClusterDownError,),
    ),
    Answer(
        "NOREPLICAS",
        Reaction.WAITED_OUT,
        ConnectionFailed,
        "fewer replicas than `min-replicas-to-write`",
        say=_NO_WRITES + "bring a replica back, or lower min-replicas-to-write",
    ),
    Answer(
        "MISCONF",
        Reaction.WAITED_OUT,
        ConnectionFailed,
        "the server cannot save its data: its disk is full, or a snapshot failed",
        say=_NO_WRITES + "free space on its disk, and see its log",
    ),
    Answer(
        "max number of clients reached",
        Reaction.WAITED_OUT,
        ConnectionFailed,
        "more connections than `maxclients`",
        pattern=r"max number of clients( \+ cluster connections)? reached",
        say="{address} accepts no further connection: {text}; raise its maxclients, or close other clients",
    ),
    Answer(
        "invalid bulk length",
        Reaction.REFUSED,
        RequestTooLarge,
        "an argument above `proto-max-bulk-len` (512 MB by default); for a batch `BatchTooLarge`",
        pattern=LENGTH_REFUSAL,
        say="{address} takes no argument of this size; send less at once, or raise its proto-max-bulk-len",
    ),
    Answer(
        "FENCED",
        Reaction.FINAL,
        Fenced,
        "rlbroker's scripts: a newer process took this one's place",
        pattern=r"^(ERR )?FENCED\b",
    ),
    Answer(
        "LOST",
        Reaction.WAITED_OUT,
        RunLost,
        "rlbroker's scripts: the server lost the run; the learner restores it",
        pattern=r"^(ERR )?LOST\b",
    ),
    Answer(
        "NOSCRIPT",
        Reaction.REPAIRED,
        ServerFault,
        "the server lost the scripts; they are loaded again",
        pattern="^NOSCRIPT|No matching script",
        kinds=(redis_errors.NoScriptError,),
        say=_ANSWERED,
    ),
    Answer(
        "NOGROUP",
        Reaction.REPAIRED,
        ServerFault,
        "the server lost a queue; it is opened again",
        say=_ANSWERED,
    ),
    Answer(
        "UNBLOCKED",
        Reaction.REPAIRED,
        ServerFault,
        "a stream was deleted, or the server's role changed, during a read",
        say=_ANSWERED,
    ),
    Answer(
        "WRONGTYPE",
        Reaction.REFUSED,
        WrongKeyType,
        "a key has a type that rlbroker does not write",
        pattern=r"\bWRONGTYPE\b",
    ),
    Answer(
        "unknown command",
        Reaction.REFUSED,
        ServerUnsuitable,
        "the server, or a proxy, has no streams, scripts or publish/subscribe",
        pattern=r"unknown command\W*(x\w+|subscribe|publish|script|eval\w*|select)\b",
    ),
    Answer(
        "DB index is out of range",
        Reaction.REFUSED,
        ServerUnsuitable,
        "the server does not have this database",
        pattern="DB index is out of range|SELECT is not allowed",
    ),
    Answer(
        "TLS refused",
        Reaction.WAITED_BRIEFLY,
        TlsFailed,
        "one side refuses the other's certificate, or has no TLS",
        pattern="(?!)",  # recognised by its cause, not its text
    ),
    Answer(
        "no answer",
        Reaction.WAITED_OUT,
        ConnectionFailed,
        "the connection is refused, breaks, or stays silent",
        pattern="(?!)",
        kinds=(redis_errors.ConnectionError, redis_errors.TimeoutError),
    ),
    Answer(
        "anything else",
        Reaction.REFUSED,
        ServerFault,
        "such as `EXECABORT`, `CROSSSLOT`, `ERR syntax error`: a bug, or another program's doing",
        pattern="",
        kinds=(redis_errors.RedisError,),
        say=_ANSWERED,
    ),
)

#: Errors that a retry does not cure: a background thread that meets one ends its client.
FINAL_ERRORS: Final = (
    *{one.error for one in ANSWERS if one.reaction in (Reaction.WAITED_BRIEFLY, Reaction.FINAL)},
    IncompatibleFormat,
)


class ErrorTranslator:
    """Translates the errors of one connection; it knows the server's address, and whether the server ever answered."""

    def __init__(self, address: str, user: str, pool: redis.ConnectionPool, *, hint: str = "") -> None:
        """Create a translator.

        Args:
            address: the server's, without its password.
            user: the name with which the connections log in.
            pool: makes test connections, to find out whether the server requires TLS.
            hint: added to errors while the server has never answered.
        """
        self._address, self._user, self._pool, self._hint = address, user, pool, hint
        self._refused: Deadline | None = None
        #: For each missing right, when its grace ends, and when it no longer counts as missing.
        self._missing: dict[str, tuple[Deadline, Deadline]] = {}
        #: Whether the server has ever answered this user.
        self.has_answered = False
        #: Whether the client has joined its run, and so had the rights that it needs. The client sets this.
        self.joined = False

    def record_answer(self) -> None:
        """Note that the server has answered this user."""
        self.has_answered, self._refused = True, None

    def translate(
        self,
        error: redis_errors.RedisError,
        *,
        command: Sequence[object] = (),
        server_name: str = "",
        pool: redis.ConnectionPool | None = None,
    ) -> PeerError:
        """Return rlbroker's error for one of redis-py's.

        Args:
            command: the command that failed, or the largest of several; a server that refuses a key may not name it.
            server_name: which of several servers was asked.
            pool: makes test connections to that server.
        """
        address = f"{server_name} of {self._address}" if server_name else self._address
        size = argument_bytes(command)
        if size > LEAST_ARGUMENT_BYTES and (limit := exceeded_limit(pool or self._pool, size, error)):
            return RequestTooLarge(
                f"{address} takes no argument of {size:,} bytes; send less at once, or raise its limit: redis-cli "
                f"CONFIG SET {limit} {1 << size.bit_length()}"
            )
        insecure = tls_refusal(error)
        if self.has_answered and (insecure or is_login_refusal(error)):
            self._refused = self._refused or Deadline(REFUSAL_GRACE_SECONDS)
            if not self._refused.over:
                what = "can no longer be reached by TLS" if insecure else "no longer accepts this user"
                return ConnectionFailed(f"{address} {what}: {error}; was it restarted?")
        translated = translate_error(error, address, command=command, user=self._user)
        if isinstance(translated, AccessDenied) and not is_login_refusal(error):
            return self._await_right(translated)
        if not self.has_answered and type(translated) is ConnectionFailed:
            if requires_tls(self._pool, error):
                return TlsFailed(f"{address} speaks TLS, and the URL says redis://: write rediss://")
            return ConnectionFailed(f"{translated}{self._hint}")
        return translated

    def _await_right(self, denied: AccessDenied) -> PeerError:
        """Return an outage if the client had this right and has missed it only for a short time."""
        grace, missing = self._missing.get(denied.rule, (None, None))
        if not self.joined:
            grace = Deadline(0)  # it never had this right, and does without it
        elif grace is None or (grace.seconds and missing is not None and missing.over):
            grace = Deadline(REFUSAL_GRACE_SECONDS)
        self._missing[denied.rule] = grace, Deadline(_REGAINED_SECONDS)
        return denied if grace.over else ConnectionFailed(str(denied))


def translate_error(
    error: redis_errors.RedisError,
    address: str,
    *,
    command: Sequence[object] = (),
    user: str = "default",
) -> PeerError:
    """Return rlbroker's error for one of redis-py's. The address is the server's, without its password."""
    if insecure := tls_refusal(error):
        return TlsFailed(f"{address} {insecure}")
    whole = str(error).rstrip(".")
    text = _plain_text(whole)
    answer = find_answer(error, text)
    if answer.name == "NOPERM":
        return missing_right_error(whole, address, command=command, user=user)
    if isinstance(error, redis_errors.MovedError):
        return SlotMigrating(f"{address} has moved slot {error.slot_id} to {error.host}:{error.port}")
    if answer.error is SlotMigrating:
        return SlotMigrating(f"{address} is moving keys: {text}")
    if answer.error is Fenced:
        return Fenced(text.partition("FENCED")[2].strip())
    if answer.error is RunLost:
        return RunLost(f"{address}: {text.partition('LOST')[2].strip()}")
    if answer.error is ServerUnsuitable:
        return _unsuitable(text, address)
    if answer.error is WrongKeyType:
        return WrongKeyType(
            f"{address} has a key of another type than rlbroker writes ({_failed_command(whole, command)}); another "
            "program uses the run's keys"
        )
    return answer.error(answer.say.format(address=address, text=text))


def find_answer(error: redis_errors.RedisError, text: str) -> Answer:
    """Return the row of the table for an error of redis-py with this text, without the place of the error."""
    return next(filter(lambda one: one.matches(error, text), ANSWERS))


def _unsuitable(text: str, address: str) -> ServerUnsuitable:
    """Return the error for a server that lacks a command or a database that rlbroker needs."""
    found = re.search(r"unknown command\W*(\w+)", text, re.IGNORECASE)
    name = found[1].upper() if found else "SELECT"
    if name == "SELECT":
        return ServerUnsuitable(
            f"{address} does not have this database ({text}): a Cluster has the database 0 only, and a Sentinel none "
            "(for Sentinels write redis+sentinel://host:port/service)"
        )
    if name.startswith("EVAL"):
        return ServerUnsuitable(
            f"{address} runs no Lua scripts; if there is a proxy in front of it, give the URL of the server itself; "
            "with fakeredis, install 'fakeredis[lua]'"
        )
    return ServerUnsuitable(
        f"{address} does not know the command {name}: it is not Redis or Valkey, or a proxy in front of it lacks "
        "streams, scripts or publish/subscribe; give the URL of the server itself"
    )


def breaks_connection(error: PeerError) -> bool:
    """Return whether the server cannot be used now, or closes the connection; otherwise only a command failed."""
    return isinstance(error, ConnectionFailed | RequestTooLarge) and not isinstance(error, ServerOutOfMemory)


def _plain_text(text: str) -> str:
    """Remove the pipeline position and the place in the script, which mean nothing to a user."""
    text = re.sub(r"^Command # \d+ \(.*\) of pipeline caused error: ", "", text, flags=re.DOTALL)
    # For an error within a script, Redis 6.2 puts the place in the script before the error itself.
    text = re.sub(r"^Error running script .*?: -(?=[A-Z]+ )", "", text)
    return re.sub(r"\.?\s*script: [0-9a-f]{40}, on @user_script:\d+$", "", text)


def _failed_command(text: str, command: Sequence[object]) -> str:
    """Return the command that an error is about; in a pipeline's error, redis-py names it."""
    found = re.match(r"Command # \d+ \((.*?)\) of pipeline", text, re.DOTALL)
    words = found[1] if found else " ".join(str(word) for word in command if isinstance(word, str | int))
    return words[:200] or text


def is_ask_redirect(error: redis_errors.RedisError) -> TypeGuard[redis_errors.AskError]:
    """Return whether a node redirects this one command (ASK). redis-py derives MOVED from the same class."""
    return isinstance(error, redis_errors.AskError) and not isinstance(error, redis_errors.MovedError)


def is_login_refusal(error: redis_errors.RedisError) -> bool:
    """Return whether the server refused the login; servers report authorization errors on connecting."""
    refusal = (redis_errors.AuthenticationError, redis_errors.AuthorizationError)
    return isinstance(error, refusal) or str(error).startswith(("WRONGPASS", "NOAUTH"))


def script_is_unknown(error: PeerError) -> bool:
    """Return whether the server does not have the script that it was asked to run."""
    return "NOSCRIPT" in str(error) or "No matching script" in str(error)


def id_was_passed(error: PeerError) -> bool:
    """Return whether XADD was refused because the stream has had this id or a later one: so it is for a resend."""
    return "equal or smaller" in str(error)


def missing_scripts_error(address: str) -> RunLost:
    """Return the error for missing scripts that only the learner may load."""
    return RunLost(
        f"{address} does not have rlbroker's scripts, and this user may not load them; the run's learner does when it "
        "starts: is it running?"
    )
