"""What each role may do on the server, as rules of its access control lists (ACL). Pure.

Scripts run with the rights of who calls them, so a role needs the commands inside them too. From Redis 7 on a key can
be read-only, and a further set of rules, in parentheses, gives a command on keys on which nothing else is allowed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final, Literal

from rlbroker.backend.keys import EVERY_KEY, Keys

Role = Literal["learner", "worker", "observer"]

#: From this version on keys can be read-only, and there are rules in parentheses.
READ_ONLY_KEYS_VERSION: Final = (7, 0)

#: From this version on the server knows CLIENT SETINFO, with which redis-py says what it is, and WAITAOF.
SETINFO: Final = (7, 2)

#: What looking takes, without the commands that disturb others.
_LOOKING: Final = ("+@read", "+@connection", "-@dangerous", "+info", "+time")

_LEARNER: Final = (
    *_LOOKING,
    *("+evalsha", "+script|load", "+script|exists", "+publish"),
    *("+set", "+del", "+unlink", "+expire", "+pexpire", "+persist"),
    *("+hset", "+hdel", "+hincrby", "+sadd", "+srem"),
    *("+xadd", "+xdel", "+xtrim", "+xack", "+xclaim", "+xreadgroup", "+xgroup|create"),
)

_WORKER: Final = (
    *("+ping", "+hello", "+select", "+info", "+time", "+subscribe", "+wait"),
    *("+get", "+exists", "+hget", "+hmget", "+hgetall", "+hexists", "+smembers", "+sismember"),
    *("+xread", "+xrange", "+xrevrange", "+xlen", "+xpending", "+xinfo|stream", "+xinfo|groups"),
    *("+del", "+pexpire", "+hset", "+hdel", "+hincrby", "+xadd", "+xdel", "+xgroup|create"),
)

#: Besides, on a Cluster, to find the node of each key: these for all, and for a worker, which reads replicas too;
#: and what is asked by who examines it.
_FINDING: Final = ("+cluster|slots", "+cluster|nodes")
_FOLLOWING: Final = ("+asking", "+readonly")
_EXAMINING: Final = ("+cluster|info",)


@dataclass(frozen=True)
class User:
    """One user of a server, without its password.

    Attributes:
        name: as it is typed into a URL.
        role: what it is for.
        rules: what it may do, as `ACL SETUSER` takes them.
    """

    name: str
    role: Role
    rules: tuple[str, ...]


def make_users(
    run: str, *, workers: int, shared: bool, version: Sequence[int], cluster: bool = False
) -> list[User]:
    """Give the users of one run: its learner, its workers, and an observer of all runs.

    Args:
        run: its name.
        workers: how many of them there are, with ids from 0 on.
        shared: whether they are one user, who may be any of them.
        version: of the server, as Redis counts; Valkey says which Redis it is like.
        cluster: whether it is a Cluster, on whose nodes the run's shards are.
    """
    keys = Keys(run, shards=("*",) if cluster else ())
    finding, following, examining = (
        (_FINDING, _FINDING + _FOLLOWING, _FINDING + _EXAMINING) if cluster else ((), (), ())
    )
    ids = ("*",) if shared else tuple(map(str, range(workers)))
    names = (f"{keys.run}-workers",) if shared else tuple(f"{keys.run}-worker-{one}" for one in ids)
    told = ("+client|setinfo", "+waitaof") if tuple(version) >= SETINFO else ()
    read_only = "%R~" if tuple(version) >= READ_ONLY_KEYS_VERSION else "~"
    return [
        User(
            f"{keys.run}-learner",
            "learner",
            ("resetchannels", f"~{keys.everything}", f"&{keys.everything}", *_LEARNER, *finding),
        ),
        *(
            User(
                name,
                "worker",
                (
                    *_worker_keys(keys, one, read_only),
                    *_WORKER,
                    *following,
                    *told,
                    *_through_scripts(keys, version),
                ),
            )
            for name, one in zip(names, ids, strict=True)
        ),
        User(
            f"{keys.run}-observer",
            "observer",
            ("resetchannels", f"{read_only}{EVERY_KEY}", *_LOOKING, *examining),
        ),
    ]


def format_acl_file(found: Sequence[User], passwords: dict[str, str], administrator: str) -> Iterator[str]:
    """Give the lines of a server's ACL file: these users, one who may do everything, and nobody without a password.

    Args:
        found: the users.
        passwords: of each, and of the administrator; only their digests are in the lines.
        administrator: name of the one who may do everything.
    """
    yield "user default off resetkeys resetchannels -@all"
    yield f"user {administrator} on {_digest(passwords[administrator])} ~* &* +@all"
    for user in found:
        yield f"user {user.name} on {_digest(passwords[user.name])} {' '.join(user.rules)}"


def format_set_user_commands(found: Sequence[User], passwords: dict[str, str]) -> Iterator[str]:
    """Give a command for each user that makes it on a running server, as redis-cli reads them from its input."""
    for user in found:
        rules = " ".join(f'"{rule}"' if " " in rule else rule for rule in user.rules)
        yield f"ACL SETUSER {user.name} reset on {_digest(passwords[user.name])} {rules}"


def _digest(password: str) -> str:
    return f"#{hashlib.sha256(password.encode()).hexdigest()}"


def _worker_keys(keys: Keys, worker: str, read_only: str) -> tuple[str, ...]:
    """Give the keys of one worker, or of any: what it writes, and what it only reads."""
    return (
        *(f"~{name}" for name in keys.written_by_worker(worker)),
        *(f"{read_only}{name}" for name in keys.read_by_worker(worker)),
        *("resetchannels", f"&{keys.notify}"),
    )


def _through_scripts(keys: Keys, version: Sequence[int]) -> tuple[str, ...]:
    """Give what a worker may do on keys that it may not write: call scripts, whose every command is checked again.

    And add itself to the set of workers, from which it cannot remove anybody.
    """
    if tuple(version) < READ_ONLY_KEYS_VERSION:
        return "+evalsha", "+sadd", f"~{keys.workers}"
    return f"(+evalsha ~{keys.everything})", f"(+sadd ~{keys.workers})"
