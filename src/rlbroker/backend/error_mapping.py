"""redis-py's errors, turned into ours."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TypeGuard

from redis import exceptions as redis_errors

from rlbroker.backend.missing_rights import refused, says_refused
from rlbroker.backend.tls import refusal_of
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


class KeysMove(ConnectionFailed):
    """Nodes of a Cluster hand keys over, or have done so: nothing is broken, and nothing was done."""


class KeyMoves(KeysMove):
    """A node of a Cluster has handed a key over, and says where: it is to be asked there, this time only."""

    def __init__(self, said: redis_errors.AskError) -> None:
        """Take what the node said."""
        super().__init__(f"the key is just being moved to {said.host}:{said.port}")
        self.said = said


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
    if is_refusal(error):
        return AccessDenied(
            f"{address} refused: {text}; check user and password in the server's URL, or where it has none, in "
            f"{USERNAME_VARIABLE} and {PASSWORD_VARIABLE} (or {PASSWORD_FILE_VARIABLE})"
        )
    if isinstance(error, redis_errors.MovedError):
        return KeysMove(f"{address} has moved slot {error.slot_id} to {error.host}:{error.port}")
    if isinstance(error, redis_errors.AskError | redis_errors.TryAgainError):
        return KeysMove(f"{address} moves keys just now: {text}")
    no_master = (redis_errors.ReadOnlyError, redis_errors.ClusterDownError)
    away = (redis_errors.ConnectionError, redis_errors.TimeoutError, *no_master)
    if (
        isinstance(error, away)
        or text.startswith(("LOADING", "BUSY ", "MASTERDOWN", "READONLY"))
        or "NOREPLICAS" in text
    ):
        return ConnectionFailed(f"cannot reach {address}: {_for_people(text)}")
    if isinstance(error, redis_errors.OutOfMemoryError) or text.startswith("OOM"):
        return ServerOutOfMemory(
            f"{address} has reached its maxmemory: {text}; raise maxmemory, or lower max_queue_bytes or max_queue_size"
        )
    if "FENCED" in text:
        return Fenced(text.partition("FENCED")[2].strip())
    if "LOST" in text:
        return RunLost(f"{address}: {text.partition('LOST')[2].strip()}")
    if found := re.search(r"unknown command\W*(x\w+|subscribe|publish|script)\b", text, re.IGNORECASE):
        return ServerUnsuitable(
            f"{address} does not know the command {found[1].upper()}: it is no Redis or Valkey, or there is a "
            "proxy before it that lacks streams, scripts or publish/subscribe; give the URL of the server itself"
        )
    if "unknown command" in text.lower() and "eval" in text.lower():
        return ServerUnsuitable(
            f"{address} runs no Lua scripts; where there is a proxy before it, give the URL of the server itself, and "
            "with fakeredis, install 'fakeredis[lua]'"
        )
    if re.search(
        r"unknown command\W*select\b|DB index is out of range|SELECT is not allowed", text, re.IGNORECASE
    ):
        return ServerUnsuitable(
            f"{address} does not have this database ({text}): a Cluster has the database 0 only, and a Sentinel none "
            "(for Sentinels write redis+sentinel://host:port/service)"
        )
    if "WRONGTYPE" in text:
        return WrongKeyType(
            f"{address} has a key of another type than rlbroker writes ({_asked(text, command)}): another program "
            "uses the run's keys"
        )
    return ServerFault(f"{address} answered: {_for_people(text)}")


def _for_people(text: str) -> str:
    """Leave out which command of many it was, and where in which script."""
    text = re.sub(r"^Command # \d+ \(.*\) of pipeline caused error: ", "", text, flags=re.DOTALL)
    return re.sub(r"\s*script: [0-9a-f]{40}, on @user_script:\d+$", "", text)


def _asked(text: str, command: Sequence[object]) -> str:
    """Give the command that an error is about: redis-py says it where it was one of many."""
    found = re.match(r"Command # \d+ \((.*?)\) of pipeline", text, re.DOTALL)
    words = found[1] if found else " ".join(str(word) for word in command if isinstance(word, str | int))
    return words[:200] or text


def is_moving(error: redis_errors.RedisError) -> TypeGuard[redis_errors.AskError]:
    """Whether a node of a Cluster says where a key is just being moved to; for redis-py, MOVED is one of these."""
    return isinstance(error, redis_errors.AskError) and not isinstance(error, redis_errors.MovedError)


def script_is_unknown(error: PeerError) -> bool:
    """Whether the server has lost a script that it was to run."""
    return "NOSCRIPT" in str(error) or "No matching script" in str(error)


def scripts_missing(address: str) -> RunLost:
    """Give the error for scripts that only the learner may load."""
    return RunLost(
        f"{address} does not have rlbroker's scripts, and this user may not load them; the run's learner does when it "
        "starts: is it running?"
    )


def is_refusal(error: redis_errors.RedisError) -> bool:
    """Whether the server did not let the user in; authorization errors are said when it connects."""
    refusal = (redis_errors.AuthenticationError, redis_errors.AuthorizationError)
    return isinstance(error, refusal) or str(error).startswith(("WRONGPASS", "NOAUTH"))
