"""Who has made a command: it is signed with all that a worker goes by, and for whom it is, life by life."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from rlbroker.codec.signing import COMMAND, NotSigned, SigningKey

#: Fields of a command that its signature takes; they travel with it wherever it is sent again.
SIGNED: Final = ("signed_for", "signature")

#: Fields that are signed as they are.
_FACTS: Final = ("name", "arguments", "expires_seconds", "data")


def signed(
    key: SigningKey, run: str, command_id: str, fields: Mapping[str, Any], targets: Mapping[int, int]
) -> dict[str, str]:
    """Give the fields that say who has made a command.

    Args:
        key: of learner and workers.
        run: the run's name.
        command_id: how it is called.
        fields: what is sent.
        targets: whom it is for: workers, each with its incarnation.
    """
    signed_for = ",".join(f"{worker}:{incarnation}" for worker, incarnation in targets.items())
    facts = [fields[name] for name in _FACTS]
    return {
        "signed_for": signed_for,
        "signature": key.sign(COMMAND, run, command_id, signed_for, *facts),
    }


def check(
    key: SigningKey,
    run: str,
    command_id: str,
    fields: Mapping[bytes, bytes],
    worker_id: int,
    incarnation: int,
) -> None:
    """Check that whoever has our key made a command, and for this life of this worker.

    Raises:
        NotSigned: that is not so.
    """
    found = {name: fields.get(name.encode(), b"") for name in (*_FACTS, *SIGNED)}
    signature = found["signature"].decode("ascii", "replace")
    key.check(signature, COMMAND, run, command_id, found["signed_for"], *(found[name] for name in _FACTS))
    if f"{worker_id}:{incarnation}".encode() not in found["signed_for"].split(b","):
        raise NotSigned("it was signed for others, or for an earlier life of this worker")
