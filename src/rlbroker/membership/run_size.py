"""The size of a run, and the jitter that keeps its workers from downloading a version all at once."""

from __future__ import annotations

from typing import Final, NamedTuple

import xxhash

#: Downloads that may run at the same time: a run with no more of them needs no jitter.
AT_ONCE: Final = 8

#: Bytes per second that a server is assumed to send. The jitter must not cost more time than it saves.
BYTES_PER_SECOND: Final = 2e9

#: The fixed cost of a download for server and learner: polls, and an acknowledgement to settle.
DOWNLOAD_SECONDS: Final = 0.0002

#: Upper bound of the jitter.
LONGEST_SECONDS: Final = 2.0


class RunSize(NamedTuple):
    """The size of a run, from its learner's latest count; zeros before the first."""

    members: int = 0  #: workers that are alive
    hosts: int = 0  #: hosts that they run on

    def wait_seconds(self, version: int, stored_bytes: int, *, name: str, shared: bool) -> float:
        """Return how long to wait before downloading a version: a fixed share of the time that all downloads take.

        Args:
            version: the version to download; the order of the downloads differs for each version.
            stored_bytes: the size of the download.
            name: name of the host or worker; equal names wait for the same time.
            shared: whether the workers of a host share one download.
        """
        downloads = self.hosts if shared else self.members
        each_seconds = DOWNLOAD_SECONDS + stored_bytes / BYTES_PER_SECOND
        share = xxhash.xxh3_64_intdigest(f"{name}:{version}".encode()) / 2**64
        return share * min(LONGEST_SECONDS, max(0, downloads - AT_ONCE) * each_seconds)
