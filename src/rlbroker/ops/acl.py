"""The rights of each role on the server, as ACL rules. Pure: no I/O.

A script runs with the rights of its caller, so a role also needs the commands that its scripts call. Redis 7 added two
things: keys that a user may only read, and selectors: further sets of rules, in parentheses, that grant a command on
other keys than the main rules do.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final, Literal

from rlbroker.backend.keys import EVERY_KEY, Keys

Role = Literal["learner", "worker", "observer"]

#: The first version with read-only keys and selectors.
READ_ONLY_KEYS_VERSION: Final = (7, 0)

#: The first version with CLIENT SETINFO, which redis-py sends on connecting, and WAITAOF.
SETINFO_VERSION: Final = (7, 2)

#: Commands for reading a run, except those that disturb other clients.
_READING: Final = ("+@read", "+@connection", "-@dangerous", "+info", "+time")

_LEARNER: Final = (
    *_READING,
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

#: Further commands on a Cluster. All roles find the node of each key, workers read from replicas and follow slots that
#: are being moved, and observers check the Cluster.
_CLUSTER: Final = ("+cluster|slots", "+cluster|nodes")
_CLUSTER_WORKER: Final = ("+asking", "+readonly")
_CLUSTER_OBSERVER: Final = ("+cluster|info",)


@dataclass(frozen=True)
class User:
    """One user of a server, without its password.

    Attributes:
        rules: as for `ACL SETUSER`.
    """

    name: str
    role: Role
    rules: tuple[str, ...]


def make_users(
    run: str, *, workers: int, shared: bool, version: Sequence[int], cluster: bool = False
) -> list[User]:
    """Return the users of one run: its learner, its workers, and an observer of all runs.

    Args:
        workers: the number of workers; their ids begin at 0.
        shared: whether all workers share one user.
        version: the Redis version of the server, or with which it is compatible.
        cluster: whether the run's shards are spread over a Cluster.
    """
    keys = Keys(run, shards=("*",) if cluster else ())
    cluster_rules = _CLUSTER if cluster else ()
    worker_rules = _CLUSTER + _CLUSTER_WORKER if cluster else ()
    observer_rules = _CLUSTER + _CLUSTER_OBSERVER if cluster else ()
    ids = ("*",) if shared else tuple(map(str, range(workers)))
    names = (f"{keys.run}-workers",) if shared else tuple(f"{keys.run}-worker-{one}" for one in ids)
    client_rules = ("+client|setinfo", "+waitaof") if tuple(version) >= SETINFO_VERSION else ()
    read_only = "%R~" if tuple(version) >= READ_ONLY_KEYS_VERSION else "~"
    return [
        User(
            f"{keys.run}-learner",
            "learner",
            ("resetchannels", f"~{keys.everything}", f"&{keys.everything}", *_LEARNER, *cluster_rules),
        ),
        *(
            User(
                name,
                "worker",
                (
                    *_worker_keys(keys, one, read_only),
                    *_WORKER,
                    *worker_rules,
                    *client_rules,
                    *_script_rules(keys, version),
                ),
            )
            for name, one in zip(names, ids, strict=True)
        ),
        User(
            f"{keys.run}-observer",
            "observer",
            ("resetchannels", f"{read_only}{EVERY_KEY}", *_READING, *observer_rules),
        ),
    ]


def format_acl_file(users: Sequence[User], passwords: dict[str, str], administrator: str) -> Iterator[str]:
    """Yield the lines of a server's ACL file: these users and an administrator; the default user is off.

    The file holds only digests of the passwords.
    """
    yield "user default off resetkeys resetchannels -@all"
    yield f"user {administrator} on {_digest(passwords[administrator])} ~* &* +@all"
    for user in users:
        yield f"user {user.name} on {_digest(passwords[user.name])} {' '.join(user.rules)}"


def format_set_user_commands(users: Sequence[User], passwords: dict[str, str]) -> Iterator[str]:
    """Yield, for each user, the redis-cli command that creates it on a running server."""
    for user in users:
        rules = " ".join(f'"{rule}"' if " " in rule else rule for rule in user.rules)
        yield f"ACL SETUSER {user.name} reset on {_digest(passwords[user.name])} {rules}"


def _digest(password: str) -> str:
    return f"#{hashlib.sha256(password.encode()).hexdigest()}"


def _worker_keys(keys: Keys, worker: str, read_only: str) -> tuple[str, ...]:
    """Return the key rules of one worker, or of all for `*`: for keys that it writes and keys that it only reads."""
    return (
        *(f"~{name}" for name in keys.written_by_worker(worker)),
        *(f"{read_only}{name}" for name in keys.read_by_worker(worker)),
        *("resetchannels", f"&{keys.notify}"),
    )


def _script_rules(keys: Keys, version: Sequence[int]) -> tuple[str, ...]:
    """Return the rules that let a worker call scripts, and add itself to the set of workers.

    A script may be called with any key of the run: the server checks each command inside it too.
    """
    if tuple(version) < READ_ONLY_KEYS_VERSION:
        return "+evalsha", "+sadd", f"~{keys.workers}"
    return f"(+evalsha ~{keys.everything})", f"(+sadd ~{keys.workers})"
