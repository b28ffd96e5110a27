"""What of a server matters to rlbroker: limits, persistence, rights, and what it already had to refuse or delete."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from rlbroker.backend.connection import Connection
from rlbroker.backend.error_mapping import grant_command
from rlbroker.backend.keys import GROUP, Keys
from rlbroker.backend.replies import whole_number
from rlbroker.backend.suitability import MIN_SERVER_VERSION
from rlbroker.backend.text import counted
from rlbroker.errors import AccessDenied
from rlbroker.membership.incarnations import incarnation_command
from rlbroker.ops.doctor.checks import Check, State, size, untold
from rlbroker.ops.doctor.server_info import Latency, ServerInfo

#: A server that answers more slowly is spoken of: as a rule, and at worst.
SLOW_SECONDS: Final = 0.005
SLOW_WORST_SECONDS: Final = 0.05

#: Clocks that differ by more make the ages of batches and versions wrong.
CLOCKS_APART_SECONDS: Final = 1.0

#: Shares of a limit from which on it is spoken of.
MEMORY_SHARE, FULL_SHARE, CLIENTS_SHARE = 0.9, 0.99, 0.8

#: Share of the machine's memory from which on a server without a limit of its own is spoken of.
MACHINE_SHARE: Final = 0.5

#: The largest value that rlbroker sends besides batches: a chunk of weights with its last segment.
CHUNK_BYTES: Final = 4 << 20

#: A reader has so much on its way as a rule: chunks of weights, or the batches of one read.
READER_BYTES: Final = 64 << 20

#: Memory of which several times as much is taken from the system is spoken of, once it is much.
FRAGMENTED, FRAGMENTED_BYTES = 3.0, 256 << 20

#: Idle clients that are closed sooner have to connect again often.
IDLE_SECONDS: Final = 60

#: Any run will do to see which rights a user has.
_ANY_RUN: Final = "default"


def of_latency(latency: Latency) -> Check:
    """Judge how fast the server answers."""
    slow = latency.median_seconds > SLOW_SECONDS or latency.worst_seconds > SLOW_WORST_SECONDS
    what = (
        f"a round trip takes {latency.median_seconds * 1000:.2f} ms, at worst {latency.worst_seconds * 1000:.2f} ms "
        f"of {latency.trips}"
    )
    if slow:
        return Check("latency", "warning", f"{what}; `bench` tells what that costs", "rlbroker bench")
    return Check("latency", "ok", what)


def of_clock(latency: Latency, facts: ServerInfo) -> Check:
    """Judge the difference between this machine's clock and the server's."""
    ahead = latency.ahead_seconds
    if ahead is None:
        missing = ServerInfo(facts.user, "", (), "", missing={"TIME": "+time"})
        return untold("clock", "the difference of the clocks is not known", missing, "TIME")
    side = "ahead of" if ahead >= 0 else "behind"
    if abs(ahead) <= CLOCKS_APART_SECONDS:
        return Check("clock", "ok", f"this machine's clock is {abs(ahead) * 1000:.0f} ms {side} the server's")
    what = (
        f"this machine's clock is {abs(ahead):,.1f} s {side} the server's: ages by `published` and `sent_at` of what "
        "it writes are wrong by that; who lives is judged by the server's clock alone"
    )
    return Check("clock", "warning", what, "timedatectl set-ntp true")


def of_server(facts: ServerInfo) -> Iterator[Check]:
    """Judge what the server says of itself."""
    yield _version(facts)
    yield _role(facts)
    yield _policy(facts)
    yield _memory(facts)
    yield _evicted(facts)
    yield _persistence(facts)
    yield _bulk(facts)
    yield _output_buffers(facts)
    yield _clients(facts)
    yield _rejected(facts)
    yield _idle(facts)
    yield _keepalive(facts)
    yield from _fragmentation(facts)


def _version(facts: ServerInfo) -> Check:
    if not facts.version:
        return untold("version", "the server's version is not known", facts, "INFO")
    if facts.version[:2] < MIN_SERVER_VERSION:
        wanted = ".".join(map(str, MIN_SERVER_VERSION))
        return Check("version", "critical", f"{facts.name} is too old: rlbroker needs {wanted} or newer")
    lacks = []
    if facts.version < (7, 0):
        lacks.append("read-only rules for keys (give an observer '~rlb:*')")
    if facts.version < (7, 2):
        lacks.append("WAITAOF (level='fsync' is refused)")
    return Check("version", "ok", f"{facts.name}{', without ' + ' and '.join(lacks) if lacks else ''}")


def _role(facts: ServerInfo) -> Check:
    if facts.info.get("cluster_enabled") == "1":
        what = "this is a node of a cluster: a run works only through the node that has its keys"
        return Check("replication", "warning", what, "redis-cli CLUSTER NODES")
    if facts.role == "replica":
        host, port = facts.info.get("master_host", ""), facts.info.get("master_port", "6379")
        master = f" of {host}:{port}" if host else ""
        hint = f"rlbroker doctor --url redis://{host}:{port}" if host else "redis-cli ROLE"
        return Check(
            "replication",
            "critical",
            f"this server is a replica{master}: it takes no writes; use its master",
            hint,
        )
    replicas = facts.number("connected_slaves")
    if not facts.role or replicas is None:
        return untold("replication", "its role and replicas are not known", facts, "INFO")
    if not replicas:
        return Check("replication", "ok", "no replicas: level='replica' would never be confirmed")
    what = f"{counted(replicas, 'replica')} for level='replica'"
    return Check("replication", "ok", what)


def _policy(facts: ServerInfo) -> Check:
    policy = facts.info.get("maxmemory_policy") or facts.settings.get("maxmemory-policy")
    if not policy:
        return untold("eviction", "what it deletes when memory is short is not known", facts, "INFO")
    if policy == "noeviction":
        return Check("eviction", "ok", "maxmemory-policy noeviction: nothing is deleted when memory is short")
    lost = "weights and experiences" if policy.startswith("allkeys") else "heartbeats and weights"
    return Check(
        "eviction",
        "critical",
        f"maxmemory-policy {policy}: it deletes {lost} when memory is short",
        "redis-cli CONFIG SET maxmemory-policy noeviction",
    )


def _memory(facts: ServerInfo) -> Check:
    used, limit = facts.number("used_memory"), facts.number("maxmemory")
    machine = facts.number("total_system_memory")
    if used is None or limit is None:
        return untold("memory", "how much memory it uses, and may use, is not known", facts, "INFO")
    if limit:
        share, what = used / limit, f"{size(used)} of maxmemory {size(limit)} are used"
        if share < MEMORY_SHARE:
            return Check("memory", "ok", what)
        state: State = "critical" if share >= FULL_SHARE else "warning"
        roomy = machine is None or 2 * limit < MEMORY_SHARE * machine
        hint = f"redis-cli CONFIG SET maxmemory {2 * limit}" if roomy else "rlbroker prune --dry-run"
        return Check("memory", state, f"{what} ({share:.0%}); a full server takes nothing more", hint)
    what = f"{size(used)} are used, and there is no maxmemory"
    if machine and used > MACHINE_SHARE * machine:
        what += f" but the machine's {size(machine)}: the system ends the server when that is full"
        return Check(
            "memory", "warning", what, f"redis-cli CONFIG SET maxmemory {int(MEMORY_SHARE * machine)}"
        )
    return Check("memory", "ok", what)


def _evicted(facts: ServerInfo) -> Check:
    evicted = facts.number("evicted_keys")
    if evicted is None:
        return untold("evicted", "whether keys were deleted for memory is not known", facts, "INFO")
    if not evicted:
        return Check("evicted", "ok", "no keys were deleted for want of memory")
    policy = facts.info.get("maxmemory_policy", "noeviction")
    mends = "CONFIG RESETSTAT" if policy == "noeviction" else "CONFIG SET maxmemory-policy noeviction"
    return Check(
        "evicted",
        "critical",
        f"{counted(evicted, 'key was', 'keys were')} deleted for want of memory since the server started: weights or "
        "experiences may be among them (CONFIG RESETSTAT begins to count anew)",
        f"redis-cli {mends}",
    )


def _persistence(facts: ServerInfo) -> Check:
    aof = facts.info.get("aof_enabled")
    if aof is None:
        return untold("persistence", "what stays after a restart is not known", facts, "INFO")
    for name, work, again in (
        ("aof_last_write_status", "writing its append-only file", "BGREWRITEAOF"),
        ("aof_last_bgrewrite_status", "rewriting its append-only file", "BGREWRITEAOF"),
        ("rdb_last_bgsave_status", "saving a snapshot", "BGSAVE"),
    ):
        if facts.info.get(name, "ok") != "ok":
            what = f"{work} failed the last time: is the server's disk full? It may refuse writes ({name})"
            return Check("persistence", "critical", what, f"redis-cli {again}")
    fsync = "level='fsync' loses nothing" if facts.version >= (7, 2) else "level='fsync' needs Redis 7.2"
    if aof == "1":
        how = facts.settings.get("appendfsync", "everysec")
        worth = {
            "always": "what level='redis' confirmed is on disk",
            "no": f"a crash of the machine loses what the system had not written yet; {fsync}",
        }.get(how, f"a crash loses about a second of what level='redis' confirmed; {fsync}")
        return Check("persistence", "ok", f"append-only file, appendfsync {how}: {worth}")
    snapshots = facts.settings.get("save")
    if snapshots is None:
        return untold(
            "persistence", "there is no append-only file; whether it saves is not known", facts, "CONFIG GET"
        )
    if snapshots:
        what = (
            f"snapshots only (save {snapshots}): a crash loses what came after the last one, whatever level='redis' "
            "confirmed; level='learner' loses nothing"
        )
        return Check("persistence", "ok", what)
    return Check(
        "persistence",
        "warning",
        "nothing stays after a restart: level='redis' and 'fsync' do not survive one, 'replica' only where a replica "
        "takes over, 'learner' does; the learner publishes its weights again",
        "redis-cli CONFIG SET appendonly yes",
    )


def _bulk(facts: ServerInfo) -> Check:
    limit = facts.number("proto-max-bulk-len")
    if limit is None:
        return untold("bulk", "how large one value may be is not known", facts, "CONFIG GET")
    if limit < CHUNK_BYTES:
        return Check(
            "bulk",
            "critical",
            f"proto-max-bulk-len {size(limit)}: chunks of weights have up to {size(CHUNK_BYTES)}",
            "redis-cli CONFIG SET proto-max-bulk-len 512mb",
        )
    return Check("bulk", "ok", f"one value may have {size(limit)}")


def _output_buffers(facts: ServerInfo) -> Check:
    words = facts.settings.get("client-output-buffer-limit", "").split()
    if not words:
        return untold("buffers", "how much it holds for a slow reader is not known", facts, "CONFIG GET")
    hard = {kind: whole_number(limit) or 0 for kind, limit in zip(words[::4], words[1::4], strict=False)}
    if 0 < hard.get("normal", 0) < READER_BYTES:
        return Check(
            "buffers",
            "warning",
            f"it closes readers that have more than {size(hard['normal'])} on the way: one read of batches can be "
            "more",
            'redis-cli CONFIG SET client-output-buffer-limit "normal 0 0 0"',
        )
    pubsub = hard.get("pubsub", 0)
    if 0 < pubsub < 1 << 16:
        return Check(
            "buffers",
            "warning",
            f"it closes subscribers that have more than {size(pubsub)} on the way: workers hear of versions later",
            'redis-cli CONFIG SET client-output-buffer-limit "pubsub 33554432 8388608 60"',
        )
    return Check("buffers", "ok", f"subscribers may have {size(pubsub) if pubsub else 'anything'} on the way")


def _clients(facts: ServerInfo) -> Check:
    connected, limit = facts.number("connected_clients"), facts.number("maxclients")
    if connected is None or limit is None:
        return untold("clients", "how many clients it has, and may have, is not known", facts, "INFO")
    blocked = facts.number("blocked_clients") or 0
    what = f"{connected:,} of {counted(limit, 'client')} connected, {blocked:,} in a blocking read"
    if connected > CLIENTS_SHARE * limit:
        return Check("clients", "warning", what, f"redis-cli CONFIG SET maxclients {2 * limit}")
    return Check("clients", "ok", what)


def _rejected(facts: ServerInfo) -> Check:
    rejected = facts.number("rejected_connections")
    if rejected is None:
        return untold("rejected", "whether it turned clients away is not known", facts, "INFO")
    if not rejected:
        return Check("rejected", "ok", "no clients were turned away")
    limit = facts.number("maxclients") or 0
    turned_away = counted(rejected, "connection was", "connections were")
    what = f"{turned_away} turned away since the server started, as maxclients was reached"
    return Check("rejected", "warning", what, f"redis-cli CONFIG SET maxclients {2 * limit or 20_000}")


def _idle(facts: ServerInfo) -> Check:
    seconds = facts.number("timeout")
    if seconds is None:
        return untold("idle", "whether it closes idle clients is not known", facts, "CONFIG GET")
    if 0 < seconds < IDLE_SECONDS:
        what = f"it closes clients that are idle for {seconds} s; ours connect again, which costs time and is logged"
        return Check("idle", "warning", what, "redis-cli CONFIG SET timeout 0")
    if seconds:
        what = f"clients that are idle for {seconds:,} s are closed; ours connect again"
        return Check("idle", "ok", what)
    return Check("idle", "ok", "idle clients are never closed")


def _keepalive(facts: ServerInfo) -> Check:
    seconds = facts.number("tcp-keepalive")
    if seconds is None:
        return untold(
            "keepalive", "whether it looks after silent connections is not known", facts, "CONFIG GET"
        )
    if not seconds:
        what = "tcp-keepalive 0: connections of machines that are gone stay for ever, and count as clients"
        return Check("keepalive", "warning", what, "redis-cli CONFIG SET tcp-keepalive 300")
    return Check("keepalive", "ok", f"silent connections are probed after {seconds:,} s")


def _fragmentation(facts: ServerInfo) -> Iterator[Check]:
    """Speak of memory only if it is absurd: an empty server has a high ratio always."""
    used = facts.number("used_memory") or 0
    try:
        ratio = float(facts.info.get("mem_fragmentation_ratio", "0"))
    except ValueError:
        return
    if used > FRAGMENTED_BYTES and ratio > FRAGMENTED:
        what = f"it takes {ratio:.1f} times the memory from the system that its data need"
        yield Check("fragmentation", "warning", what, "redis-cli MEMORY PURGE")


def of_rights(connection: Connection, facts: ServerInfo, run: str | None) -> Check:
    """Say who asks, and which of an observer's rights this user lacks: each is tried, on keys of the run."""
    keys = Keys(run or _ANY_RUN)
    stream, missing_stream = keys.experiences(0), keys.again(0)
    commands: list[tuple[str | int, ...]] = [
        ("TIME",),
        ("INFO", "server"),
        ("SCAN", 0, "COUNT", 1),
        ("EXISTS", keys.meta),
        ("TYPE", keys.meta),
        ("HGET", keys.meta, "epoch"),
        ("HGETALL", keys.heartbeat(0)),
        ("SMEMBERS", keys.workers),
        incarnation_command(keys, 0),
        ("XLEN", stream),
        ("XRANGE", keys.missed, "0-1", "0-1"),
        ("XREVRANGE", keys.missed, "0-1", "0-1"),
        ("XPENDING", missing_stream, GROUP),
        ("XINFO", "STREAM", missing_stream),
        ("XINFO", "GROUPS", missing_stream),
        ("XINFO", "CONSUMERS", missing_stream, GROUP),
        ("MEMORY", "USAGE", keys.heartbeat(0)),
    ]
    lacks = {answer.rule: None for answer in connection.ask(commands) if isinstance(answer, AccessDenied)}
    who = f"the user {facts.user!r}"
    if not lacks:
        return Check("rights", "ok", f"{who} may do all that looking needs")
    rules = [rule for rule in lacks if rule]
    if facts.version[:1] == (6,):
        rules = [rule.replace("%R~", "~") for rule in rules]
    return Check(
        "rights",
        "warning",
        f"{who} lacks rights that looking needs: {' '.join(rules)}",
        grant_command(facts.user, *rules),
    )
