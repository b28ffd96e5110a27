"""The key that a learner and its workers share, unknown to the server. It signs weights, commands and the run's end."""

from __future__ import annotations

import hashlib
import hmac
import re
from collections.abc import Iterable
from functools import cached_property
from typing import Final

from rlbroker.errors import WireError

#: The purposes of a signature. Each has a derived key of its own, so that a signature for one is invalid for another.
WEIGHTS: Final = "weights"
COMMAND: Final = "command"
IMAGE: Final = "image"
END: Final = "end"

#: Digits of a key's id: a hash that distinguishes keys in messages and reveals nothing about them.
ID_LENGTH: Final = 8

#: The text of a signature: the id of the key, and HMAC-SHA256 in hexadecimal.
_SIGNATURE: Final = re.compile("([0-9a-f]{8}):[0-9a-f]{64}")


class NotSigned(WireError):
    """The signature of received data is missing, wrong, or of another key; the message says which."""


class SigningKey:
    """A key of at least 32 bytes, which appears in no repr, log or error."""

    def __init__(self, secret: bytes) -> None:
        """Keep the secret, which `config.signing_secret` has checked."""
        self._secret = secret
        self._derived: dict[str, bytes] = {}

    def __repr__(self) -> str:
        """Show the id of the key."""
        return f"<SigningKey {self.id}>"

    @cached_property
    def id(self) -> str:
        """The id of the key, for messages."""
        return self.sign("id").partition(":")[2][:ID_LENGTH]

    def sign(self, purpose: str, *fields: str | int | bytes) -> str:
        """Return the signature of some fields, as `<id of the key>:<hexadecimal>`."""
        mac = hmac.digest(self._key_for(purpose), canonical(fields), "sha256").hex()
        return f"{'' if purpose == 'id' else self.id}:{mac}"

    def check(self, signature: str, purpose: str, *fields: str | int | bytes) -> None:
        """Check a received signature of some fields.

        Raises:
            NotSigned: it is missing, of another key, or wrong.
        """
        if not signature:
            raise NotSigned("its signature is missing")
        if hmac.compare_digest(self.sign(purpose, *fields).encode(), signature.encode()):
            return
        found = _SIGNATURE.fullmatch(signature)
        if found and found[1] != self.id:
            raise NotSigned(f"it was signed with another key (id {found[1]}, expected {self.id})")
        raise NotSigned("its signature is wrong")

    def _key_for(self, purpose: str) -> bytes:
        if purpose not in self._derived:
            self._derived[purpose] = hmac.digest(self._secret, canonical(["rlbroker 1", purpose]), "sha256")
        return self._derived[purpose]


def canonical(fields: Iterable[str | int | bytes]) -> bytes:
    """Join fields, each after its length in 8 bytes, big endian, so that no other fields give the same bytes.

    >>> canonical(["ab", 1])
    b'\\x00\\x00\\x00\\x00\\x00\\x00\\x00\\x02ab\\x00\\x00\\x00\\x00\\x00\\x00\\x00\\x011'
    """
    plain = [one if isinstance(one, bytes) else str(one).encode() for one in fields]
    return b"".join(len(one).to_bytes(8, "big") + one for one in plain)


def chunk_hash(parts: Iterable[bytes | memoryview]) -> str:
    """Return the SHA-256 of a chunk, in hexadecimal."""
    found = hashlib.sha256()
    for part in parts:
        found.update(part)
    return found.hexdigest()
