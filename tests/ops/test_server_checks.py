"""The checks of one server: each fault is reported with a repair, and unknown values are never guessed."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import fakeredis
import pytest

from rlbroker.backend.connection import Connection
from rlbroker.ops import doctor
from rlbroker.ops.doctor.checks import Check
from rlbroker.ops.doctor.diagnosis import diagnose
from rlbroker.ops.doctor.server_checks import check_clock, check_latency, check_server
from rlbroker.ops.doctor.server_info import Latency, ServerInfo

pytestmark = pytest.mark.unit

PAGE = Path(__file__).parents[2] / "docs" / "commands.md"

INFO = {
    "redis_version": "7.2.4",
    "role": "master",
    "connected_slaves": "1",
    "maxmemory_policy": "noeviction",
    "maxmemory": "1000000000",
    "used_memory": "1000000",
    "total_system_memory": "8000000000",
    "evicted_keys": "0",
    "rejected_connections": "0",
    "connected_clients": "5",
    "blocked_clients": "1",
    "maxclients": "10000",
    "aof_enabled": "1",
    "aof_last_write_status": "ok",
    "rdb_last_bgsave_status": "ok",
    "mem_fragmentation_ratio": "1.1",
}
SETTINGS = {
    "appendfsync": "everysec",
    "save": "",
    "timeout": "0",
    "tcp-keepalive": "300",
    "proto-max-bulk-len": "536870912",
    "client-output-buffer-limit": "normal 0 0 0 slave 268435456 67108864 60 pubsub 33554432 8388608 60",
}


def server_info(version: tuple[int, ...] = (7, 2, 4), role: str = "master", **changes: Any) -> ServerInfo:
    settings = {name.replace("_", "-"): text for name, text in changes.items()}
    return ServerInfo(
        "me", f"Redis {version}", version, role, INFO | changes, SETTINGS | settings, missing={}
    )


def checks_by_code(info: ServerInfo) -> dict[str, Check]:
    return {check.code: check for check in check_server(info)}


def test_a_healthy_server_has_no_hints() -> None:
    checks = list(check_server(server_info()))
    assert {check.state for check in checks} == {"ok"}
    assert not any(check.hint for check in checks)


@pytest.mark.parametrize(
    ("changes", "code", "state", "what", "hint"),
    [
        ({"version": (6, 0, 9)}, "version", "critical", "too old: rlbroker needs 6.2", ""),
        ({"version": (6, 2, 14)}, "version", "ok", "without read-only ACL rules .* and WAITAOF", ""),
        ({"version": (7, 0, 15)}, "version", "ok", "without WAITAOF", ""),
        (
            {"role": "replica", "master_host": "10.0.0.1", "master_port": "6380"},
            "replication",
            "critical",
            "a replica of 10.0.0.1:6380",
            "rlbroker doctor --url redis://10.0.0.1:6380",
        ),
        ({"connected_slaves": "0"}, "replication", "ok", "level='replica' is never confirmed", ""),
        ({"cluster_enabled": "1"}, "replication", "warning", "a node of a cluster", "CLUSTER NODES"),
        (
            {"maxmemory_policy": "allkeys-lru"},
            "eviction",
            "critical",
            "weights and experiences",
            "noeviction",
        ),
        (
            {"maxmemory_policy": "volatile-ttl"},
            "eviction",
            "critical",
            "heartbeats and weights",
            "noeviction",
        ),
        ({"used_memory": "950000000"}, "memory", "warning", "95%", "CONFIG SET maxmemory 2000000000"),
        ({"used_memory": "999000000"}, "memory", "critical", "100%", "CONFIG SET maxmemory 2000000000"),
        (
            {"used_memory": "950000000", "total_system_memory": "1200000000"},
            "memory",
            "warning",
            "950 MB of maxmemory 1 GB",
            "rlbroker prune --dry-run",
        ),
        ({"maxmemory": "0"}, "memory", "ok", "without a maxmemory", ""),
        (
            {"maxmemory": "0", "used_memory": "5000000000"},
            "memory",
            "warning",
            "a machine of 8 GB",
            "CONFIG SET maxmemory 7200000000",
        ),
        ({"evicted_keys": "7"}, "evicted", "critical", "7 keys were deleted", "CONFIG RESETSTAT"),
        ({"evicted_keys": "1"}, "evicted", "critical", "1 key was deleted", "CONFIG RESETSTAT"),
        (
            {"rejected_connections": "3"},
            "rejected",
            "warning",
            "3 connections",
            "CONFIG SET maxclients 20000",
        ),
        (
            {"connected_clients": "9000"},
            "clients",
            "warning",
            "9,000 of 10,000",
            "CONFIG SET maxclients 20000",
        ),
        (
            {"aof_enabled": "0"},
            "persistence",
            "warning",
            "nothing survives a restart",
            "CONFIG SET appendonly yes",
        ),
        ({"aof_enabled": "0", "save": "3600 1"}, "persistence", "ok", r"snapshots only \(save 3600 1\)", ""),
        ({"appendfsync": "always"}, "persistence", "ok", "level='redis' confirmed is on disk", ""),
        ({"version": (7, 0, 15)}, "persistence", "ok", "a second .*'fsync' needs Redis 7.2", ""),
        (
            {"aof_last_write_status": "err"},
            "persistence",
            "critical",
            "append-only file failed",
            "BGREWRITEAOF",
        ),
        (
            {"rdb_last_bgsave_status": "err"},
            "persistence",
            "critical",
            "a snapshot failed",
            "redis-cli BGSAVE",
        ),
        ({"proto_max_bulk_len": "1048576"}, "bulk", "critical", "1.05 MB", "proto-max-bulk-len 512mb"),
        (
            {"client_output_buffer_limit": "normal 1048576 0 0 pubsub 33554432 8388608 60"},
            "buffers",
            "warning",
            "closes readers with more than 1.05 MB",
            '"normal 0 0 0"',
        ),
        (
            {"client_output_buffer_limit": "normal 0 0 0 pubsub 1024 512 60"},
            "buffers",
            "warning",
            "closes subscribers",
            "pubsub",
        ),
        ({"timeout": "5"}, "idle", "warning", "idle for 5 s", "CONFIG SET timeout 0"),
        ({"timeout": "3600"}, "idle", "ok", "3,600 s", ""),
        (
            {"tcp_keepalive": "0"},
            "keepalive",
            "warning",
            "stay open for ever",
            "CONFIG SET tcp-keepalive 300",
        ),
        (
            {"mem_fragmentation_ratio": "4.2", "used_memory": "500000000"},
            "fragmentation",
            "warning",
            "4.2 times",
            "MEMORY PURGE",
        ),
    ],
)
def test_each_check_reports_its_values_and_a_repair(
    changes: dict[str, Any], code: str, state: str, what: str, hint: str
) -> None:
    check = checks_by_code(server_info(**changes))[code]
    assert check.state == state
    assert re.search(what, check.what), check.what
    assert hint in check.hint
    assert bool(check.hint) == bool(hint)


def test_a_value_that_the_server_does_not_report_is_unknown_and_not_a_fault() -> None:
    silent = ServerInfo("me", "", (), "", missing={"INFO": "+info", "CONFIG GET": ""})
    checks = checks_by_code(silent)
    assert {check.state for check in checks.values()} == {"unknown"}
    assert checks["memory"].hint == "redis-cli ACL SETUSER me +info"
    assert checks["idle"].hint == ""


def test_latency_is_checked_by_the_median_and_the_worst() -> None:
    assert check_latency(Latency(0.001, 0.01, 20, 0.0)).state == "ok"
    slow = check_latency(Latency(0.006, 0.01, 20, 0.0))
    assert (slow.state, slow.hint) == ("warning", "rlbroker bench")
    assert "6.00 ms, at worst 10.00 ms of 20" in slow.what
    assert check_latency(Latency(0.001, 0.06, 20, 0.0)).state == "warning"


def test_a_clock_difference_is_reported_in_both_directions() -> None:
    assert check_clock(Latency(0.001, 0.001, 20, -0.4), server_info()).state == "ok"
    assert "5.0 s ahead of" in check_clock(Latency(0.001, 0.001, 20, 5.0), server_info()).what
    behind = check_clock(Latency(0.001, 0.001, 20, -5.0), server_info())
    assert (behind.state, "5.0 s behind" in behind.what) == ("warning", True)
    assert check_clock(Latency(0.001, 0.001, 20, None), server_info()).state == "unknown"


def test_a_fake_server_has_unknown_values_and_no_faults() -> None:
    checks = diagnose(Connection(client=fakeredis.FakeRedis())).checks
    states = {check.code: check.state for check in checks}
    states.pop("latency")  # a busy machine may be slow
    assert set(states.values()) == {"ok", "unknown"}
    assert states["memory"] == states["persistence"] == states["bulk"] == "unknown"
    assert states["clock"] == "ok"
    assert not any(check.hint for check in checks if check.state == "unknown")


def test_each_check_is_documented() -> None:
    section = PAGE.read_text().partition("## rlbroker doctor")[2].partition("\n## ")[0]
    documented = set(re.findall(r"`(\w+)`", " ".join(re.findall(r"^\| (`.*?) \|", section, re.MULTILINE))))
    source = "".join(path.read_text() for path in Path(doctor.__file__).parent.glob("*_checks.py"))
    codes = set(re.findall(r'(?:Check|unknown_check|unreadable_check)\(\s*"(\w+)"', source))
    assert codes <= documented
    assert {"latency", "group_missing", "host_cache"} <= codes
