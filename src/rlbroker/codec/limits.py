"""What a reader accepts at most, checked before anything is allocated."""

from __future__ import annotations

from dataclasses import dataclass

from rlbroker.errors import InvalidArgument


@dataclass(frozen=True, slots=True)
class Limits:
    """Upper bounds of one message.

    ``max_raw_bytes`` bounds the sum of all arrays once decompressed, and that of those that are cast back; a
    reader of weights larger than 1 GiB must raise it. ``max_header_bytes`` bounds the header: building Python
    objects from it takes up to some 70 times its size. ``max_leaves`` bounds the number of distinct arrays and
    tensors, and ``max_depth`` the nesting of dictionaries, lists and tuples.
    """

    max_raw_bytes: int = 1 << 30
    max_header_bytes: int = 16 << 20
    max_leaves: int = 1_000_000
    max_depth: int = 64

    def __post_init__(self) -> None:
        """Refuse a depth at which Python's own recursion limit would come first."""
        if self.max_depth > 200:
            raise InvalidArgument(f"max_depth={self.max_depth}; 200 is the most")


#: What readers accept unless told otherwise; writers refuse what no such reader could take apart.
DEFAULT_LIMITS = Limits()
