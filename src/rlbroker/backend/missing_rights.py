"""What a server says to a user that lacks a right, as what is missing and how to give it."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence

from rlbroker.backend.keys import EVERY_KEY
from rlbroker.errors import AccessDenied

#: How Redis 6.2, 7 and Valkey name what they refuse.
_COMMAND = re.compile(r"no permissions to run the '([^']+)' command", re.IGNORECASE)
_KEY = re.compile(
    r"no permissions to access (?:the '(.+)' key|a key|one of the keys)|can't access at least one of the keys",
    re.IGNORECASE,
)
_CHANNEL = re.compile(
    r"no permissions to access (?:the '(.+)' channel|a channel|one of the channels)", re.IGNORECASE
)
_USER = re.compile(r"^User (\S+) has no permissions")

#: What redis-py puts before the server's words when the command was one of many.
_OF_MANY = re.compile(r"^Command # \d+ \((.*)\) of pipeline caused error: ", re.DOTALL)

#: Commands that only look at keys.
_READING = frozenset(
    (
        *(
            "EXISTS",
            "GET",
            "GETRANGE",
            "HGET",
            "HGETALL",
            "HKEYS",
            "HLEN",
            "HMGET",
            "MEMORY",
            "MGET",
            "OBJECT",
        ),
        *("PTTL", "STRLEN", "TTL", "TYPE", "XINFO", "XLEN", "XPENDING", "XRANGE", "XREAD", "XREVRANGE"),
        *("ZCARD", "ZRANGE", "ZRANGEBYSCORE", "ZSCORE"),
    )
)

#: Commands of which one part can be allowed alone: CONFIG GET without CONFIG SET.
_CONTAINERS = ("acl", "client", "cluster", "config", "memory", "object", "script", "xgroup", "xinfo")

#: Rules that only a user of a Cluster has.
_OF_CLUSTER = ("+cluster", "+asking", "+readonly")

#: Users of `rlbroker acl`.
_ROLE = re.compile(r"(.+)-(learner|workers|observer|worker-(\d+))")
_ROLE_NAMES = {"learner": "the learner", "workers": "all workers", "observer": "an observer"}

#: Names that a message has room for.
_NAMES_SHOWN = 3


def says_refused(text: str) -> bool:
    """Whether a server says that a right is missing; within scripts each version does so in words of its own."""
    return any(
        said in text for said in ("NOPERM", "ACL failure in script", "The user executing the script can't")
    )


def refused(
    text: str, address: str, *, command: Sequence[object] = (), user: str = "default"
) -> AccessDenied:
    """Give the error for a user that is known, and lacks a right.

    Args:
        text: what the server said.
        address: the server's, without its password.
        command: what was sent, where the text does not say it.
        user: who asked, where the text does not say it.
    """
    sent = [str(word) for word in command if isinstance(word, str | int)]
    of_many = _OF_MANY.match(text)
    if of_many:
        text, sent = text[of_many.end() :], of_many[1].split()
    said_user = _USER.match(text)
    user = said_user[1] if said_user else user
    name = sent[0].upper() if sent else ""
    if found := _COMMAND.search(text):
        refused_command = found[1].lower()
        if (
            "subcommand" in text and len(sent) > 1 and sent[0].lower() in _CONTAINERS
        ):  # Redis 6.2 does not say which
            refused_command = f"{sent[0]}|{sent[1]}".lower()
        what, rule = (
            f"may not run {refused_command.replace('|', ' ').upper()}",
            f"+{refused_command}",
        )
    elif found := _KEY.search(text):
        what, rule = (
            f"may not {_verb(name)} {_keys(found[1], sent)}" + (f" ({name})" if name else ""),
            f"%R~{EVERY_KEY}" if _reads(name) else f"~{EVERY_KEY}",
        )
    elif found := _CHANNEL.search(text):
        what, rule = (
            f"may not use the channel {found[1] or ' '.join(sent[1:]) or 'that it asked for'}",
            f"&{EVERY_KEY}",
        )
    else:
        return AccessDenied(f"{address} refused: {text}; the user {user!r} lacks a right")
    error = AccessDenied(f"{address}: the user {user!r} {what}; {_advice(user, rule)}")
    error.rule, error.user = rule, user
    return error


def _advice(user: str, rule: str) -> str:
    """Say how to be allowed; who has a user that was made for one role does not want it widened."""
    role = _ROLE.fullmatch(user)
    if role and rule.startswith(_OF_CLUSTER):
        return "its rules are for a single server; `rlbroker acl --cluster` makes those for the nodes of a Cluster"
    if role:
        whose = _ROLE_NAMES.get(role[2], f"worker {role[3]}")
        return (
            f"it is that of {whose} of {role[1]!r}, as `rlbroker acl` makes them: take the user that is meant for "
            "this, with RLBROKER_REDIS_USERNAME and its password"
        )
    before_7 = f", before Redis 7 '~{EVERY_KEY}'" if rule.startswith("%R") else ""
    return f"whoever administers the server can allow it: {giving(user, rule)}{before_7}"


def giving(user: str, *rules: str) -> str:
    """Give the command that gives a user rights."""
    return f"redis-cli ACL SETUSER {shlex.quote(user)} " + " ".join(map(shlex.quote, rules))


def _reads(name: str) -> bool:
    return name in _READING


def _verb(name: str) -> str:
    return "read" if _reads(name) else "use"


def _keys(said: str | None, sent: Sequence[str]) -> str:
    """Name the key that was refused; without the server's word for it, those that were asked for."""
    if said:
        return f"the key {said}"
    names = [word for word in sent[1:] if word.startswith(EVERY_KEY[:-1])]
    if not names:
        return "a key that it asked for"
    if len(names) == 1:
        return f"the key {names[0]}"
    more = ", …" if len(names) > _NAMES_SHOWN else ""
    return f"one of the keys {', '.join(names[:_NAMES_SHOWN])}{more}"
