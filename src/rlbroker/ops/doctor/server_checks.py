"""The checks of one server: speed, version, role, memory, persistence, limits, connections, clock and rights."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from rlbroker.backend.connection import Connection
from rlbroker.backend.keys import GROUP, Keys
from rlbroker.backend.missing_rights import grant_command
from rlbroker.backend.replies import whole_number
from rlbroker.backend.suitability import MIN_SERVER_VERSION
from rlbroker.backend.text import counted
from rlbroker.errors import AccessDenied
from rlbroker.local.embedded_server import is_temporary_directory
from rlbroker.membership.incarnations import incarnation_command
from rlbroker.ops.doctor.checks import Check, State, unknown_check
from rlbroker.ops.doctor.server_info import Latency, ServerInfo
from rlbroker.ops.formatting import format_bytes

#: Slow round trips: the median, and the worst.
SLOW_SECONDS: Final = 0.005
SLOW_WORST_SECONDS: Final = 0.05

#: The largest difference of the clocks that does not matter for the ages of batches and versions.
CLOCKS_APART_SECONDS: Final = 1.0

#: Shares of a limit from which memory is nearly full, memory is full, and clients are many.
MEMORY_SHARE, FULL_SHARE, CLIENTS_SHARE = 0.9, 0.99, 0.8

#: The share of the machine's memory that a server without a limit may use.
MACHINE_SHARE: Final = 0.5

#: The largest value besides batches: a chunk of weights with its last segment.
CHUNK_BYTES: Final = 4 << 20

#: The output buffer that a reader needs, for chunks of weights or the batches of one read.
READER_BYTES: Final = 64 << 20

#: The ratio from which memory is fragmented, and the memory use from which it counts: a small server has a high ratio.
FRAGMENTED, FRAGMENTED_BYTES = 3.0, 256 << 20

#: With a shorter idle timeout clients must reconnect often.
IDLE_SECONDS: Final = 60

#: The run on whose keys the rights are tested if no run was named.
_ANY_RUN: Final = "default"


def check_latency(latency: Latency) -> Check:
    """Check the round-trip time."""
    slow = latency.median_seconds > SLOW_SECONDS or latency.worst_seconds > SLOW_WORST_SECONDS
    what = (
        f"a round trip takes {latency.median_seconds * 1000:.2f} ms, at worst {latency.worst_seconds * 1000:.2f} ms "
        f"of {latency.trips}"
    )
    if slow:
        return Check("latency", "warning", f"{what}; `rlbroker bench` measures the cost", "rlbroker bench")
    return Check("latency", "ok", what)


def check_clock(latency: Latency, info: ServerInfo) -> Check:
    """Check the difference between this machine's clock and the server's."""
    ahead = latency.ahead_seconds
    if ahead is None:
        missing = ServerInfo(info.user, "", (), "", missing={"TIME": "+time"})
        return unknown_check("clock", "the difference of the clocks is unknown", missing, "TIME")
    side = "ahead of" if ahead >= 0 else "behind"
    if abs(ahead) <= CLOCKS_APART_SECONDS:
        return Check("clock", "ok", f"this machine's clock is {abs(ahead) * 1000:.0f} ms {side} the server's")
    what = (
        f"this machine's clock is {abs(ahead):,.1f} s {side} the server's: the times `published` and `sent_at` that it "
        "writes are wrong by that; leases use the server's clock alone"
    )
    return Check("clock", "warning", what, "timedatectl set-ntp true")


def check_server(info: ServerInfo) -> Iterator[Check]:
    """Check what the server reports."""
    yield _check_version(info)
    yield _check_role(info)
    yield _check_policy(info)
    yield _check_memory(info)
    yield _check_evicted(info)
    yield _check_persistence(info)
    yield _check_bulk(info)
    yield _check_output_buffers(info)
    yield _check_clients(info)
    yield _check_rejected(info)
    yield _check_idle(info)
    yield _check_keepalive(info)
    yield from _check_fragmentation(info)


def _check_version(info: ServerInfo) -> Check:
    if not info.version:
        return unknown_check("version", "the server's version is unknown", info, "INFO")
    if info.version[:2] < MIN_SERVER_VERSION:
        wanted = ".".join(map(str, MIN_SERVER_VERSION))
        return Check("version", "critical", f"{info.name} is too old: rlbroker needs {wanted} or newer")
    lacks = []
    if info.version < (7, 0):
        lacks.append("read-only ACL rules for keys (an observer needs '~rlb:*')")
    if info.version < (7, 2):
        lacks.append("WAITAOF (level='fsync' is refused)")
    return Check("version", "ok", f"{info.name}{', without ' + ' and '.join(lacks) if lacks else ''}")


def _check_role(info: ServerInfo) -> Check:
    if info.fields.get("cluster_enabled") == "1":
        what = "this is a node of a cluster: a run works only through the node that holds its keys"
        return Check("replication", "warning", what, "redis-cli CLUSTER NODES")
    if info.role == "replica":
        host, port = info.fields.get("master_host", ""), info.fields.get("master_port", "6379")
        master = f" of {host}:{port}" if host else ""
        hint = f"rlbroker doctor --url redis://{host}:{port}" if host else "redis-cli ROLE"
        what = f"this server is a replica{master}: it accepts no writes; use its master"
        return Check("replication", "critical", what, hint)
    replicas = info.number("connected_slaves")
    if not info.role or replicas is None:
        return unknown_check("replication", "its role and replicas are unknown", info, "INFO")
    if not replicas:
        return Check("replication", "ok", "no replicas: level='replica' is never confirmed")
    what = f"{counted(replicas, 'replica')} for level='replica'"
    return Check("replication", "ok", what)


def _check_policy(info: ServerInfo) -> Check:
    policy = info.fields.get("maxmemory_policy") or info.settings.get("maxmemory-policy")
    if not policy:
        return unknown_check("eviction", "what it deletes when memory is short is unknown", info, "INFO")
    if policy == "noeviction":
        return Check("eviction", "ok", "maxmemory-policy noeviction: nothing is deleted when memory is short")
    lost = "weights and experiences" if policy.startswith("allkeys") else "heartbeats and weights"
    what = f"maxmemory-policy {policy}: it deletes {lost} when memory is short"
    return Check("eviction", "critical", what, "redis-cli CONFIG SET maxmemory-policy noeviction")


def _check_memory(info: ServerInfo) -> Check:
    used, limit = info.number("used_memory"), info.number("maxmemory")
    machine = info.number("total_system_memory")
    if used is None or limit is None:
        return unknown_check("memory", "its memory use and limit are unknown", info, "INFO")
    if limit:
        share, what = used / limit, f"{format_bytes(used)} of maxmemory {format_bytes(limit)} are used"
        if share < MEMORY_SHARE:
            return Check("memory", "ok", what)
        state: State = "critical" if share >= FULL_SHARE else "warning"
        roomy = machine is None or 2 * limit < MEMORY_SHARE * machine
        hint = f"redis-cli CONFIG SET maxmemory {2 * limit}" if roomy else "rlbroker prune --dry-run"
        return Check("memory", state, f"{what} ({share:.0%}); a full server refuses writes", hint)
    what = f"{format_bytes(used)} are used, without a maxmemory"
    if machine and used > MACHINE_SHARE * machine:
        what += f", on a machine of {format_bytes(machine)}: when that is full, the system kills the server"
        return Check(
            "memory", "warning", what, f"redis-cli CONFIG SET maxmemory {int(MEMORY_SHARE * machine)}"
        )
    return Check("memory", "ok", what)


def _check_evicted(info: ServerInfo) -> Check:
    evicted = info.number("evicted_keys")
    if evicted is None:
        what = "whether it deleted keys because memory was short is unknown"
        return unknown_check("evicted", what, info, "INFO")
    if not evicted:
        return Check("evicted", "ok", "no keys were deleted because memory was short")
    policy = info.fields.get("maxmemory_policy", "noeviction")
    repair = "CONFIG RESETSTAT" if policy == "noeviction" else "CONFIG SET maxmemory-policy noeviction"
    what = (
        f"{counted(evicted, 'key was', 'keys were')} deleted because memory was short since the server started: "
        "weights or experiences may be lost (CONFIG RESETSTAT resets the count)"
    )
    return Check("evicted", "critical", what, f"redis-cli {repair}")


def _check_persistence(info: ServerInfo) -> Check:
    aof = info.fields.get("aof_enabled")
    if aof is None:
        return unknown_check("persistence", "what survives a restart is unknown", info, "INFO")
    for name, task, command in (
        ("aof_last_write_status", "writing its append-only file", "BGREWRITEAOF"),
        ("aof_last_bgrewrite_status", "rewriting its append-only file", "BGREWRITEAOF"),
        ("rdb_last_bgsave_status", "saving a snapshot", "BGSAVE"),
    ):
        if info.fields.get(name, "ok") != "ok":
            what = f"{task} failed the last time: the disk may be full, and the server may refuse writes ({name})"
            return Check("persistence", "critical", what, f"redis-cli {command}")
    if is_temporary_directory(info.settings.get("dir", "")):
        what = (
            "an embedded server without --directory: when it stops, its data is deleted, whatever its settings; "
            "restart it with --directory DIR, which begins without this data"
        )
        return Check("persistence", "warning", what, "rlbroker server --directory DIR")
    fsync = "level='fsync' loses nothing" if info.version >= (7, 2) else "level='fsync' needs Redis 7.2"
    if aof == "1":
        policy = info.settings.get("appendfsync", "everysec")
        guarantee = {
            "always": "what level='redis' confirmed is on disk",
            "no": f"a crash of the machine loses what the system had not written to disk; {fsync}",
        }.get(policy, f"a crash loses about a second of what level='redis' confirmed; {fsync}")
        return Check("persistence", "ok", f"append-only file, appendfsync {policy}: {guarantee}")
    snapshots = info.settings.get("save")
    if snapshots is None:
        what = "there is no append-only file; whether it saves snapshots is unknown"
        return unknown_check("persistence", what, info, "CONFIG GET")
    if snapshots:
        what = (
            f"snapshots only (save {snapshots}): a crash loses everything after the last one, also what level='redis' "
            "confirmed; level='learner' loses nothing"
        )
        return Check("persistence", "ok", what)
    what = (
        "nothing survives a restart: level='redis' and 'fsync' lose what they confirmed, 'replica' too unless a "
        "replica takes over, 'learner' loses nothing; the learner publishes its weights again"
    )
    return Check("persistence", "warning", what, "redis-cli CONFIG SET appendonly yes")


def _check_bulk(info: ServerInfo) -> Check:
    limit = info.number("proto-max-bulk-len")
    if limit is None:
        return unknown_check("bulk", "the size limit of a value is unknown", info, "CONFIG GET")
    if limit < CHUNK_BYTES:
        what = f"proto-max-bulk-len {format_bytes(limit)}: chunks of weights take up to {format_bytes(CHUNK_BYTES)}"
        return Check("bulk", "critical", what, "redis-cli CONFIG SET proto-max-bulk-len 512mb")
    return Check("bulk", "ok", f"a value may have up to {format_bytes(limit)}")


def _check_output_buffers(info: ServerInfo) -> Check:
    words = info.settings.get("client-output-buffer-limit", "").split()
    if not words:
        return unknown_check("buffers", "the output buffer limits are unknown", info, "CONFIG GET")
    hard = {kind: whole_number(limit) or 0 for kind, limit in zip(words[::4], words[1::4], strict=False)}
    if 0 < hard.get("normal", 0) < READER_BYTES:
        what = (
            f"it closes readers with more than {format_bytes(hard['normal'])} in their output buffer: one read of "
            "batches can be larger"
        )
        return Check(
            "buffers", "warning", what, 'redis-cli CONFIG SET client-output-buffer-limit "normal 0 0 0"'
        )
    pubsub = hard.get("pubsub", 0)
    if 0 < pubsub < 1 << 16:
        what = (
            f"it closes subscribers with more than {format_bytes(pubsub)} in their output buffer: workers learn of "
            "versions later"
        )
        return Check(
            "buffers",
            "warning",
            what,
            'redis-cli CONFIG SET client-output-buffer-limit "pubsub 33554432 8388608 60"',
        )
    what = f"subscribers may have {format_bytes(pubsub) if pubsub else 'any amount'} in their output buffer"
    return Check("buffers", "ok", what)


def _check_clients(info: ServerInfo) -> Check:
    connected, limit = info.number("connected_clients"), info.number("maxclients")
    if connected is None or limit is None:
        return unknown_check("clients", "the number of clients and its limit are unknown", info, "INFO")
    blocked = info.number("blocked_clients") or 0
    what = f"{connected:,} of {counted(limit, 'client')} connected, {blocked:,} in a blocking read"
    if connected > CLIENTS_SHARE * limit:
        return Check("clients", "warning", what, f"redis-cli CONFIG SET maxclients {2 * limit}")
    return Check("clients", "ok", what)


def _check_rejected(info: ServerInfo) -> Check:
    rejected = info.number("rejected_connections")
    if rejected is None:
        return unknown_check("rejected", "whether it refused connections is unknown", info, "INFO")
    if not rejected:
        return Check("rejected", "ok", "no connections were refused")
    limit = info.number("maxclients") or 0
    refused = counted(rejected, "connection was", "connections were")
    what = f"{refused} refused since the server started, because maxclients was reached"
    return Check("rejected", "warning", what, f"redis-cli CONFIG SET maxclients {2 * limit or 20_000}")


def _check_idle(info: ServerInfo) -> Check:
    seconds = info.number("timeout")
    if seconds is None:
        return unknown_check("idle", "its timeout for idle clients is unknown", info, "CONFIG GET")
    if 0 < seconds < IDLE_SECONDS:
        what = f"it closes clients that are idle for {seconds} s; rlbroker reconnects, which costs time and is logged"
        return Check("idle", "warning", what, "redis-cli CONFIG SET timeout 0")
    if seconds:
        what = f"it closes clients that are idle for {seconds:,} s; rlbroker reconnects"
        return Check("idle", "ok", what)
    return Check("idle", "ok", "idle clients are never closed")


def _check_keepalive(info: ServerInfo) -> Check:
    seconds = info.number("tcp-keepalive")
    if seconds is None:
        return unknown_check("keepalive", "its tcp-keepalive is unknown", info, "CONFIG GET")
    if not seconds:
        what = "tcp-keepalive 0: connections of dead machines stay open for ever, and count as clients"
        return Check("keepalive", "warning", what, "redis-cli CONFIG SET tcp-keepalive 300")
    return Check("keepalive", "ok", f"silent connections are probed after {seconds:,} s")


def _check_fragmentation(info: ServerInfo) -> Iterator[Check]:
    used = info.number("used_memory") or 0
    try:
        ratio = float(info.fields.get("mem_fragmentation_ratio", "0"))
    except ValueError:
        return
    if used > FRAGMENTED_BYTES and ratio > FRAGMENTED:
        what = f"it takes {ratio:.1f} times the memory that its data need from the system"
        yield Check("fragmentation", "warning", what, "redis-cli MEMORY PURGE")


def check_rights(connection: Connection, info: ServerInfo, run: str | None) -> Check:
    """Check the rights of this user for reading a run, by trying each command on its keys."""
    keys = Keys(run or _ANY_RUN)
    stream, retry_stream = keys.experiences(0), keys.again(0)
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
        ("XPENDING", retry_stream, GROUP),
        ("XINFO", "STREAM", retry_stream),
        ("XINFO", "GROUPS", retry_stream),
        ("XINFO", "CONSUMERS", retry_stream, GROUP),
        ("MEMORY", "USAGE", keys.heartbeat(0)),
    ]
    missing_rules = {
        reply.rule: None
        for reply in connection.execute_all(commands, strict=False)
        if isinstance(reply, AccessDenied)
    }
    user = f"the user {info.user!r}"
    if not missing_rules:
        return Check("rights", "ok", f"{user} has all rights for reading a run")
    rules = [rule for rule in missing_rules if rule]
    if info.version[:1] == (6,):
        rules = [rule.replace("%R~", "~") for rule in rules]
    what = f"{user} lacks rights for reading a run: {' '.join(rules)}"
    return Check("rights", "warning", what, grant_command(info.user, *rules))
