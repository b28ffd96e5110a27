"""What is wrong with a run, as one look at it shows, and what tells more or mends it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any, Final, Literal

from rlbroker.backend.text import age, counted
from rlbroker.ops.inspect.snapshot import LearnerStatus, Snapshot, WorkerStatus
from rlbroker.types import WorkerInfo

Severity = Literal["warning", "critical"]

#: Updates in a row that each jumped over a version, from which on a worker is said to skip persistently.
SKIPS_IN_A_ROW: Final = 10

#: A command that has had no answer for longer is spoken of.
UNANSWERED_SECONDS: Final = 30.0

#: A worker that has not called `poll` for longer is said to be busy, or stuck.
UNPOLLED_SECONDS: Final = 10.0

#: Workers that go on for longer than this after the learner has ended, and for longer than a lease, are spoken of.
ENDED_SECONDS: Final = 10.0

#: Share of the server's memory limit that is spoken of.
MEMORY_SHARE: Final = 0.9

#: Findings of one kind that are shown one by one.
SHOWN_OF_A_CODE: Final = 3

#: How long a process is spoken of whose place another one took.
FENCED_SECONDS: Final = 600.0

#: Reasons for which a batch is only lost if something went wrong; the others are what the settings ask for.
_UNWANTED_LOSSES: Final = ("vanished", "trimmed", "fenced")


@dataclass(frozen=True)
class FindingLimits:
    """From where on something is spoken of.

    Attributes:
        staleness: a worker that is so many versions behind, or more.
        waiting_share: a queue that is full to this share, or more.
        min_workers: fewer workers alive than this; None for as many as the learner expects.
    """

    staleness: int = 10
    waiting_share: float = 0.9
    min_workers: int | None = None


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong.

    Attributes:
        severity: `critical` if the run cannot go on like this, or data is at risk.
        code: one word for programs, such as `worker_behind`.
        worker: the worker that it is about; None for the learner, the server or the run.
        what: one sentence for people.
        hint: a command, `rlbroker …` or `redis-cli …`, that tells more or mends it; without the server's address.
    """

    severity: Severity
    code: str
    worker: int | None
    what: str
    hint: str

    @property
    def advice(self) -> str:
        """What a person can do about it."""
        return ADVICE[self.code]

    def to_json(self) -> dict[str, Any]:
        """Give the fields, and `advice`, as what JSON can hold."""
        return asdict(self) | {"advice": self.advice}


#: What to do, by the code of a finding.
ADVICE: Final = {
    "server_evicts": "Have the server refuse writes when it is full instead; rlbroker waits for room then.",
    "server_full": "Raise maxmemory, lower max_queue_bytes or max_queue_size, or delete runs that are over: "
    "`rlbroker prune --dry-run` lists them.",
    "learner_missing": "Start the learner with this run's name and server; or the workers have a mistyped name.",
    "learner_away": "Look at its process and log, and start it again: it goes on with the run.",
    "learner_ended": "If it ended by an error, its log says which: start it again, and it goes on with the run. If the "
    "run is over, stop the workers.",
    "no_weights": "Call send_model_weights before the first collect_experiences.",
    "too_few_workers": "Start more, or lower num_workers; those that are missing left, or were never started.",
    "worker_away": "Look at its process and log, and start it again with the same id. Its queue is not lost.",
    "worker_behind": "It loads weights in poll only: call that between shorter rollouts. If it has not polled for "
    "long, it hangs in your code, or waits for room in its queue: look at its process.",
    "worker_skips": "That is right for a learner that publishes faster than a rollout takes. For on-policy training "
    "publish less often, or make rollouts shorter.",
    "worker_cannot_load": "Its model and the learner's differ: the message names keys and shapes. Start it again "
    "with the learner's code.",
    "worker_unconfirmed": "It waits until its batch is as safe as its level promises, and goes on by itself then. With "
    "one replica for each master that is so after each failover until the old master is back: have two.",
    "worker_fenced": "Two processes were started with one worker_id, and only the newer one counts. Give each its "
    "own, or leave worker_id out.",
    "updates_failed": "The record says why. If it runs a newer version by now, it has recovered.",
    "signatures_refused": "Somebody writes to the server in the learner's place; or the learner, or who sent the "
    "command, has no signing key, or another one. The record says which.",
    "commands_unanswered": "Workers answer in poll: it does not call that, or waits for room in its queue.",
    "queue_full": "The learner is the bottleneck: have it collect more at once, use fewer workers, or choose "
    "when_full='drop_oldest' if old batches are worth little.",
    "batches_lost": "vanished: the server lost them (a restart without its data, or somebody deleted keys); trimmed: "
    "somebody trimmed the stream; fenced: they came from a process that had been replaced.",
    "dead_letters": "corrupt: they do not decode; poison: learners died over them. See why, then retry or purge "
    "them.",
    "keys_spoiled": "Its worker wrote that, or another program: find out which. A queue, answers and a life that are "
    "none are deleted by the learner; delete others with DEL.",
    "too_many_missed": "See which workers, and why.",
}


