"""What must be true of the run on several hosts. Pure, but for what the caller gives."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from deploy.hosts.training import Course


@dataclass(frozen=True)
class Check:
    """One thing that must be true, whether it is, and what was seen."""

    name: str
    passed: bool
    seen: str


@dataclass(frozen=True)
class Cut:
    """When a host was cut off and came back, and which version was the newest then."""

    began: float
    ended: float
    first_version: int
    last_version: int

    @property
    def middle(self) -> float:
        """From here on nothing of the cut host is left in the queues."""
        return (self.began + self.ended) / 2


def training_went_on(course: Course, cut: Cut, others: Sequence[int]) -> Check:
    """While a host was away, versions grew and batches of every worker of the other host were collected."""
    versions = cut.last_version - cut.first_version
    batches = [len(course.collected(worker, cut.middle, cut.ended)) for worker in others]
    return Check(
        "training went on meanwhile",
        versions >= 2 and all(batches),
        f"{versions} versions; batches of the other workers in the second half: {_listed(batches)}",
    )


def host_was_away(course: Course, cut: Cut, workers: Sequence[int], states: Iterable[str]) -> Check:
    """The cut was one: no batch of the host arrived, and its workers were `away`."""
    batches = sum(len(course.collected(worker, cut.middle, cut.ended)) for worker in workers)
    seen = set(states)
    return Check(
        "the cut host was away",
        not batches and seen == {"away"},
        f"{batches} batches, {_listed(sorted(seen))}",
    )


def missed_versions_are_recorded(
    records: Sequence[Mapping[str, Any]], cut: Cut, workers: Sequence[int]
) -> Check:
    """Each version of the time of the cut is in the record of each worker of that host, but for the last.

    That one they may have run after all.
    """
    wanted = set(range(cut.first_version + 1, cut.last_version))
    found: dict[int, set[int]] = {worker: set() for worker in workers}
    reasons = set()
    for one in records:
        if one["what"] == "weights" and one["worker_id"] in found:
            versions = range(one["first"], one["last"] + 1)
            found[one["worker_id"]].update(versions)
            if wanted.intersection(versions):
                reasons.add(one["why"])
    gaps = {worker: sorted(wanted - versions) for worker, versions in found.items() if wanted - versions}
    span = f"{cut.first_version + 1} to {cut.last_version - 1}"
    return Check(
        "what it missed is recorded",
        bool(wanted) and not gaps,
        f"without a record, by worker: {gaps}" if gaps else f"versions {span}, as {_listed(sorted(reasons))}",
    )


def host_came_back(course: Course, cut: Cut, workers: Sequence[int]) -> Check:
    """Its workers are alive, their batches arrive, and they act with versions from after the cut."""
    alive = course.alive_since(workers, cut.ended)
    first = [min(course.collected(worker, cut.ended), default=None) for worker in workers]
    versions = [one.version if (one := course.worker(worker)) else 0 for worker in workers]
    if alive is None or None in first:
        return Check("it came back", False, f"states: {_listed(sorted(course.states(workers)))}")
    latest = max(at for at in first if at is not None) - cut.ended
    return Check(
        "it came back",
        min(versions) >= cut.last_version and course.states(workers) == {"alive"},
        f"all alive {alive - cut.ended:.1f} s after its return, batches of all {latest:.1f} s after it; they "
        f"run {_listed(versions)} of {course.version}",
    )


def nothing_is_lost_without_a_trace(
    workers: Mapping[str, Mapping[str, Any]], said: Mapping[int, int]
) -> Check:
    """What the workers themselves say that they sent is what the server's counts add up to.

    Args:
        workers: `rlbroker workers --json` after the end.
        said: how many batches each worker said it had sent, when it ended.
    """
    wrong, produced, delivered, lost = [], 0, 0, 0
    for worker, sent in said.items():
        counts = workers[str(worker)]["batches"]
        gone = sum(counts["lost"].values())
        # A batch that a worker held when the stop came is produced, and counted, but not sent.
        if not sent + counts["lost"].get("stopped", 0) == counts["produced"] == counts["delivered"] + gone:
            wrong.append(f"worker {worker} sent {sent}: {dict(counts)}")
        produced += counts["produced"]
        delivered += counts["delivered"]
        lost += gone
    return Check(
        "nothing is lost without a trace",
        not wrong and delivered > 0,
        "; ".join(wrong) or f"{produced} batches = {delivered} delivered + {lost} counted as lost",
    )


def weights_cross_once(host: str, received_bytes: int, stored_bytes: int, workers: int) -> Check:
    """A version crosses the link of a host about once, and not once for each worker there.

    What is measured has everything else in it: notices, heartbeats, confirmations of batches, TLS and TCP. So the
    limit is the middle between the two.
    """
    crossings = received_bytes / max(stored_bytes, 1)
    return Check(
        f"weights cross the link of {host} once",
        crossings < (1 + workers) / 2 or workers == 1,
        f"{received_bytes / 1e6:.2f} MB, everything included, for {stored_bytes / 1e6:.2f} MB of weights: "
        f"{crossings:.2f} × (workers there: {workers})",
    )


def is_refused(what: str, said: str, expected: str) -> Check:
    """Something was refused, with an answer that says so."""
    line = said.splitlines()[0] if said else "it was not"
    return Check(f"{what} is refused", expected in said, line.removeprefix("rlbroker: "))


def _listed(values: Iterable[object]) -> str:
    return ", ".join(map(str, values))
