"""Decoded versions in memory: in the cache that the processes of a host share, or in this process alone."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property
from pathlib import Path
from typing import Any, Final

import numpy as np

from rlbroker.weights.host_cache.cache import HostCache, SharedDraft
from rlbroker.weights.host_cache.image_files import Bytes

#: Smaller weights are not shared: downloading them is as fast as finding them in the cache.
MIN_SHARED_BYTES: Final = 64 << 10


class Image:
    """A decoded version, which is not written to any more. Its memory is released with the last reference to it."""

    def __init__(self, array: Bytes, header: bytes, release: Callable[[], None] | None = None) -> None:
        """Wrap the bytes of a version, and the header that describes them."""
        self.array, self.header = array, header
        if release:
            weakref.finalize(self, release).atexit = False


class Draft:
    """Memory for a version that is being written."""

    def __init__(
        self, array: Bytes, shared: SharedDraft | None = None, *, published: Image | None = None
    ) -> None:
        """Wrap memory to write to, possibly shared, or an image that was published before and is published again."""
        self.array, self._shared, self._published = array, shared, published

    def publish(self, name: str, header: bytes) -> Image:
        """Publish the image on this host; if it was published before, it keeps its first name."""
        if self._published is not None:
            return self._published
        if self._shared is None:
            return Image(self.array, header)
        found, self._shared = self._shared.publish(name, header), None
        return Image(found.image, header, found.release)

    def abandon(self) -> None:
        """Release the memory, unless it was published."""
        if self._shared is not None:
            self._shared.abandon()


class ImageStore:
    """The images of one run, for one process."""

    def __init__(self, run: str, directory: Path | None) -> None:
        """Use a cache in a directory such as /dev/shm, shared by the processes of this host; None for no cache."""
        self._run, self._directory = run, directory
        self._closed = False

    def shares(self, raw_bytes: int) -> bool:
        """Return whether the processes of this host share one download of a version of this size."""
        return self._cache_for(raw_bytes) is not None

    def find(self, name: str, raw_bytes: int) -> Image | None:
        """Return an image that a process of this host has published; None if there is none."""
        cache = self._cache_for(raw_bytes)
        found = cache.find(name) if cache else None
        return Image(found.image, found.header, found.release) if found else None

    def claim(self, name: str, raw_bytes: int) -> AbstractContextManager[Any] | None:
        """Claim the right to make an image; None while another process of this host has it."""
        cache = self._cache_for(raw_bytes)
        return cache.claim(name) if cache else nullcontext()

    def reserve(self, image_bytes: int, raw_bytes: int) -> Draft:
        """Return memory for a version."""
        cache = self._cache_for(raw_bytes)
        shared = cache.reserve(image_bytes) if cache else None
        return Draft(shared.image, shared) if shared else Draft(np.empty(image_bytes, np.uint8))

    def close(self) -> None:
        """Leave the cache; the last process to leave empties it."""
        if not self._closed and "_cache" in self.__dict__ and self._cache:
            self._cache.close()
        self._closed = True

    def _cache_for(self, raw_bytes: int) -> HostCache | None:
        return self._cache if raw_bytes >= MIN_SHARED_BYTES and not self._closed else None

    @cached_property
    def _cache(self) -> HostCache | None:
        return HostCache.open(self._run, self._directory) if self._directory else None
