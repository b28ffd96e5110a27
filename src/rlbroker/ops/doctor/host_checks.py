"""What an examination says of this machine: the memory in which its processes share weights."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from typing import Final

from rlbroker.config import host_cache_place
from rlbroker.ops.doctor.checks import Check, size
from rlbroker.ops.inspect.snapshot import Snapshot

#: Images of a version that are there at once: the latest, the one before, and the next while it is made.
_IMAGES: Final = 3

#: Of the free space at most this share is taken.
_FREE_SHARE: Final = 0.75


def of_host(snapshot: Snapshot | None) -> Check:
    """Judge whether the latest weights fit into this machine's cache, were a worker to run here."""
    place = host_cache_place(True)
    if place is None:
        return Check("host_cache", "ok", "weights are not shared on this machine: RLBROKER_HOST_CACHE is off")
    if sys.platform != "linux":
        return Check("host_cache", "ok", "weights are shared by the processes of a machine on Linux only")
    elsewhere = f"export RLBROKER_HOST_CACHE={tempfile.gettempdir()}"
    if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
        what = f"{place} cannot be written: each worker on this machine fetches weights for itself"
        return Check("host_cache", "warning", what, elsewhere)
    free = shutil.disk_usage(place).free
    pointer = snapshot.pointer if snapshot else None
    if pointer is None:
        return Check("host_cache", "ok", f"{size(free)} are free in {place} to share weights on this machine")
    needed = _IMAGES * pointer.raw_bytes
    what = f"{place} has {size(free)} free for weights of {size(pointer.raw_bytes)}, of which {_IMAGES} may be there"
    if needed > _FREE_SHARE * free:
        return Check("host_cache", "warning", f"{what}: workers here may each fetch them", elsewhere)
    return Check("host_cache", "ok", what)
