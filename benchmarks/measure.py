"""One line of the table, and the order in which its samples are taken."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median


def progress(text: str) -> None:
    """Say on stderr what is being done: stdout is for results."""
    print(f"… {text}", file=sys.stderr, flush=True)


@dataclass(frozen=True)
class Row:
    """What ours and a peer took for the same work, one sample of each repetition."""

    work: str
    against: str
    wanted: str  #: for people, such as "≥ 3× faster"
    ours: list[float]
    theirs: list[float]  #: empty where the peer could not run; `note` says why
    unit: str
    higher_is_better: bool
    target: (
        float | None
    )  #: wanted ratio: at least that if higher is better, else at most; None for information
    note: str = ""

    @property
    def ratio(self) -> float | None:
        """Median of ours by median of theirs; None where one side has no samples, or theirs is zero."""
        if not self.ours or not self.theirs or not median(self.theirs):
            return None
        return median(self.ours) / median(self.theirs)

    @property
    def met(self) -> bool | None:
        """Whether the target was reached; None where there is none, or no ratio."""
        ratio = self.ratio
        if ratio is None or self.target is None:
            return None
        return ratio >= self.target if self.higher_is_better else ratio <= self.target


def interleaved(contenders: dict[str, Callable[[], float]], repetitions: int) -> dict[str, list[float]]:
    """Let everyone do the work in turn, so that what the machine does meanwhile hits all of them alike.

    Each warms up once, unmeasured. Who begins changes from round to round.

    Args:
        contenders: by name, does the work once and gives its sample.
        repetitions: samples of each.
    """
    for name, contender in contenders.items():
        progress(f"  warming up: {name}")
        contender()
    samples: dict[str, list[float]] = {name: [] for name in contenders}
    order = list(contenders)
    for repetition in range(repetitions):
        first = repetition % len(order) if order else 0
        for name in itertools.chain(order[first:], order[:first]):
            samples[name].append(contenders[name]())
        progress(f"  {repetition + 1} of {repetitions}")
    return samples
