"""Rate limiting between inserting and sampling, for learners with a replay buffer.

The rule is that of Reverb's `SampleToInsertRatio` (Cassirer et al., "Reverb: A Framework For Experience Replay",
arXiv 2102.04736): with `inserts` batches inserted and `samples` drawn, the difference `inserts * ratio - samples`
must stay within `error_buffer` of `min_size * ratio`.
"""

from __future__ import annotations

import math
import time

from rlbroker.backend.deadline import Deadline
from rlbroker.backend.locks import CallLock
from rlbroker.config import SamplesPerInsert, check_positive_int
from rlbroker.errors import InvalidArgument

#: How often to check whether batches may be inserted.
CHECK_SECONDS = 0.005


class RateLimiter:
    """Limits how far inserting and sampling may run ahead of each other. Safe to use from several threads.

    Attributes:
        inserts: batches that `collect` has returned, which sets this.
        samples: samples that were drawn.
    """

    def __init__(self, settings: SamplesPerInsert | None) -> None:
        """Begin at zero. Without settings nothing is limited."""
        self._settings = settings
        self._sampling = CallLock()
        self.inserts = 0
        self.samples = 0

    @property
    def is_active(self) -> bool:
        """Whether inserting may have to wait."""
        return self._settings is not None

    @property
    def _room(self) -> int | None:
        if self._settings is None:
            return None
        rule = self._settings
        highest = rule.ratio * rule.min_size + rule.error_buffer
        by_ratio = math.floor((highest + self.samples) / rule.ratio + 1e-9) - self.inserts
        return max(0, by_ratio, rule.min_size - self.inserts)

    def wait(self, seconds: float) -> int | None:
        """Wait until batches may be inserted; return how many: 0 after the timeout, None for any number."""
        deadline = Deadline(seconds)
        while self._room == 0 and not deadline.over:
            time.sleep(min(CHECK_SECONDS, deadline.remaining))
        return self._room

    def may_sample(self, count: int) -> bool:
        """Count this many samples if they may be drawn now, and return whether they may.

        Raises:
            InvalidArgument: this many samples can never be drawn at once.
        """
        count = check_positive_int("the number of samples", count)
        drawn: list[int] = []
        try:
            return self._sampling.run(self._draw, count, drawn)
        except BaseException:  # an interrupt: the caller does not draw
            self.samples -= sum(drawn)
            raise

    def _draw(self, count: int, drawn: list[int]) -> bool:
        """Count samples, also in `drawn`, if they may be drawn; return whether they may."""
        if not self._may_draw(count):
            return False
        drawn[:], self.samples = (count,), self.samples + count
        return True

    def _may_draw(self, count: int) -> bool:
        if self._settings is None:
            return True
        rule = self._settings
        # Inserting stops up to one ratio below the highest difference, sampling at the lowest one.
        largest = max(1, math.floor(2 * rule.error_buffer - rule.ratio + 1e-9))
        if count > largest:
            raise InvalidArgument(
                f"{count} samples can never be drawn at once with error_buffer={rule.error_buffer:g} and "
                f"ratio={rule.ratio:g}: {largest} at most. Raise error_buffer to "
                f"{(count + rule.ratio) / 2:g} or more, or ask for fewer"
            )
        after = self.inserts * rule.ratio - self.samples - count
        lowest = rule.ratio * rule.min_size - rule.error_buffer
        return self.inserts >= rule.min_size and after >= lowest - 1e-9

    def restore(self, inserts: int, samples: int) -> None:
        """Continue from the counts of a checkpoint."""
        self.inserts, self.samples = inserts, samples
