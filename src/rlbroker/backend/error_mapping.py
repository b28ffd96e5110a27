"""redis-py's errors as rlbroker's: what happened, and what to do about it."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from typing import Final, TypeGuard

import redis
from redis import exceptions as redis_errors

from rlbroker.backend.deadline import Deadline
from rlbroker.backend.keys import EVERY_KEY
from rlbroker.backend.tls import requires_tls, tls_refusal
from rlbroker.config import PASSWORD_FILE_VARIABLE, PASSWORD_VARIABLE, USERNAME_VARIABLE
from rlbroker.errors import (
    AccessDenied,
    ConnectionFailed,
    Fenced,
    PeerError,
    RunLost,
    ServerFault,
    ServerOutOfMemory,
    ServerUnsuitable,
    TlsFailed,
    WrongKeyType,
)

#: How long a server that once accepted this user may refuse it before that counts as final. After a restart, an
#: administrator or a script may still have to create the users.
REFUSAL_GRACE_SECONDS: Final = 10.0


class SlotMigrating(ConnectionFailed):
    """The Cluster is moving a key's slot, or has just moved it. Nothing is broken, and the command had no effect."""


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
        #: Whether the server has ever answered this user.
        self.has_answered = False

    def record_answer(self) -> None:
        """Note that the server has answered this user."""
        self.has_answered, self._refused = True, None

    def translate(
        self,
        error: redis_errors.RedisError,
        *,
        command: Sequence[object] = (),
        server_name: str = "",
    ) -> PeerError:
        """Return rlbroker's error for one of redis-py's.

        Args:
            command: the command that failed; a server that refuses a key may not name it.
            server_name: which of several servers was asked.
        """
        address = f"{server_name} of {self._address}" if server_name else self._address
        insecure = tls_refusal(error)
        if self.has_answered and (insecure or is_login_refusal(error)):
            self._refused = self._refused or Deadline(REFUSAL_GRACE_SECONDS)
            if not self._refused.over:
                what = "can no longer be reached by TLS" if insecure else "no longer accepts this user"
                return ConnectionFailed(f"{address} {what}: {error}; was it restarted?")
        translated = translate_error(error, address, command=command, user=self._user)
        if not self.has_answered and isinstance(translated, ConnectionFailed):
            if requires_tls(self._pool, error):
                return TlsFailed(f"{address} speaks TLS, and the URL says redis://: write rediss://")
            return ConnectionFailed(f"{translated}{self._hint}")
        return translated


def translate_error(
    error: redis_errors.RedisError,
    address: str,
    *,
    command: Sequence[object] = (),
    user: str = "default",
) -> PeerError:
    """Return rlbroker's error for one of redis-py's. The address is the server's, without its password."""
    # For an error within a script, Redis 6.2 puts the place in the script before the error itself.
    text = re.sub(r"^Error running script .*?: -(?=[A-Z]+ )", "", str(error)).rstrip(".")
    if isinstance(error, redis_errors.NoPermissionError) or is_missing_right(text):
        return _access_denied(text, address, command=command, user=user)
    if insecure := tls_refusal(error):
        return TlsFailed(f"{address} {insecure}")
    if is_login_refusal(error):
        return AccessDenied(
            f"{address} refused: {text}; check user and password in the server's URL, or where it has none, in "
            f"{USERNAME_VARIABLE} and {PASSWORD_VARIABLE} (or {PASSWORD_FILE_VARIABLE})"
        )
    if isinstance(error, redis_errors.MovedError):
        return SlotMigrating(f"{address} has moved slot {error.slot_id} to {error.host}:{error.port}")
    if isinstance(error, redis_errors.AskError | redis_errors.TryAgainError):
        return SlotMigrating(f"{address} is moving keys: {text}")
    no_master = (redis_errors.ReadOnlyError, redis_errors.ClusterDownError)
    unreachable = (redis_errors.ConnectionError, redis_errors.TimeoutError, *no_master)
    if (
        isinstance(error, unreachable)
        or text.startswith(("LOADING", "BUSY ", "MASTERDOWN", "READONLY"))
        or "NOREPLICAS" in text
    ):
        return ConnectionFailed(f"cannot reach {address}: {_plain_text(text)}")
    if isinstance(error, redis_errors.OutOfMemoryError) or text.startswith("OOM"):
        return ServerOutOfMemory(
            f"{address} has reached its maxmemory: {text}; raise maxmemory, or lower max_queue_bytes or max_queue_size"
        )
    if "FENCED" in text:
        return Fenced(text.partition("FENCED")[2].strip())
    if "LOST" in text:
        return RunLost(f"{address}: {text.partition('LOST')[2].strip()}")
    if unsuitable := _unsuitable(text, address):
        return unsuitable
    if "WRONGTYPE" in text:
        return WrongKeyType(
            f"{address} has a key of another type than rlbroker writes ({_failed_command(text, command)}); another "
            "program uses the run's keys"
        )
    return ServerFault(f"{address} answered: {_plain_text(text)}")


