"""The version of the wire format, and the most that a reader accepts of one message."""

from __future__ import annotations

from dataclasses import dataclass

from rlbroker.errors import InvalidArgument

#: The version that this release writes, and the only one that it reads.
FORMAT_VERSION: int = 1


@dataclass(frozen=True, slots=True)
class Limits:
    """Upper bounds of one message, checked before anything is allocated.

    Attributes:
        max_raw_bytes: of all arrays together once decompressed, and of those that are cast back. To read weights
            larger than 1 GiB, raise it.
        max_header_bytes: of the header. Building Python objects from it takes up to about 70 times its size.
        max_leaves: distinct arrays and tensors.
        max_depth: nesting of dictionaries, lists and tuples; 200 is the most.
    """

    max_raw_bytes: int = 1 << 30
    max_header_bytes: int = 16 << 20
    max_leaves: int = 1_000_000
    max_depth: int = 64

    def __post_init__(self) -> None:
        """Refuse a depth at which Python's own recursion limit would be reached first."""
        if self.max_depth > 200:
            raise InvalidArgument(f"max_depth={self.max_depth}; 200 is the most")


#: What readers accept by default. Writers refuse what exceeds it, as most readers could not read it.
DEFAULT_LIMITS = Limits()
