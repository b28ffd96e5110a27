"""Files of images: how they end, and how a process maps them."""

from __future__ import annotations

import mmap
import os
import struct
from typing import Final

import numpy as np
import xxhash
from numpy.typing import NDArray

from rlbroker.weights.host_cache.file_lock import Lock
from rlbroker.weights.host_cache.folder import Folder

Image = NDArray[np.uint8]

#: The end of an image's file: a mark, bytes of the image, bytes of the header, digest of these and the header.
_FOOTER: Final = struct.Struct("<8sQQQ")
_MARK: Final = b"rlbimg1\n"


class MappedFiles:
    """Files that this process has mapped, by inode, for as long as they are in the folder.

    Versions alternate between few files, and touching pages for the first time costs more than copying them.
    """

    def __init__(self) -> None:
        """Begin with none."""
        self._known: dict[tuple[int, bool], mmap.mmap] = {}

    def get(self, folder: Folder, lock: Lock, image_bytes: int, *, writable: bool) -> Image:
        """Give an image's bytes, in memory that is shared (writable) or private, which writes would not leave.

        The file has all its pages, and nobody makes it smaller.
        """
        key = os.fstat(lock.fd).st_ino, writable
        memory = self._known.get(key)
        if memory is None or len(memory) < image_bytes:
            self.forget(set(folder.files().values()))
            memory = self._known[key] = _map(lock, writable=writable)
        return np.frombuffer(memory, np.uint8, image_bytes)

    def forget(self, present: set[int]) -> None:
        """Let go of files that are not there any more: their memory is only freed then."""
        for key in list(self._known):
            if key[0] not in present:
                self._known.pop(key, None)


def _map(lock: Lock, *, writable: bool) -> mmap.mmap:
    # Opened anew: `mmap` keeps a copy of the descriptor, which would keep the lock in a forked child.
    fd = os.open(f"/proc/self/fd/{lock.fd}", os.O_RDWR if writable else os.O_RDONLY)
    try:
        # Private pages that are not written to show the file as it is now, and numpy and torch take them for writable.
        flags = mmap.MAP_SHARED if writable else mmap.MAP_PRIVATE
        return mmap.mmap(fd, os.fstat(fd).st_size, flags, mmap.PROT_READ | mmap.PROT_WRITE)
    finally:
        os.close(fd)


def write_end(fd: int, image_bytes: int, header: bytes) -> None:
    """Write header and footer to the end of the file, which grows if they do not fit behind the image."""
    size = os.fstat(fd).st_size
    needed = image_bytes + len(header) + _FOOTER.size
    if needed > size:
        os.posix_fallocate(fd, 0, needed)
        size = needed
    footer = _FOOTER.pack(_MARK, image_bytes, len(header), _digest(image_bytes, header))
    os.pwrite(fd, header + footer, size - len(header) - _FOOTER.size)


def read_end(fd: int) -> tuple[int, bytes] | None:
    """Read the bytes of the image and its header from the end of the file; None if they cannot be true."""
    size = os.fstat(fd).st_size
    if size < _FOOTER.size:
        return None
    mark, image_bytes, header_bytes, digest = _FOOTER.unpack(os.pread(fd, _FOOTER.size, size - _FOOTER.size))
    if mark != _MARK or image_bytes + header_bytes + _FOOTER.size > size:
        return None
    header = os.pread(fd, header_bytes, size - _FOOTER.size - header_bytes)
    return (image_bytes, header) if digest == _digest(image_bytes, header) else None


def _digest(image_bytes: int, header: bytes) -> int:
    return xxhash.xxh3_64_intdigest(header, seed=image_bytes)
