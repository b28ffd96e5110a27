"""The version of the wire format, and the bounds on one message."""

from __future__ import annotations

from dataclasses import dataclass

from rlbroker.errors import InvalidArgument

#: The version that this release writes, and the only one that it reads.
FORMAT_VERSION: int = 1


@dataclass(frozen=True, slots=True)
class Limits:
    """Upper bounds of one message, checked before anything is allocated.

    Attributes:
        max_raw_bytes: bytes of all arrays together once decompressed, and of all arrays that are cast back. Raise it to
            read weights larger than 1 GiB.
        max_header_bytes: bytes of the header. Python objects built from it take up to about 70 times as much.
        max_leaves: number of distinct arrays and tensors.
        max_depth: nesting of dictionaries, lists and tuples; at most 200.
    """

    max_raw_bytes: int = 1 << 30
    max_header_bytes: int = 16 << 20
    max_leaves: int = 1_000_000
    max_depth: int = 64

    def __post_init__(self) -> None:
        """Raise InvalidArgument for a depth that Python's recursion limit does not allow."""
        if self.max_depth > 200:
            raise InvalidArgument(f"max_depth must be at most 200; got {self.max_depth}")


#: The bounds of readers by default. Writers refuse values beyond them, because most readers would.
DEFAULT_LIMITS = Limits()