def _unsuitable(text: str, address: str) -> ServerUnsuitable | None:
    """Return the error for a server that lacks a command or a database that rlbroker needs."""
    if found := re.search(r"unknown command\W*(x\w+|subscribe|publish|script)\b", text, re.IGNORECASE):
        return ServerUnsuitable(
            f"{address} does not know the command {found[1].upper()}: it is not Redis or Valkey, or a proxy in front "
            "of it lacks streams, scripts or publish/subscribe; give the URL of the server itself"
        )
    if "unknown command" in text.lower() and "eval" in text.lower():
        return ServerUnsuitable(
            f"{address} runs no Lua scripts; if there is a proxy in front of it, give the URL of the server itself; "
            "with fakeredis, install 'fakeredis[lua]'"
        )
    if re.search(
        r"unknown command\W*select\b|DB index is out of range|SELECT is not allowed", text, re.IGNORECASE
    ):
        return ServerUnsuitable(
            f"{address} does not have this database ({text}): a Cluster has the database 0 only, and a Sentinel none "
            "(for Sentinels write redis+sentinel://host:port/service)"
        )
    return None


def _plain_text(text: str) -> str:
    """Remove the pipeline position and the place in the script, which mean nothing to a user."""
    text = re.sub(r"^Command # \d+ \(.*\) of pipeline caused error: ", "", text, flags=re.DOTALL)
    return re.sub(r"\s*script: [0-9a-f]{40}, on @user_script:\d+$", "", text)


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


# Missing rights, in the wording of Redis 6.2, Redis 7 and Valkey.

_REFUSED_COMMAND = re.compile(r"no permissions to run the '([^']+)' command", re.IGNORECASE)
_REFUSED_KEY = re.compile(
    r"no permissions to access (?:the '(.+)' key|a key|one of the keys)|can't access at least one of the keys",
    re.IGNORECASE,
)
_REFUSED_CHANNEL = re.compile(
    r"no permissions to access (?:the '(.+)' channel|a channel|one of the channels)", re.IGNORECASE
)
_REFUSED_USER = re.compile(r"^User (\S+) has no permissions")

#: redis-py puts this before the server's text if the command was one of a pipeline.
_PIPELINE_PREFIX = re.compile(r"^Command # \d+ \((.*)\) of pipeline caused error: ", re.DOTALL)

#: Commands that only read keys.
_READ_COMMANDS = frozenset(
    (
        *("EXISTS", "GET", "GETRANGE", "HGET", "HGETALL", "HKEYS", "HLEN", "HMGET", "MEMORY", "MGET"),
        *("OBJECT", "PTTL", "STRLEN", "TTL", "TYPE", "XINFO", "XLEN", "XPENDING", "XRANGE", "XREAD"),
        *("XREVRANGE", "ZCARD", "ZRANGE", "ZRANGEBYSCORE", "ZSCORE"),
    )
)

#: Commands whose subcommands are allowed one by one: CONFIG GET without CONFIG SET.
_CONTAINERS = ("acl", "client", "cluster", "config", "memory", "object", "script", "xgroup", "xinfo")