def find(snapshot: Snapshot, limits: FindingLimits | None = None) -> list[Finding]:
    """Give what is wrong, the worst first."""
    limits = limits or FindingLimits()
    found = [*_of_server(snapshot), *_of_learner(snapshot), *_of_members(snapshot, limits)]
    for worker, status in snapshot.workers.items():
        found += _of_worker(snapshot, worker, status, limits)
    return sorted(found, key=lambda one: one.severity != "critical")


def gather(findings: Iterable[Finding]) -> list[tuple[Finding, list[int]]]:
    """Give findings to be shown, with the workers of which more of the same is to be said: sixty lines tell no more.

    >>> found = [Finding("warning", "queue_full", worker, f"{worker} is full", "") for worker in range(9)]
    >>> [(one.what, workers) for one, workers in gather(found)]
    [('0 is full', []), ('1 is full', []), ('2 is full', [3, 4, 5, 6, 7, 8])]
    """
    shown: list[tuple[Finding, list[int]]] = []
    by_code: dict[str, list[tuple[Finding, list[int]]]] = {}
    for one in findings:
        same = by_code.setdefault(one.code, [])
        if len(same) < SHOWN_OF_A_CODE or one.worker is None:
            same.append((one, []))
            shown.append(same[-1])
        else:
            same[-1][1].append(one.worker)
    return shown


def _of_server(snapshot: Snapshot) -> Iterator[Finding]:
    server = snapshot.server
    policy = server.maxmemory_policy
    if policy not in ("", "noeviction"):
        what = "weights and experiences" if policy.startswith("allkeys") else "heartbeats and weights"
        yield Finding(
            "critical",
            "server_evicts",
            None,
            f"{server.evicting_node or 'the server'} has maxmemory-policy {policy}: it deletes {what} when memory is "
            "short",
            "redis-cli CONFIG SET maxmemory-policy noeviction",
        )
    if (
        server.used_bytes
        and server.maxmemory_bytes
        and server.used_bytes > MEMORY_SHARE * server.maxmemory_bytes
    ):
        share = server.used_bytes / server.maxmemory_bytes
        yield Finding(
            "warning",
            "server_full",
            None,
            f"{server.node or 'the server'} uses {share:.0%} of its maxmemory; at 100 % it takes nothing more",
            "rlbroker doctor",
        )


def _of_learner(snapshot: Snapshot) -> Iterator[Finding]:
    learner = snapshot.learner
    if learner is None:
        yield Finding(
            "warning",
            "learner_missing",
            None,
            "no learner has opened the run yet; its workers wait",
            "rlbroker runs",
        )
    elif learner.state == "away":
        silent = "never heard of" if learner.last_seen_seconds is None else _ago(learner.last_seen_seconds)
        yield Finding(
            "critical",
            "learner_away",
            None,
            f"the learner ({learner.host} pid {learner.pid}) is away: {silent}; it died, or is cut off",
            "rlbroker report",
        )
    elif learner.state == "ended":
        yield from _of_workers_without(snapshot, learner)
    elif learner.state == "alive" and snapshot.pointer is None and snapshot.members:
        yield Finding(
            "warning",
            "no_weights",
            None,
            "the learner has not published any weights yet; workers wait in load_weights",
            "rlbroker weights list",
        )


def _of_workers_without(snapshot: Snapshot, learner: LearnerStatus) -> Iterator[Finding]:
    """Speak of workers that go on though the learner has ended, unless they may not have noticed yet."""
    alive = sum(info.state == "alive" for info in snapshot.members)
    silent_seconds = learner.last_seen_seconds
    just_ended = silent_seconds is not None and silent_seconds <= max(
        ENDED_SECONDS, snapshot.settings.lease_seconds
    )
    if alive and not learner.others and not just_ended:
        when = "at once" if silent_seconds is None else f"{age(silent_seconds)} ago"
        yield Finding(
            "warning",
            "learner_ended",
            None,
            f"the learner ({learner.host} pid {learner.pid}) ended {when}, and "
            f"{counted(alive, 'worker still sends', 'workers still send')}: nobody collects it",
            "rlbroker workers",
        )


def _of_members(snapshot: Snapshot, limits: FindingLimits) -> Iterator[Finding]:
    if snapshot.learner is None or snapshot.learner.state == "ended":
        return
    alive = sum(info.state == "alive" for info in snapshot.members)
    wanted = snapshot.expected_workers if limits.min_workers is None else limits.min_workers
    if alive < wanted:
        severity: Severity = "warning" if alive else "critical"
        expected = "are expected" if limits.min_workers is None else "are wanted"
        yield Finding(
            severity,
            "too_few_workers",
            None,
            f"{counted(alive, 'worker is', 'workers are')} alive; {wanted} {expected}",
            "rlbroker workers",
        )


