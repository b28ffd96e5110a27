"""The checks of one run: its queues, their limits, and its findings."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from typing import Any, Final

from rlbroker.backend.connection import Connection
from rlbroker.backend.keys import GROUP
from rlbroker.backend.replies import text_fields
from rlbroker.backend.text import counted
from rlbroker.errors import PeerError
from rlbroker.ops.doctor.checks import Check, unknown_check, unreadable_check
from rlbroker.ops.doctor.server_info import ServerInfo
from rlbroker.ops.formatting import format_bytes
from rlbroker.ops.inspect.findings import list_findings
from rlbroker.ops.inspect.runs import read_keys
from rlbroker.ops.inspect.snapshot import Snapshot, take_snapshot

#: A learner with pending batches is reported if it has not read the queue for this time.
IDLE_SECONDS: Final = 60.0

#: Findings that the checks of the server already report.
_SERVER_FINDINGS: Final = ("server_evicts", "server_full")


def check_run(connection: Connection, info: ServerInfo, run: str) -> tuple[list[Check], Snapshot | None]:
    """Check a run; return its snapshot too, if it could be read."""
    try:
        snapshot = take_snapshot(connection, run)
    except PeerError as error:
        return [unreadable_check("run", f"the run {run!r} cannot be read", error)], None
    checks = [*_check_queues(connection, snapshot), *_check_limits(info, snapshot)]
    findings = [finding for finding in list_findings(snapshot) if finding.code not in _SERVER_FINDINGS]
    checks += [Check(finding.code, finding.severity, finding.what, finding.hint) for finding in findings]
    if not findings:
        checks.append(Check("run", "ok", f"nothing is wrong with the run {run!r} itself"))
    return checks, snapshot


def _check_queues(connection: Connection, snapshot: Snapshot) -> Iterator[Check]:
    """Check that each queue has the learners' group, and that no idle learner has pending batches in it."""
    keys = read_keys(connection, snapshot.run)
    streams = {
        worker: keys.experiences(worker) for worker, status in snapshot.workers.items() if status.counts
    }
    exists = connection.execute_all([("EXISTS", key) for key in streams.values()], strict=False)
    existing = {
        worker: key for (worker, key), reply in zip(streams.items(), exists, strict=True) if reply == 1
    }
    groups_replies = connection.execute_all(
        [("XINFO", "GROUPS", key) for key in existing.values()], strict=False
    )
    consumers_replies = connection.execute_all(
        [("XINFO", "CONSUMERS", key, GROUP) for key in existing.values()], strict=False
    )
    ok = True
    for (worker, key), groups, consumers in zip(
        existing.items(), groups_replies, consumers_replies, strict=True
    ):
        if isinstance(groups, PeerError):
            yield unreadable_check("queues", f"the queue of worker {worker} cannot be read", groups)
            return
        if GROUP not in [group["name"] for group in map(text_fields, groups)]:
            ok = False
            what = f"the queue of worker {worker} has no group {GROUP!r}: no learner gets its batches"
            yield Check(
                "group_missing", "critical", what, f"redis-cli XGROUP CREATE {shlex.quote(key)} {GROUP} 0"
            )
        elif not isinstance(consumers, PeerError) and _has_learner(snapshot):
            for name, pending, idle_seconds in _find_idle_learners(consumers):
                ok = False
                batches = counted(pending, f"batch of worker {worker} is", f"batches of worker {worker} are")
                what = (
                    f"{batches} pending at the learner {name!r}, which has not read this queue for "
                    f"{idle_seconds:,.0f} s; another learner takes over, or this one after a restart"
                )
                yield Check("holder_idle", "warning", what, f"rlbroker workers {worker}")
    if ok:
        counts = [status.counts for status in snapshot.workers.values() if status.counts]
        waiting, in_hand = (sum(getattr(one, name) for one in counts) for name in ("waiting", "in_hand"))
        most = max((one.waiting for one in counts), default=0)
        where = f"{counted(len(existing), 'queue')}, {most:,} at most in one; {in_hand:,} pending"
        what = f"{counted(waiting, 'batch waits', 'batches wait')} in {where}"
        yield Check("queues", "ok", what)


def _has_learner(snapshot: Snapshot) -> bool:
    return snapshot.learner is not None and snapshot.learner.state != "ended"


def _find_idle_learners(consumers: Any) -> Iterator[tuple[str, int, float]]:
    """Yield each idle learner with pending batches: its name, the number of batches, and its idle time in seconds."""
    for consumer in map(text_fields, consumers):
        pending, idle_seconds = int(consumer["pending"]), int(consumer["idle"]) / 1000
        if pending and idle_seconds > IDLE_SECONDS:
            yield consumer["name"], pending, idle_seconds


def _check_limits(info: ServerInfo, snapshot: Snapshot) -> Iterator[Check]:
    """Compare the limits of the run with those of the server."""
    queue_bytes = snapshot.settings.max_queue_bytes
    value_limit = info.number("proto-max-bulk-len")
    if value_limit is not None and value_limit < queue_bytes:
        what = (
            f"max_queue_bytes allows a batch of {format_bytes(queue_bytes)}, but the server accepts values of "
            f"{format_bytes(value_limit)}"
        )
        yield Check("batch_bytes", "warning", what, f"redis-cli CONFIG SET proto-max-bulk-len {queue_bytes}")
    workers = max(len(snapshot.members), snapshot.expected_workers)
    # While an older version expires, two full versions and their deltas exist.
    weights_bytes = 4 * snapshot.manifest.stored_bytes if snapshot.manifest else 0
    needed = workers * queue_bytes + weights_bytes
    room = info.number("maxmemory") or info.number("total_system_memory")
    what = f"full queues of {counted(workers, 'worker')} and the weights need {format_bytes(needed)}"
    if room is None:
        yield unknown_check("room", f"{what}; the server's memory is unknown", info, "INFO")
    elif needed > room:
        limit = info.number("maxmemory")
        machine = info.number("total_system_memory") or 0
        hint = (
            f"redis-cli CONFIG SET maxmemory {needed}" if limit and needed < machine else "rlbroker workers"
        )
        what = (
            f"{what}, but the server has {format_bytes(room)}: a learner that stops collecting fills it; lower "
            "max_queue_bytes"
        )
        yield Check("room", "warning", what, hint)
    else:
        yield Check("room", "ok", f"{what} of {format_bytes(room)}")
