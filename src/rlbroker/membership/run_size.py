"""The size of a run, and the jitter before a download that follows from it: not all workers may download at once."""

from __future__ import annotations

from typing import Final, NamedTuple

import xxhash

#: Downloads that may run at the same time: a run with no more than these needs no jitter.
AT_ONCE: Final = 8

#: Bytes per second that a server is assumed to send. The jitter must not cost more time than it saves.
BYTES_PER_SECOND: Final = 2e9

#: The fixed cost of a download for server and learner: polls, and an acknowledgement to settle.
DOWNLOAD_SECONDS: Final = 0.0002

#: Upper bound of the jitter.
LONGEST_SECONDS: Final = 2.0


class RunSize(NamedTuple):
    """The size of a run, as its learner counted it last; zeros before that."""

    members: int = 0  #: workers that are alive
    hosts: int = 0  #: hosts that they run on

    def wait_seconds(self, version: int, stored_bytes: int, *, name: str, shared: bool) -> float:
        """Return how long to wait before downloading a version: a fixed share of the time that all downloads take.

        Args:
            version: the version to download; each version gives another order.
            stored_bytes: the size of the download.
            name: name of the host or worker; equal names wait equally long.
            shared: whether the workers of a host share one download.
        """
        downloads = self.hosts if shared else self.members
        each_seconds = DOWNLOAD_SECONDS + stored_bytes / BYTES_PER_SECOND
        share = xxhash.xxh3_64_intdigest(f"{name}:{version}".encode()) / 2**64
        return share * min(LONGEST_SECONDS, max(0, downloads - AT_ONCE) * each_seconds)
