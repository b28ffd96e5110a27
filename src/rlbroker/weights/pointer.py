"""What the `weights` hash says of the latest version, and how its bytes are cut into chunks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Self

import xxhash

from rlbroker.errors import WireError

#: A chunk is closed once it holds this much. Values of 1 to 4 MB move fastest through Redis.
CHUNK_BYTES = 1 << 20


@dataclass(frozen=True)
class Pointer:
    """The commit of one version. Chunk 0 holds the header, chunks 1 to `chunks` its segments.

    Attributes:
        version: which version it is.
        upload: names its chunks: `<version>-<epoch>-<attempt>`.
        kind: `full`.
        raw_bytes: bytes of its tensors.
        stored_bytes: bytes of its chunks, header included.
        chunks: chunks that hold segments.
        chunk_bytes: a chunk was closed once it held this much.
        digest: xxh3_128 of the header, which holds the digest of each segment.
        codec: `blosc2` or `raw`.
        published: when, the learner's clock, seconds since the epoch.
        previous: the upload before, whose chunks are to expire; empty for the first.
        previous_chunks: chunks of it that hold segments.
    """

    version: int
    upload: str
    kind: str
    raw_bytes: int
    stored_bytes: int
    chunks: int
    chunk_bytes: int
    digest: str
    codec: str
    published: float
    previous: str = ""
    previous_chunks: int = 0

    def to_fields(self) -> dict[str, str]:
        """Give the fields of the hash."""
        return {
            "version": str(self.version),
            "upload": self.upload,
            "kind": self.kind,
            "raw_bytes": str(self.raw_bytes),
            "stored_bytes": str(self.stored_bytes),
            "chunks": str(self.chunks),
            "chunk_bytes": str(self.chunk_bytes),
            "digest": self.digest,
            "codec": self.codec,
            "published": f"{self.published:.3f}",
            "previous": self.previous,
            "previous_chunks": str(self.previous_chunks),
        }

    @classmethod
    def from_fields(cls, found: Mapping[str, str]) -> Self | None:
        """Read the fields of the hash; None if nothing was published yet.

        Raises:
            WireError: the hash is not what a learner writes.
        """
        if "version" not in found:
            return None
        try:
            return cls(
                version=int(found["version"]),
                upload=found["upload"],
                kind=found["kind"],
                raw_bytes=int(found["raw_bytes"]),
                stored_bytes=int(found["stored_bytes"]),
                chunks=int(found["chunks"]),
                chunk_bytes=int(found["chunk_bytes"]),
                digest=found["digest"],
                codec=found["codec"],
                published=float(found["published"]),
                previous=found.get("previous", ""),
                previous_chunks=int(found.get("previous_chunks", 0)),
            )
        except (KeyError, ValueError) as error:
            raise WireError(f"the pointer to the latest weights cannot be read: {error!r}") from error


def group(stored_bytes: Iterable[int], chunk_bytes: int) -> Iterator[range]:
    """Give for each chunk the segments it holds: whole ones, in order, until there is enough.

    Publisher and subscriber do the same sum, so the layout need not be sent.

    >>> list(group([4, 1, 1, 1, 5], chunk_bytes=3))
    [range(0, 1), range(1, 4), range(4, 5)]
    """
    first, size, last = 0, 0, -1
    for last, nbytes in enumerate(stored_bytes):
        size += nbytes
        if size >= chunk_bytes:
            yield range(first, last + 1)
            first, size = last + 1, 0
    if first <= last:
        yield range(first, last + 1)


def digest_of(header: bytes) -> str:
    """Give the digest of a header, as the pointer has it."""
    return xxhash.xxh3_128_hexdigest(header)
