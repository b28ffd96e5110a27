"""What a worker knows of its run: the learner writes it to `meta`, and each heartbeat returns it."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import Final

from rlbroker.backend.deadline import Deadline
from rlbroker.backend.keys import Keys
from rlbroker.backend.replies import parsing, text_fields, whole_number
from rlbroker.codec.signing import END, NotSigned, SigningKey
from rlbroker.config import RunSettings
from rlbroker.errors import IncompatibleFormat
from rlbroker.membership.run_size import RunSize

logger = logging.getLogger("rlbroker")

#: Fields of `meta` that a worker needs, in the order in which `beat.lua` returns them.
META_FIELDS: Final = (
    "wire_format",
    "shards",
    "epoch",
    "ended",
    *RunSize._fields,
    *(field.name for field in fields(RunSettings)),
)

#: How often a call that waits for the settings looks for them. It must not wait for an event: see `BackgroundThread`.
SETTINGS_POLL_SECONDS: Final = 0.01

#: How long after a heartbeat that brought the end of the run a worker stops, if it has not obeyed the `stop` by then:
#: the command is on its way, and is obeyed in order, with the user's handlers.
STOP_GRACE_SECONDS: Final = 1.0


def end_epoch(ended: str) -> int | None:
    """Return the epoch of the learner that ended the run, from the field `ended`; None without a valid one.

    The end is void under the epoch of another learner.
    """
    return whole_number((*ended.split(" "), "")[1])


class JoinedRun:
    """The settings and the size of one worker's run; defaults until a learner has opened it."""

    def __init__(self, keys: Keys, *, wire_format: int, key: SigningKey | None = None) -> None:
        """Start with nothing known.

        Args:
            keys: the run's keys; `apply` spreads them over the shards that `meta` names.
            wire_format: the only wire format that this process reads and writes.
            key: the key that the end of the run must be signed with; None to accept an unsigned one.
        """
        self._keys, self.wire_format, self._key = keys, wire_format, key
        self._settings: RunSettings | None = None
        self._last_reply: Sequence[bytes | None] | None = None
        self._stop_due: Deadline | None = None  #: when the worker must stop, because the run has ended
        self._refused_end = ""  #: the end that was refused last
        self._newest_epoch = 0  #: the newest epoch of a leading learner that was seen
        #: The number of workers and hosts, from the learner's latest count.
        self.size = RunSize()

    @property
    def opened(self) -> bool:
        """Whether a learner has opened the run, so that its settings and shards are known."""
        return self._settings is not None

    @property
    def settings(self) -> RunSettings:
        """The run's settings; the defaults until they are known."""
        return self._settings or RunSettings()

    @property
    def ended(self) -> bool:
        """Whether the run has ended, and a `stop` command that is on its way had the time to arrive.

        Once true it stays true: a learner that opens the run again opens it for other workers.
        """
        return self._stop_due is not None and self._stop_due.over

    def wait_for_settings(self, deadline: Deadline, check: Callable[[], None]) -> RunSettings | None:
        """Wait for a learner to open the run, and return its settings; None if the deadline passes.

        Meanwhile `check` raises if the membership has ended.
        """
        while self._settings is None and not deadline.over:
            check()
            time.sleep(min(SETTINGS_POLL_SECONDS, deadline.remaining))
        return self._settings

    def apply(self, reply: Sequence[bytes | None]) -> bool:
        """Apply a heartbeat's reply, and return whether it brought new settings.

        Raises:
            IncompatibleFormat: the learner came back with another wire format.
            WireError: `meta` holds invalid settings.
        """
        if reply == self._last_reply:
            return False
        meta = text_fields(
            {name: value for name, value in zip(META_FIELDS, reply, strict=True) if value is not None}
        )
        opened = "wire_format" in meta
        if opened:
            with parsing(self._keys.meta):
                self.check_wire_format(meta["wire_format"])
                settings = RunSettings.from_fields(meta)
            self._keys.use_shards(meta.get("shards", " ".join(self._keys.shards)))
            self._settings = settings  # last: another thread waits for it
        self._newest_epoch = max(self._newest_epoch, whole_number(meta.get("epoch", "")) or 0)
        self._note_end(meta.get("ended", ""), joining=self._last_reply is None)
        self.size = RunSize(*(whole_number(meta.get(name, "")) or 0 for name in RunSize._fields))
        self._last_reply = reply
        return opened

    def _note_end(self, ended: str, *, joining: bool) -> None:
        # A server that came back with older data may have the end, and the epoch, of an earlier learner.
        if end_epoch(ended) != self._newest_epoch or not self._is_genuine(ended):
            if not self.ended:
                self._stop_due = None
        elif self._stop_due is None:
            self._stop_due = Deadline(0 if joining else STOP_GRACE_SECONDS)
            if joining:
                logger.warning(
                    "the run %r has ended, so this worker stops at once; start a learner of the run before its "
                    "workers, or choose another run name",
                    self._keys.run,
                )

    def _is_genuine(self, ended: str) -> bool:
        """Return whether the end of the run has a valid signature, if this worker has a key."""
        try:
            if self._key:
                _, epoch, signature = (*ended.split(" "), "", "")[:3]
                self._key.check(signature, END, self._keys.run, epoch)
        except NotSigned as error:
            if ended != self._refused_end:
                logger.warning("this worker refuses the end of the run %r: %s", self._keys.run, str(error))
            self._refused_end = ended
            return False
        return True

    def check_wire_format(self, found: str) -> None:
        """Check the wire format that `meta` names; it is empty if no learner has opened the run.

        Raises:
            IncompatibleFormat: this process reads and writes another one.
        """
        if found and found != str(self.wire_format):
            raise IncompatibleFormat(
                f"the run {self._keys.run!r} uses wire format {found:.40}, this process {self.wire_format}; "
                "install the same release of rlbroker for learner and workers"
            )
