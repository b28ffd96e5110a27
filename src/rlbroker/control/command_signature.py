"""The signature of a command: it covers all that a worker acts on, and the incarnations that the command is for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from rlbroker.backend.deadline import Deadline
from rlbroker.codec.signing import COMMAND, NotSigned, SigningKey

#: Fields of a signed command that carry its signature; they are kept when the command is sent again.
SIGNATURE_FIELDS: Final = ("signed_for", "signature")

#: Fields of a command that the signature covers.
_COVERED_FIELDS: Final = ("name", "arguments", "expires_seconds", "data")

#: The most refusals that are reported in each period: an attacker can send any number of forged commands.
REFUSALS_REPORTED: Final = 50
REFUSALS_SECONDS: Final = 10.0

#: The most refused entries that are remembered.
REFUSED_REMEMBERED: Final = 10_000


def sign_command(
    key: SigningKey, run: str, command_id: str, fields: Mapping[str, Any], targets: Mapping[int, int]
) -> dict[str, str]:
    """Return the fields that carry a command's signature.

    Args:
        targets: the workers that the command is for, each with its incarnation.
    """
    signed_for = ",".join(f"{worker}:{incarnation}" for worker, incarnation in targets.items())
    covered = [fields[name] for name in _COVERED_FIELDS]
    return {
        "signed_for": signed_for,
        "signature": key.sign(COMMAND, run, command_id, signed_for, *covered),
    }


class CommandVerifier:
    """Checks the commands that one worker reads, and bounds how many refusals it reports."""

    def __init__(self, key: SigningKey, run: str, worker_id: int, incarnation: int) -> None:
        """Prepare a verifier."""
        self._key, self._run, self._worker_id, self._incarnation = key, run, worker_id, incarnation
        self._refused: dict[str, None] = {}  #: ids of refused entries, because the stream may be read again
        self._reported, self._period_end = 0, Deadline(REFUSALS_SECONDS)

    def check(self, command_id: str, fields: Mapping[bytes, bytes]) -> None:
        """Check that a command was signed with this worker's key, and for this incarnation of it.

        Raises:
            NotSigned: its signature is missing or wrong, or it was signed for another worker or incarnation.
        """
        found = {name: fields.get(name.encode(), b"") for name in (*_COVERED_FIELDS, *SIGNATURE_FIELDS)}
        signature = found["signature"].decode("ascii", "replace")
        covered = [found[name] for name in _COVERED_FIELDS]
        self._key.check(signature, COMMAND, self._run, command_id, found["signed_for"], *covered)
        if f"{self._worker_id}:{self._incarnation}".encode() not in found["signed_for"].split(b","):
            raise NotSigned("it was signed for others, or for an earlier incarnation of this worker")

    def should_report(self, entry_id: str) -> bool:
        """Return whether to report the refusal of this entry: each once, and REFUSALS_REPORTED in each period."""
        if entry_id in self._refused:
            return False
        self._refused[entry_id] = None
        if len(self._refused) > REFUSED_REMEMBERED:
            del self._refused[next(iter(self._refused))]
        if self._period_end.over:
            self._reported, self._period_end = 0, Deadline(REFUSALS_SECONDS)
        self._reported += 1
        return self._reported <= REFUSALS_REPORTED
