"""A row of the results, and the order in which the samples of the contenders are taken."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median


def progress(text: str) -> None:
    """Print progress on stderr; stdout is for results."""
    print(f"… {text}", file=sys.stderr, flush=True)


@dataclass(frozen=True)
class Row:
    """The samples of rlbroker and of a peer for the same work, one per repetition."""

    work: str
    against: str
    wanted: str  #: the target as text, such as "≥ 3× faster"
    ours: list[float]  #: samples of rlbroker
    theirs: list[float]  #: samples of the peer; empty if it could not run, and `note` says why
    unit: str
    higher_is_better: bool
    #: The wanted ratio: a minimum if higher is better, else a maximum; None for no target.
    target: float | None
    note: str = ""

    @property
    def ratio(self) -> float | None:
        """The median of `ours` divided by that of `theirs`; None without samples of both, or if theirs is zero."""
        if not self.ours or not self.theirs or not median(self.theirs):
            return None
        return median(self.ours) / median(self.theirs)

    @property
    def met(self) -> bool | None:
        """Whether the target was reached; None without a target or ratio."""
        ratio = self.ratio
        if ratio is None or self.target is None:
            return None
        return ratio >= self.target if self.higher_is_better else ratio <= self.target


def interleaved(contenders: dict[str, Callable[[], float]], repetitions: int) -> dict[str, list[float]]:
    """Return the samples of all contenders, taken in turn so that other load on the machine affects all alike.

    Each contender warms up once without being measured. Another contender is first in each round.

    Args:
        contenders: by name, a function that does the work once and returns its sample.
        repetitions: the number of samples of each contender.
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
