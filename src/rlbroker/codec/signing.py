"""The key that a learner shares with its workers, and not with the server: it signs weights and commands. Pure."""

from __future__ import annotations

import hashlib
import hmac
import re
from collections.abc import Iterable
from functools import cached_property
from typing import Final

from rlbroker.errors import WireError

#: What a key signs. Each purpose has a derived key of its own: a signature for one is worth nothing for another.
WEIGHTS: Final = "weights"
COMMAND: Final = "command"
IMAGE: Final = "image"

#: First 8 digits of a hash of the key, that tell keys apart in messages and say nothing of the key.
ID_LENGTH: Final = 8

#: A signature as text: the id of the key, and HMAC-SHA256 in hexadecimal.
_SIGNATURE: Final = re.compile("([0-9a-f]{8}):[0-9a-f]{64}")


class NotSigned(WireError):
    """What was received has no signature that our key makes; the message says what is wrong with it."""


class SigningKey:
    """A key of at least 32 bytes. It shows itself nowhere."""

    def __init__(self, secret: bytes) -> None:
        """Take the secret, as `config.signing_secret` has checked it."""
        self._secret = secret
        self._derived: dict[str, bytes] = {}

    def __repr__(self) -> str:
        """Show which key it is."""
        return f"<SigningKey {self.id}>"

    @cached_property
    def id(self) -> str:
        """Which key it is, for messages."""
        return self.sign("id").partition(":")[2][:ID_LENGTH]

    def sign(self, purpose: str, *fields: str | int | bytes) -> str:
        """Give the signature of some fields, as `<id of the key>:<hexadecimal>`."""
        mac = hmac.digest(self._key_for(purpose), canonical(fields), "sha256").hex()
        return f"{'' if purpose == 'id' else self.id}:{mac}"

    def check(self, signature: str, purpose: str, *fields: str | int | bytes) -> None:
        """Check a signature that was received.

        Raises:
            NotSigned: it is missing, of another key, or wrong.
        """
        if not signature:
            raise NotSigned("its signature is missing")
        if hmac.compare_digest(self.sign(purpose, *fields).encode(), signature.encode()):
            return
        found = _SIGNATURE.fullmatch(signature)
        if found and found[1] != self.id:
            raise NotSigned(f"it was signed with another key (id {found[1]}, ours {self.id})")
        raise NotSigned("its signature is wrong")

    def _key_for(self, purpose: str) -> bytes:
        if purpose not in self._derived:
            self._derived[purpose] = hmac.digest(self._secret, canonical(["rlbroker 1", purpose]), "sha256")
        return self._derived[purpose]


def canonical(fields: Iterable[str | int | bytes]) -> bytes:
    """Join fields so that no other fields give the same bytes: each after its length, 8 bytes, big endian.

    >>> canonical(["ab", 1])
    b'\\x00\\x00\\x00\\x00\\x00\\x00\\x00\\x02ab\\x00\\x00\\x00\\x00\\x00\\x00\\x00\\x011'
    """
    plain = [one if isinstance(one, bytes) else str(one).encode() for one in fields]
    return b"".join(len(one).to_bytes(8, "big") + one for one in plain)


def chunk_hash(parts: Iterable[bytes | memoryview]) -> str:
    """Give SHA-256 of a chunk, in hexadecimal."""
    found = hashlib.sha256()
    for part in parts:
        found.update(part)
    return found.hexdigest()
