"""The check of this machine: room for the host cache, in which workers on one machine share weights."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from typing import Final

from rlbroker.config import host_cache_place
from rlbroker.ops.doctor.checks import Check
from rlbroker.ops.formatting import format_bytes
from rlbroker.ops.inspect.snapshot import Snapshot

#: Images that may exist at once: of the latest version, the one before, and the next while it is made.
_IMAGES: Final = 3

#: The largest share of the free space that the images may take.
_FREE_SHARE: Final = 0.75


def check_host_cache(snapshot: Snapshot | None) -> Check:
    """Check whether the latest weights fit into this machine's host cache."""
    place = host_cache_place(True)
    if place is None:
        return Check("host_cache", "ok", "weights are not shared on this machine: RLBROKER_HOST_CACHE is off")
    if sys.platform != "linux":
        return Check("host_cache", "ok", "weights are not shared on this machine: this works on Linux only")
    elsewhere = f"export RLBROKER_HOST_CACHE={tempfile.gettempdir()}"
    if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
        what = f"{place} is not writable: each worker on this machine downloads the weights itself"
        return Check("host_cache", "warning", what, elsewhere)
    free = shutil.disk_usage(place).free
    manifest = snapshot.manifest if snapshot else None
    if manifest is None:
        what = f"{place} has {format_bytes(free)} free to share weights on this machine"
        return Check("host_cache", "ok", what)
    needed = _IMAGES * manifest.raw_bytes
    what = f"{place} has {format_bytes(free)} free for up to {_IMAGES} versions of {format_bytes(manifest.raw_bytes)}"
    if needed > _FREE_SHARE * free:
        what += ": workers on this machine may each download them"
        return Check("host_cache", "warning", what, elsewhere)
    return Check("host_cache", "ok", what)
