"""The findings: what is wrong with a run, a command that shows more or repairs it, and what to do about it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any, Final, Literal

from rlbroker.backend.keys import Keys
from rlbroker.backend.text import age, counted
from rlbroker.ops.inspect.liveness import LearnerStatus
from rlbroker.ops.inspect.snapshot import Snapshot, WorkerStatus
from rlbroker.types import WorkerInfo

Severity = Literal["warning", "critical"]

#: The number of updates in a row that skipped a version, from which it is a finding.
SKIPS_IN_A_ROW: Final = 10

#: Age from which an unanswered command is a finding.
UNANSWERED_SECONDS: Final = 30.0

#: Time since the last call of `poll` from which it is mentioned: the worker is busy or stuck.
UNPOLLED_SECONDS: Final = 10.0

#: Workers that continue after the learner has ended are a finding after this time, and after a lease.
ENDED_SECONDS: Final = 10.0

#: The share of the server's memory limit from which its use is a finding.
MEMORY_SHARE: Final = 0.9

#: How many findings of one code are shown separately.
SHOWN_OF_A_CODE: Final = 3

#: How long a fenced process remains a finding.
FENCED_SECONDS: Final = 600.0

#: Reasons of losses that are findings. The others are wanted by a setting, or are findings as dead letters.
_UNWANTED_LOSSES: Final = ("vanished", "trimmed", "fenced")


@dataclass(frozen=True)
class FindingLimits:
    """The limits from which something is a finding.

    Attributes:
        staleness: a worker is this many versions behind, or more.
        waiting_share: a queue is full to this share, or more.
        min_workers: fewer workers are alive than this; None for the number that the learner expects.
    """

    staleness: int = 10
    waiting_share: float = 0.9
    min_workers: int | None = None


@dataclass(frozen=True)
class Finding:
    """A problem of a run.

    Attributes:
        severity: `critical` if the run cannot continue, or data is at risk.
        code: one word for programs, such as `worker_behind`.
        worker: the worker; None for the learner, the server or the run.
        what: one sentence for people.
        hint: a command, `rlbroker …` or `redis-cli …`, that shows more or repairs it, without --url and --run.
    """

    severity: Severity
    code: str
    worker: int | None
    what: str
    hint: str

    @property
    def advice(self) -> str:
        """What to do about it."""
        return ADVICE[self.code]

    def to_json(self) -> dict[str, Any]:
        """Return the fields and `advice` as values for JSON."""
        return asdict(self) | {"advice": self.advice}


#: What to do, by the code of a finding.
ADVICE: Final = {
    "server_evicts": "Set maxmemory-policy to noeviction: a full server then refuses writes, and rlbroker waits for "
    "room.",
    "server_full": "Raise maxmemory, lower max_queue_bytes or max_queue_size, or delete runs that are over: "
    "`rlbroker prune --dry-run` lists them.",
    "learner_missing": "Start the learner with this run name and server. If it is running, the workers have a "
    "mistyped run name.",
    "learner_away": "Start it again: it continues the run. Its process and log say why it is silent. Until then queues "
    "fill, and workers do not stop. If it will not come back, end the run: `rlbroker control send stop --force`.",
    "learner_ended": "A worker stops when its loop looks at `running`: check whether it hangs in your code. To go on "
    "with the run, start its learner again, and then the workers.",
    "run_ended": "Start the learner again, which opens the run, and then the workers. The command here opens it "
    "for a learner that goes on: start its workers again.",
    "no_weights": "Call send_model_weights before the first collect_experiences.",
    "too_few_workers": "Start the missing workers, or lower num_workers. If they are running, look for a mistyped run "
    "name with `rlbroker runs`.",
    "worker_away": "Check its process and log, and start it again with the same id. Its queue is kept.",
    "worker_behind": "It loads weights only in poll: call poll between shorter rollouts. If it has not polled for "
    "long, it hangs in your code, or waits for room in its queue: check its process.",
    "worker_skips": "This is normal if the learner publishes faster than a rollout takes. For on-policy training "
    "publish less often, or shorten the rollouts.",
    "worker_cannot_load": "Its model differs from the learner's: the message names keys and shapes. Start it again "
    "with the learner's code.",
    "worker_unconfirmed": "It continues once its batch is as safe as its level promises. With one replica for each "
    "master, this happens after each failover until the old master is back: run two replicas.",
    "worker_fenced": "Two processes were started with one worker_id, and only the newer one counts. Give each its "
    "own, or omit worker_id.",
    "updates_failed": "The record has the reason. If the worker runs a newer version now, it has recovered.",
    "signatures_refused": "Another client writes to the server in the learner's place; or the learner, or the sender "
    "of the command, has no signing key or a different one. The record says which.",
    "commands_unanswered": "Workers answer in poll: this one does not call it, or waits for room in its queue.",
    "queue_full": "The learner is the bottleneck: let it collect more batches at once, use fewer workers, or set "
    "when_full='drop_oldest' if old batches are worth little.",
    "batches_lost": "vanished: the server lost them (a restart without its data, or deleted keys); trimmed: another "
    "client trimmed the stream; fenced: a replaced process sent them.",
    "dead_letters": "corrupt: they do not decode; poison: learners died while they held them. Find out why, then "
    "retry or purge them.",
    "keys_spoiled": "The worker wrote it, or another program did: find out which. The learner deletes such queues, "
    "acknowledgements and incarnations; delete other keys with DEL.",
    "too_many_missed": "See which workers missed them, and why.",
}


#: Codes of the findings that explain why workers wait, or fill their queues.
LEARNER_GONE: Final = ("learner_missing", "learner_away", "learner_ended")


def list_findings(snapshot: Snapshot, limits: FindingLimits | None = None) -> list[Finding]:
    """Return what is wrong, critical findings first."""
    limits = limits or FindingLimits()
    findings = [
        *_server_findings(snapshot),
        *_learner_findings(snapshot),
        *_membership_findings(snapshot, limits),
    ]
    for worker, status in snapshot.workers.items():
        findings += _worker_findings(snapshot, worker, status, limits)
    return sorted(findings, key=lambda finding: finding.severity != "critical")


def group_findings(findings: Iterable[Finding]) -> list[tuple[Finding, list[int]]]:
    """Return the findings to show, each with the other workers that have the same, to keep the list short.

    >>> findings = [Finding("warning", "queue_full", worker, f"{worker} is full", "") for worker in range(9)]
    >>> [(finding.what, workers) for finding, workers in group_findings(findings)]
    [('0 is full', []), ('1 is full', []), ('2 is full', [3, 4, 5, 6, 7, 8])]
    """
    shown: list[tuple[Finding, list[int]]] = []
    by_code: dict[str, list[tuple[Finding, list[int]]]] = {}
    for finding in findings:
        same = by_code.setdefault(finding.code, [])
        if len(same) < SHOWN_OF_A_CODE or finding.worker is None:
            same.append((finding, []))
            shown.append(same[-1])
        else:
            same[-1][1].append(finding.worker)
    return shown


def _server_findings(snapshot: Snapshot) -> Iterator[Finding]:
    server = snapshot.server
    policy = server.maxmemory_policy
    if policy not in ("", "noeviction"):
        evicted = "weights and experiences" if policy.startswith("allkeys") else "heartbeats and weights"
        what = (
            f"{server.evicting_node or 'the server'} has maxmemory-policy {policy}: it deletes {evicted} when memory "
            "is short"
        )
        yield Finding(
            "critical", "server_evicts", None, what, "redis-cli CONFIG SET maxmemory-policy noeviction"
        )
    if (
        server.used_bytes
        and server.maxmemory_bytes
        and server.used_bytes > MEMORY_SHARE * server.maxmemory_bytes
    ):
        share = server.used_bytes / server.maxmemory_bytes
        what = f"{server.node or 'the server'} uses {share:.0%} of its maxmemory; at 100 % it refuses writes"
        yield Finding("warning", "server_full", None, what, "rlbroker doctor")


def _learner_findings(snapshot: Snapshot) -> Iterator[Finding]:
    learner = snapshot.learner
    if learner is None:
        what = "no learner has opened the run yet; its workers wait"
        yield Finding("warning", "learner_missing", None, what, "rlbroker runs")
    elif learner.state == "away":
        seen = "never seen" if learner.last_seen_seconds is None else _last_seen(learner.last_seen_seconds)
        what = (
            f"the learner ({learner.host} pid {learner.pid}) is away: {seen}; start it again, or end the run if it "
            "will not come back"
        )
        yield Finding("critical", "learner_away", None, what, "rlbroker control send stop --force")
    elif learner.state == "ended":
        yield from _ended_findings(snapshot, learner)
    elif learner.run_ended:
        what = (
            f"a command has ended the run while its learner ({learner.host} pid {learner.pid}) goes on: its workers "
            "stop, also those that join later"
        )
        key = Keys(snapshot.run).meta
        yield Finding("critical", "run_ended", None, what, f"redis-cli HDEL '{key}' ended ended_by")
    elif learner.state == "alive" and snapshot.manifest is None and snapshot.members:
        what = "the learner has not published any weights yet; workers wait in load_weights"
        yield Finding("warning", "no_weights", None, what, "rlbroker weights list")


def _ended_findings(snapshot: Snapshot, learner: LearnerStatus) -> Iterator[Finding]:
    """Yield a finding for workers that continue after the learner has ended, once they have had time to notice."""
    alive = snapshot.alive
    silent_seconds = learner.last_seen_seconds
    just_ended = silent_seconds is not None and silent_seconds <= max(
        ENDED_SECONDS, snapshot.settings.lease_seconds
    )
    if alive and not learner.others and not just_ended:
        when = "never" if silent_seconds is None else f"{age(silent_seconds)} ago"
        what = (
            f"the run has ended, its learner ({learner.host} pid {learner.pid}) was last seen {when}, and "
            f"{counted(alive, 'worker has', 'workers have')} not stopped: no learner collects the batches"
        )
        yield Finding("warning", "learner_ended", None, what, "rlbroker workers")


def _membership_findings(snapshot: Snapshot, limits: FindingLimits) -> Iterator[Finding]:
    if snapshot.learner is None or snapshot.learner.state == "ended":
        return
    alive = snapshot.alive
    wanted = snapshot.expected_workers if limits.min_workers is None else limits.min_workers
    if alive < wanted:
        severity: Severity = "warning" if alive else "critical"
        expected = "expected" if limits.min_workers is None else "required"
        what = (
            f"{counted(alive, 'worker is', 'workers are')} alive; {counted(wanted, 'is', 'are')} {expected}"
        )
        # Without any worker there is no roster to look at; `runs` shows workers that use another name.
        hint = "rlbroker workers" if snapshot.workers else "rlbroker runs"
        yield Finding(severity, "too_few_workers", None, what, hint)


def _worker_findings(
    snapshot: Snapshot, worker: int, status: WorkerStatus, limits: FindingLimits
) -> Iterator[Finding]:
    info, missed = status.info, status.missed
    if info is not None:
        yield from _member_findings(snapshot, info, limits)
    if status.dead_letters:
        kept = "is kept as a dead letter" if status.dead_letters == 1 else "are kept as dead letters"
        what = f"{counted(status.dead_letters, 'batch', 'batches')} of worker {worker} could not be used and {kept}"
        yield Finding("warning", "dead_letters", worker, what, f"rlbroker dead list --worker {worker}")
    if status.spoiled:
        what = (
            f"{' and '.join(status.spoiled)} of worker {worker} {'is' if len(status.spoiled) == 1 else 'are'} not "
            "what rlbroker writes there"
        )
        yield Finding("warning", "keys_spoiled", worker, what, f"redis-cli TYPE '{status.spoiled[0]}'")
    yield from _queue_findings(snapshot, worker, status, limits)
    failed = missed.by_reason.get("failed", 0)
    if failed:
        what = f"worker {worker} could not load {counted(failed, 'version')}"
        yield Finding(
            "warning", "updates_failed", worker, what, f"rlbroker missed --worker {worker} --why failed"
        )
    if missed.refused:
        what = (
            f"worker {worker} refused {counted(missed.refused, 'version or command', 'versions or commands')} that "
            "the learner did not sign"
        )
        yield Finding(
            "warning", "signatures_refused", worker, what, f"rlbroker missed --worker {worker} --why refused"
        )
    if status.command_seconds >= UNANSWERED_SECONDS:
        what = (
            f"worker {worker} has not answered {counted(status.commands_waiting, 'command')}, the oldest "
            f"for {age(status.command_seconds)}"
        )
        yield Finding("warning", "commands_unanswered", worker, what, "rlbroker control list")


def _queue_findings(
    snapshot: Snapshot, worker: int, status: WorkerStatus, limits: FindingLimits
) -> Iterator[Finding]:
    counts = status.counts
    if counts is None:
        return
    unwanted = {why: count for why, count in counts.lost.items() if why in _UNWANTED_LOSSES}
    if unwanted:
        reasons = ", ".join(f"{count:,} {why}" for why, count in unwanted.items())
        what = (
            f"{counted(sum(unwanted.values()), 'batch', 'batches')} of worker {worker} did not reach the learner: "
            f"{reasons}"
        )
        yield Finding("warning", "batches_lost", worker, what, f"rlbroker workers {worker}")
    learner = snapshot.learner
    collects = learner is not None and (learner.state == "alive" or learner.others > 0)
    if collects and counts.waiting >= limits.waiting_share * snapshot.settings.max_queue_size:
        what = (
            f"the queue of worker {worker} is {counts.waiting / snapshot.settings.max_queue_size:.0%} full: the "
            "learner collects more slowly than the worker sends"
        )
        yield Finding("warning", "queue_full", worker, what, "rlbroker top")


def _member_findings(snapshot: Snapshot, info: WorkerInfo, limits: FindingLimits) -> Iterator[Finding]:
    worker, details = info.worker_id, f"rlbroker workers {info.worker_id}"
    away = info.state == "away"
    if away:
        process = f" ({info.host} pid {info.pid})" if info.host else ""  # its heartbeat may have expired
        seen = _last_seen(info.last_seen_seconds)
        what = f"worker {worker}{process} is away: {seen}; it died, or lost its connection"
        yield Finding("warning", "worker_away", worker, what, details)
    if info.problem:
        what = f"worker {worker} cannot load the newest weights: {info.problem}"
        yield Finding("critical", "worker_cannot_load", worker, what, details)
    if info.unconfirmed and not away:
        what = f"worker {worker} waits: {info.unconfirmed}"
        yield Finding("warning", "worker_unconfirmed", worker, what, "rlbroker doctor")
    just_joined = not info.version and info.unpolled_seconds < UNPOLLED_SECONDS
    explained = away or just_joined or info.problem or info.unconfirmed
    skips_in_a_row = snapshot.workers[worker].missed.skips_in_a_row
    if info.staleness >= limits.staleness and not explained:
        runs = f"{info.version:,}" if info.version else "none"
        what = (
            f"worker {worker} is {counted(info.staleness, 'version')} behind: it runs {runs} of {snapshot.version:,}"
            f"{_unpolled(info)}"
        )
        yield Finding("warning", "worker_behind", worker, what, details)
    elif not away and skips_in_a_row >= SKIPS_IN_A_ROW:
        what = (
            f"worker {worker} skipped versions in each of its last {skips_in_a_row:,} updates: it polls less often "
            "than the learner publishes"
        )
        yield Finding("warning", "worker_skips", worker, what, f"rlbroker missed --worker {worker}")
    if info.fenced_seconds is not None and info.fenced_seconds < FENCED_SECONDS:
        what = (
            f"another process ({info.fenced_process}) with the id of worker {worker} was fenced "
            f"{age(info.fenced_seconds)} ago"
        )
        yield Finding("warning", "worker_fenced", worker, what, details)


def _unpolled(info: WorkerInfo) -> str:
    if info.state != "alive" or info.unpolled_seconds < UNPOLLED_SECONDS:
        return ""
    return f", and has not called poll for {age(info.unpolled_seconds)}"


def _last_seen(seconds: float) -> str:
    return f"last seen {age(seconds)} ago"