def _of_worker(
    snapshot: Snapshot, worker: int, status: WorkerStatus, limits: FindingLimits
) -> Iterator[Finding]:
    more = f"rlbroker workers {worker}"
    info, counts, missed = status.info, status.counts, status.missed
    if info is not None:
        yield from _of_member(snapshot, info, limits)
    if status.dead_letters:
        yield Finding(
            "warning",
            "dead_letters",
            worker,
            f"{counted(status.dead_letters, 'batch', 'batches')} of worker {worker} could not be used and "
            f"{'is' if status.dead_letters == 1 else 'are'} kept as dead letters",
            f"rlbroker dead list --worker {worker}",
        )
    if status.spoiled:
        yield Finding(
            "warning",
            "keys_spoiled",
            worker,
            f"{' and '.join(status.spoiled)} of worker {worker} {'is' if len(status.spoiled) == 1 else 'are'} not "
            "what rlbroker writes there",
            f"redis-cli TYPE '{status.spoiled[0]}'",
        )
    unwanted = {why: count for why, count in counts.lost.items() if why in _UNWANTED_LOSSES} if counts else {}
    if unwanted:
        reasons = ", ".join(f"{count:,} {why}" for why, count in unwanted.items())
        yield Finding(
            "warning",
            "batches_lost",
            worker,
            f"{counted(sum(unwanted.values()), 'batch', 'batches')} of worker {worker} did not reach the learner: "
            f"{reasons}",
            more,
        )
    if counts and counts.waiting >= limits.waiting_share * snapshot.settings.max_queue_size:
        yield Finding(
            "warning",
            "queue_full",
            worker,
            f"the queue of worker {worker} is full to {counts.waiting / snapshot.settings.max_queue_size:.0%}: the "
            "learner collects more slowly than the worker sends",
            "rlbroker top",
        )
    failed = missed.by_reason.get("failed", 0)
    if failed:
        yield Finding(
            "warning",
            "updates_failed",
            worker,
            f"worker {worker} could not load {counted(failed, 'version')}",
            f"rlbroker missed --worker {worker} --why failed",
        )
    if missed.refused:
        yield Finding(
            "warning",
            "signatures_refused",
            worker,
            f"worker {worker} refused {counted(missed.refused, 'version or command', 'versions or commands')} that "
            "the learner did not sign",
            f"rlbroker missed --worker {worker} --why refused",
        )
    if status.command_seconds >= UNANSWERED_SECONDS:
        yield Finding(
            "warning",
            "commands_unanswered",
            worker,
            f"worker {worker} has not answered {counted(status.commands_waiting, 'command')}, the oldest "
            f"for {age(status.command_seconds)}",
            "rlbroker control list",
        )


def _of_member(snapshot: Snapshot, info: WorkerInfo, limits: FindingLimits) -> Iterator[Finding]:
    worker, more = info.worker_id, f"rlbroker workers {info.worker_id}"
    if info.state == "away":
        yield Finding(
            "warning",
            "worker_away",
            worker,
            f"worker {worker}{_process(info)} is away: {_ago(info.last_seen_seconds)}; it died, or is cut off",
            more,
        )
    if info.problem:
        yield Finding(
            "critical",
            "worker_cannot_load",
            worker,
            f"worker {worker} cannot load the newest weights: {info.problem}",
            more,
        )
    silent = info.state == "away"
    if info.unconfirmed and not silent:
        yield Finding(
            "warning",
            "worker_unconfirmed",
            worker,
            f"worker {worker} waits: {info.unconfirmed}",
            "rlbroker doctor",
        )
    just_joined = not info.version and info.unpolled_seconds < UNPOLLED_SECONDS
    expected = silent or just_joined or info.problem or info.unconfirmed
    if info.staleness >= limits.staleness and not expected:
        latest = snapshot.pointer.version if snapshot.pointer else 0
        runs = f"{info.version:,}" if info.version else "none"
        yield Finding(
            "warning",
            "worker_behind",
            worker,
            f"worker {worker} is {counted(info.staleness, 'version')} behind: it runs {runs} of {latest:,}"
            f"{_unpolled(info)}",
            more,
        )
    elif not silent and snapshot.workers[worker].missed.skips_in_a_row >= SKIPS_IN_A_ROW:
        times = snapshot.workers[worker].missed.skips_in_a_row
        yield Finding(
            "warning",
            "worker_skips",
            worker,
            f"worker {worker} jumped over versions with each of its last {times:,} updates: it polls less often than "
            "the learner publishes",
            f"rlbroker missed --worker {worker}",
        )
    if info.fenced_seconds is not None and info.fenced_seconds < FENCED_SECONDS:
        yield Finding(
            "warning",
            "worker_fenced",
            worker,
            f"a second process ({info.fenced_process}) used the id of worker {worker}, and was turned away "
            f"{age(info.fenced_seconds)} ago",
            more,
        )


def _process(info: WorkerInfo) -> str:
    """Where a worker ran; what it said of itself is forgotten after a while."""
    return f" ({info.host} pid {info.pid})" if info.host else ""


def _unpolled(info: WorkerInfo) -> str:
    if info.state != "alive" or info.unpolled_seconds < UNPOLLED_SECONDS:
        return ""
    return f", and has not called poll for {age(info.unpolled_seconds)}"


def _ago(seconds: float) -> str:
    return f"last heard of {age(seconds)} ago"
