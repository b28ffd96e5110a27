"""What is told of an outage: once that it began, and once that it is over."""

from __future__ import annotations

import logging

logger = logging.getLogger("rlbroker")


class OutageLog:
    """Something that fails again and again until it works. Not for several threads at once."""

    def __init__(self, what: str) -> None:
        """Begin with what works.

        Args:
            what: what it is, as the messages begin.
        """
        self._what = what
        #: What happened last, while it lasts.
        self.error: Exception | None = None

    def tell(self, error: Exception, more: str = "") -> None:
        """Say that it began, unless that was said.

        Args:
            error: what happened.
            more: what people should know besides.
        """
        if self.error is None:
            logger.warning("%s: %s; %strying again until it works", self._what, error, more and f"{more}; ")
        self.error = error

    def end(self) -> None:
        """Say that it is over, if it was said that it began: as loudly, so that nobody is left in doubt."""
        if self.error is not None:
            logger.warning("%s: it works again", self._what)
        self.error = None
