"""How many ask for each version, and how long each of them waits, so that many do not all ask at once."""

from __future__ import annotations

from typing import Final, NamedTuple

import xxhash

#: So many downloads at the same time are no crowd: nobody waits for another.
AT_ONCE: Final = 8

#: Bytes that a server sends in a second, as a guess: waiting must not take longer than what it spares.
BYTES_PER_SECOND: Final = 2e9

#: What a download costs server and learner besides its bytes: looks, and an acknowledgement to settle.
DOWNLOAD_SECONDS: Final = 0.0002

#: The longest that anybody waits.
LONGEST_SECONDS: Final = 2.0


class RunSize(NamedTuple):
    """Who takes part in a run, as its learner counts them; zero where it has not yet."""

    members: int = 0  #: workers that were heard of within their lease
    hosts: int = 0  #: on which they run

    def wait_seconds(self, version: int, stored_bytes: int, *, name: str, shared: bool) -> float:
        """Give how long to wait before a version is downloaded. Whoever has the same name waits equally long.

        Args:
            version: which.
            stored_bytes: what is downloaded.
            name: of the host, or of the worker.
            shared: whether the workers of a host share one download.
        """
        downloads = self.hosts if shared else self.members
        each_seconds = DOWNLOAD_SECONDS + stored_bytes / BYTES_PER_SECOND
        share = xxhash.xxh3_64_intdigest(f"{name}:{version}".encode()) / 2**64
        return share * min(LONGEST_SECONDS, max(0, downloads - AT_ONCE) * each_seconds)
