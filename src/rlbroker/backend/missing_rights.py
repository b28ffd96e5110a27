"""Rights that a user of the server lacks: which one an error is about, and how to grant it."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence

from rlbroker.backend.keys import EVERY_KEY
from rlbroker.errors import AccessDenied

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


def missing_right_error(text: str, address: str, *, command: Sequence[object], user: str) -> AccessDenied:
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
