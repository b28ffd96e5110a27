"""The checks of the run on several hosts: pure functions of what the test observed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from deploy.hosts.training import LearnerReports


@dataclass(frozen=True)
class Check:
    """The result of one check, and what was observed."""

    name: str
    passed: bool
    observed: str


@dataclass(frozen=True)
class Cut:
    """The times at which a host was cut off and reconnected, and the latest versions then."""

    started: float
    ended: float
    first_version: int
    last_version: int

    @property
    def middle(self) -> float:
        """The middle of the cut. After it the queues hold no batch of the cut host."""
        return (self.started + self.ended) / 2


def check_training_continued(reports: LearnerReports, cut: Cut, others: Sequence[int]) -> Check:
    """Check that during the cut versions were published and batches of every other worker were collected."""
    versions = cut.last_version - cut.first_version
    batches = [len(reports.collection_times(worker, cut.middle, cut.ended)) for worker in others]
    return Check(
        "training continued during the cut",
        versions >= 2 and all(batches),
        f"{versions} versions; batches of the other workers in the second half: {_join(batches)}",
    )


def check_host_was_away(
    reports: LearnerReports, cut: Cut, workers: Sequence[int], states: Iterable[str]
) -> Check:
    """Check that the cut worked: no batch of the host arrived, and its workers were `away`."""
    batches = sum(len(reports.collection_times(worker, cut.middle, cut.ended)) for worker in workers)
    state_set = set(states)
    return Check(
        "the workers of the cut host were away",
        not batches and state_set == {"away"},
        f"{batches} batches, {_join(sorted(state_set))}",
    )


def check_missed_versions_are_recorded(
    records: Sequence[Mapping[str, Any]], cut: Cut, workers: Sequence[int]
) -> Check:
    """Check that each cut-off worker has a missed record for each version of the time of the cut, except the last.

    The workers may have applied the last version after the cut.
    """
    expected = set(range(cut.first_version + 1, cut.last_version))
    found: dict[int, set[int]] = {worker: set() for worker in workers}
    reasons = set()
    for record in records:
        if record["what"] == "weights" and record["worker_id"] in found:
            versions = range(record["first"], record["last"] + 1)
            found[record["worker_id"]].update(versions)
            if expected.intersection(versions):
                reasons.add(record["why"])
    gaps = {worker: sorted(expected - versions) for worker, versions in found.items() if expected - versions}
    span = f"{cut.first_version + 1} to {cut.last_version - 1}"
    return Check(
        "its missed versions are recorded",
        bool(expected) and not gaps,
        f"without a record, by worker: {gaps}" if gaps else f"versions {span}, as {_join(sorted(reasons))}",
    )


def check_host_came_back(reports: LearnerReports, cut: Cut, workers: Sequence[int]) -> Check:
    """Check that the workers are alive again, send batches, and run versions from after the cut."""
    alive = reports.time_all_alive(workers, cut.ended)
    first = [min(reports.collection_times(worker, cut.ended), default=None) for worker in workers]
    versions = [status.version if (status := reports.worker(worker)) else 0 for worker in workers]
    if alive is None or None in first:
        return Check("the cut host came back", False, f"states: {_join(sorted(reports.states(workers)))}")
    latest = max(at for at in first if at is not None) - cut.ended
    return Check(
        "the cut host came back",
        min(versions) >= cut.last_version and reports.states(workers) == {"alive"},
        f"all workers alive {alive - cut.ended:.1f} s after the cut, batches of all after {latest:.1f} s; they "
        f"run {_join(versions)} of {reports.version}",
    )


def check_every_batch_is_counted(
    workers: Mapping[str, Mapping[str, Any]], batches_sent: Mapping[int, int]
) -> Check:
    """Check that the server's counts agree with the numbers that the workers printed.

    Args:
        workers: the output of `rlbroker workers --json` after the end.
        batches_sent: the number of batches that each worker printed when it ended.
    """
    wrong, produced, delivered, lost = [], 0, 0, 0
    for worker, sent in batches_sent.items():
        counts = workers[str(worker)]["batches"]
        lost_here = sum(counts["lost"].values())
        # A batch that was pending in the worker when "stop" arrived is counted as produced, but not sent.
        if (
            not sent + counts["lost"].get("stopped", 0)
            == counts["produced"]
            == counts["delivered"] + lost_here
        ):
            wrong.append(f"worker {worker} sent {sent}: {dict(counts)}")
        produced += counts["produced"]
        delivered += counts["delivered"]
        lost += lost_here
    return Check(
        "every batch is counted",
        not wrong and delivered > 0,
        "; ".join(wrong) or f"{produced} batches = {delivered} delivered + {lost} counted as lost",
    )


def check_weights_cross_once(host: str, received_bytes: int, stored_bytes: int, workers: int) -> Check:
    """Check that a version crosses the link of a host about once, and not once for each worker.

    The measured bytes include all other traffic: notices, heartbeats, replies to batches, TLS and TCP. The limit is
    therefore the middle between once and once for each worker.
    """
    crossings = received_bytes / max(stored_bytes, 1)
    return Check(
        f"weights cross the link of {host} once",
        crossings < (1 + workers) / 2 or workers == 1,
        f"{received_bytes / 1e6:.2f} MB in all, for {stored_bytes / 1e6:.2f} MB of weights: "
        f"{crossings:.2f} × (workers: {workers})",
    )


def check_refused(what: str, answer: str, expected: str) -> Check:
    """Check that an action was refused with the expected error."""
    line = answer.splitlines()[0] if answer else "it was not refused"
    return Check(f"{what} is refused", expected in answer, line.removeprefix("rlbroker: "))


def _join(values: Iterable[object]) -> str:
    return ", ".join(map(str, values))
