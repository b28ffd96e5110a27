"""Which streams a read asks: the busy ones each time, and all of them now and then."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Final, TypeVar

#: So many quiet streams cost a read next to nothing: then all are asked each time.
FEW: Final = 32

#: A stream is quiet once it had nothing for so long.
QUIET_SECONDS: Final = 2.0

#: For how long each quiet stream has them all left out: asking it costs about a hundredth of that.
LEFT_OUT_SECONDS: Final = 0.0001

#: And for how long at most.
LONGEST_SECONDS: Final = 0.2

One = TypeVar("One")


class Turns:
    """Whose turn it is, so that a read costs what arrives and not how many workers there are."""

    def __init__(self) -> None:
        """Begin with everybody's turn."""
        self._busy: dict[str, float] = {}  #: by name: when it had something last
        self._all_at = 0.0

    def ask_all(self) -> None:
        """Have the next read ask everybody."""
        self._all_at = 0.0

    def choose(self, watched: Mapping[str, One], now: float) -> tuple[list[One], float | None]:
        """Give whom to ask, and how long until it is everybody's turn; None for the latter where it is now.

        Args:
            watched: by name, all that could be asked.
            now: by a clock that only grows, in seconds.
        """
        quiet = len(watched) - len(self._busy)
        if quiet > FEW and now < self._all_at:
            busy = [watched[name] for name in self._busy if name in watched]
            if busy:
                return busy, self._all_at - now
        return list(watched.values()), None

    def note(self, found: Iterable[str], watched: int, now: float, *, all_asked: bool) -> None:
        """Note who had something.

        Args:
            found: their names.
            watched: how many could be asked.
            now: as in `choose`, after the read.
            all_asked: whether everybody was asked.
        """
        self._busy |= dict.fromkeys(found, now)
        if all_asked:
            self._busy = {name: at for name, at in self._busy.items() if now - at < QUIET_SECONDS}
            quiet = watched - len(self._busy)
            self._all_at = now + min(LONGEST_SECONDS, quiet * LEFT_OUT_SECONDS)
