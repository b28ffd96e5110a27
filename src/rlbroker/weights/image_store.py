"""Where decoded versions are kept: in the cache of the host, which its processes share, or in our own memory."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from rlbroker.weights.host_cache import cache

#: Smaller weights are not shared: fetching them is as fast as looking for them.
MIN_SHARED_BYTES: Final = 64 << 10

Bytes = NDArray[np.uint8]


class Image:
    """A whole version, decoded: nobody writes to it any more. It is given up with the last reference to it."""

    def __init__(self, array: Bytes, header: bytes, release: Callable[[], None] | None = None) -> None:
        """Hold the bytes of a version, and the header that says what they are."""
        self.array, self.header = array, header
        if release:
            weakref.finalize(self, release).atexit = False


class Draft:
    """Memory for a version that is being written."""

    def __init__(
        self, array: Bytes, shared: cache.Draft | None = None, *, placed: Image | None = None
    ) -> None:
        """Write to this array, which may be shared memory; or take an image that was published before."""
        self.array, self._shared, self._placed = array, shared, placed

    def publish(self, name: str, header: bytes) -> Image:
        """Put the whole image in place, for all on this host who look for the name; the first name stays."""
        if self._placed is not None:
            return self._placed
        if self._shared is None:
            return Image(self.array, header)
        found, self._shared = self._shared.publish(name, header), None
        return Image(found.image, header, found.release)

    def abandon(self) -> None:
        """Give up the memory, unless it was published."""
        if self._shared is not None:
            self._shared.abandon()


class ImageStore:
    """The images of one run, for one process."""

    def __init__(self, run: str, directory: Path | None) -> None:
        """Share them with the processes of this host, in a directory such as /dev/shm; or not, without one."""
        self._run, self._directory = run, directory
        self._closed = False

    def shares(self, raw_bytes: int) -> bool:
        """Whether a version of this size is downloaded once for all processes of this host."""
        return self._cache_for(raw_bytes) is not None

    def find(self, name: str, raw_bytes: int) -> Image | None:
        """Give the image that someone on this host has put in place."""
        cache = self._cache_for(raw_bytes)
        found = cache.find(name) if cache else None
        return Image(found.image, found.header, found.release) if found else None

    def claim(self, name: str, raw_bytes: int) -> AbstractContextManager[Any] | None:
        """Give the right to make an image; None while another process of this host makes it."""
        cache = self._cache_for(raw_bytes)
        return cache.claim(name) if cache else nullcontext()

    def reserve(self, image_bytes: int, raw_bytes: int) -> Draft:
        """Give memory for a version."""
        cache = self._cache_for(raw_bytes)
        shared = cache.reserve(image_bytes) if cache else None
        return Draft(shared.image, shared) if shared else Draft(np.empty(image_bytes, np.uint8))

    def close(self) -> None:
        """Leave the cache; the last one to leave empties it."""
        if not self._closed and "_cache" in self.__dict__ and self._cache:
            self._cache.close()
        self._closed = True

    def _cache_for(self, raw_bytes: int) -> cache.HostCache | None:
        return self._cache if raw_bytes >= MIN_SHARED_BYTES and not self._closed else None

    @cached_property
    def _cache(self) -> cache.HostCache | None:
        return cache.HostCache.open(self._run, self._directory) if self._directory else None