#: Rules that only a user of a Cluster has.
_CLUSTER_RULES = ("+cluster", "+asking", "+readonly")

#: Names of the users that `rlbroker acl` makes.
_ROLE = re.compile(r"(.+)-(learner|workers|observer|worker-(\d+))")
_ROLE_NAMES = {"learner": "the learner", "workers": "all workers", "observer": "an observer"}

#: How many keys a message names.
_KEYS_SHOWN = 3


def is_missing_right(text: str) -> bool:
    """Return whether an error's text says that a right is missing; within scripts, each version has its own words."""
    return any(
        part in text for part in ("NOPERM", "ACL failure in script", "The user executing the script can't")
    )


def _access_denied(text: str, address: str, *, command: Sequence[object], user: str) -> AccessDenied:
    """Return the error for a user that lacks a right: which right, and how to grant it.

    The command and the user are used if the server's text does not name them.
    """
    sent = [str(word) for word in command if isinstance(word, str | int)]
    in_pipeline = _PIPELINE_PREFIX.match(text)
    if in_pipeline:
        text, sent = text[in_pipeline.end() :], in_pipeline[1].split()
    named_user = _REFUSED_USER.match(text)
    user = named_user[1] if named_user else user
    name = sent[0].upper() if sent else ""
    reads = name in _READ_COMMANDS
    if found := _REFUSED_COMMAND.search(text):
        refused = found[1].lower()
        if "subcommand" in text and len(sent) > 1 and sent[0].lower() in _CONTAINERS:
            refused = f"{sent[0]}|{sent[1]}".lower()  # Redis 6.2 does not name the subcommand
        what, rule = f"may not run {refused.replace('|', ' ').upper()}", f"+{refused}"
    elif found := _REFUSED_KEY.search(text):
        what = f"may not {'read' if reads else 'use'} {_refused_keys(found[1], sent)}"
        what, rule = what + (f" ({name})" if name else ""), f"%R~{EVERY_KEY}" if reads else f"~{EVERY_KEY}"
    elif found := _REFUSED_CHANNEL.search(text):
        what = f"may not use the channel {found[1] or ' '.join(sent[1:]) or 'of this command'}"
        rule = f"&{EVERY_KEY}"
    else:
        return AccessDenied(f"{address} refused: {text}; the user {user!r} lacks a right")
    error = AccessDenied(f"{address}: the user {user!r} {what}; {_grant_advice(user, rule)}")
    error.rule, error.user = rule, user
    return error


def _grant_advice(user: str, rule: str) -> str:
    """Return what to do about a missing right. A user that was made for one role is not given more rights."""
    role = _ROLE.fullmatch(user)
    if role and rule.startswith(_CLUSTER_RULES):
        return "its rules are for a single server; `rlbroker acl --cluster` makes those for the nodes of a Cluster"
    if role:
        owner = _ROLE_NAMES.get(role[2], f"worker {role[3]}")
        return (
            f"`rlbroker acl` made it for {owner} of {role[1]!r}: log in as the user that is meant for this, with "
            "RLBROKER_REDIS_USERNAME and its password"
        )
    before_7 = f", before Redis 7 '~{EVERY_KEY}'" if rule.startswith("%R") else ""
    return f"an administrator of the server can allow it: {grant_command(user, rule)}{before_7}"


def grant_command(user: str, *rules: str) -> str:
    """Return the shell command that grants rights to a user."""
    return f"redis-cli ACL SETUSER {shlex.quote(user)} " + " ".join(map(shlex.quote, rules))


def _refused_keys(named: str | None, sent: Sequence[str]) -> str:
    """Return the key that the server refused; if it did not name one, the keys of the command."""
    if named:
        return f"the key {named}"
    names = [word for word in sent[1:] if word.startswith(EVERY_KEY[:-1])]
    if not names:
        return "a key of this command"
    if len(names) == 1:
        return f"the key {names[0]}"
    more = ", …" if len(names) > _KEYS_SHOWN else ""
    return f"one of the keys {', '.join(names[:_KEYS_SHOWN])}{more}"
