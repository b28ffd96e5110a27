"""The image files in a run's folder: created, reused, mapped, and removed.

An image file holds the bytes of all weights, then a header, then a footer. A process that uses an image holds a shared
lock on its file. A process that gets the exclusive lock may write another image into the file, which is much faster
than writing into new memory. Before that it renames the file to a *draft*, which no process opens as an image.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import secrets
import struct
from typing import Final

import numpy as np
import xxhash
from numpy.typing import NDArray

from rlbroker.weights.host_cache.folder import FileLock, Folder

Bytes = NDArray[np.uint8]

#: Prefixes of file names.
IMAGE: Final = "image-"
DRAFT: Final = "draft-"

#: The footer: mark, bytes of the image, bytes of the header, digest of the image's size and the header.
_FOOTER: Final = struct.Struct("<8sQQQ")
_MARK: Final = b"rlbimg1\n"

#: A new file has this much room for header and footer; it grows for larger headers.
_HEADER_ROOM: Final = 64 << 10

#: At most this share of the file system's free space is taken.
_FREE_SHARE: Final = 0.75

#: How often a new file is made if other processes remove it before it is locked.
_TRIES: Final = 10


class ImageFiles:
    """The image files in one folder, and the memory in which this process has mapped them."""

    def __init__(self, folder: Folder, keep: int) -> None:
        """Use an entered folder, in which `keep` unused images stay."""
        self.folder, self._keep = folder, keep
        #: By inode, and whether it is writable. Versions alternate between few files, and touching pages for the first
        #: time costs more than copying them.
        self._mapped: dict[tuple[int, bool], mmap.mmap] = {}

    def reserve(self, image_bytes: int) -> tuple[str, FileLock]:
        """Return a draft that is large enough: an unused file if possible, and new memory otherwise.

        Raise OSError if there is no room.
        """
        file_bytes = -(-(image_bytes + _HEADER_ROOM) // mmap.PAGESIZE) * mmap.PAGESIZE
        return self._recycle(file_bytes) or self._create(file_bytes)

    def publish(self, draft: str, lock: FileLock, image_bytes: int, file: str, header: bytes) -> Bytes:
        """Complete a draft, rename it, remove superfluous images, and map it for reading.

        Raises:
            OSError: the draft was removed, or there is no room for the header.
        """
        if not lock.is_at(self.folder.fd, draft):
            raise OSError("the cache was closed, or removed")
        _write_end(lock.fd, image_bytes, header)
        os.replace(draft, file, src_dir_fd=self.folder.fd, dst_dir_fd=self.folder.fd)
        self._trim(file)
        return self.map(lock, image_bytes, writable=False)

    def read(self, lock: FileLock) -> tuple[Bytes, bytes] | None:
        """Map a locked image and return it with its header; None if the file is damaged."""
        found = _read_end(lock.fd)
        if found is None:
            return None
        image_bytes, header = found
        return self.map(lock, image_bytes, writable=False), header

    def map(self, lock: FileLock, image_bytes: int, *, writable: bool) -> Bytes:
        """Return the bytes of an image: in shared memory if writable, in private memory otherwise.

        Writes to private memory do not reach the file. The file has all its pages, and no process makes it smaller.
        """
        key = os.fstat(lock.fd).st_ino, writable
        memory = self._mapped.get(key)
        if memory is None or len(memory) < image_bytes:
            self._unmap_all_but(set(self.folder.files().values()))
            memory = self._mapped[key] = _map(lock, writable=writable)
        return np.frombuffer(memory, np.uint8, image_bytes)

    def leave(self) -> None:
        """Unmap all files and leave the folder."""
        self._unmap_all_but(set())
        self.folder.leave()

    def _unmap_all_but(self, inodes: set[int]) -> None:
        """Unmap files that were removed: only then is their memory freed."""
        for key in list(self._mapped):
            if key[0] not in inodes:
                self._mapped.pop(key, None)

    def _recycle(self, file_bytes: int) -> tuple[str, FileLock] | None:
        """Make a draft of an unused file of the right size; remove the drafts of dead processes."""
        taken = None
        for name in self.folder.files():
            if name.startswith(DRAFT):
                if taken is None:
                    taken = self._take_over(name, file_bytes)
                else:
                    with contextlib.suppress(OSError):
                        remove_unused(self.folder, name)
        for name in reversed(self._images()[self._keep - 1 :]):
            taken = taken or self._take_over(name, file_bytes)
        return taken

    def _take_over(self, name: str, file_bytes: int) -> tuple[str, FileLock] | None:
        """Make a draft of a file if it is unused and has the right size; remove it if only the size is wrong."""
        folder_fd = self.folder.fd
        lock = FileLock.take(folder_fd, name, exclusive=True)
        if lock is None:
            return None
        try:
            if not file_bytes <= os.fstat(lock.fd).st_size <= 2 * file_bytes:
                os.unlink(name, dir_fd=folder_fd)
            else:
                draft = _draft_name()
                os.rename(name, draft, src_dir_fd=folder_fd, dst_dir_fd=folder_fd)
                # From here on a shared lock keeps other processes from locking the file exclusively, and it becomes
                # the image's lock. Between the two locks another process may take the file; then this draft is lost.
                if lock.change(exclusive=False) and lock.is_at(folder_fd, draft):
                    return draft, lock
        except BaseException:
            lock.release()
            raise
        lock.release()
        return None

    def _create(self, file_bytes: int) -> tuple[str, FileLock]:
        """Make a draft of new memory."""
        folder_fd = self.folder.fd
        space = os.fstatvfs(folder_fd)
        free = int(space.f_bavail * space.f_frsize * _FREE_SHARE)
        if file_bytes > free:
            raise OSError(f"the file system has only {free} bytes to spare")
        for _ in range(_TRIES):
            name = _draft_name()
            flags = os.O_RDWR | os.O_CREAT | os.O_EXCL
            # Before it is locked, another process may take it for the draft of a dead process, and remove it.
            lock = FileLock.take(folder_fd, name, exclusive=False, flags=flags)
            if lock is None:
                continue
            try:
                os.posix_fallocate(lock.fd, 0, file_bytes)
            except BaseException:
                os.unlink(name, dir_fd=folder_fd)
                lock.release()
                raise
            return name, lock
        raise OSError("other processes removed each new file")

    def _trim(self, newest: str) -> None:
        """Remove the oldest unused images, so that `keep` stay."""
        unused = 0
        for name in self._images():
            lock = FileLock.take(self.folder.fd, name, exclusive=True) if name != newest else None
            if lock:
                unused += 1
                if unused >= self._keep:
                    with contextlib.suppress(OSError):
                        os.unlink(name, dir_fd=self.folder.fd)
                lock.release()

    def _images(self) -> list[str]:
        """Return the names of image files, newest first."""
        found = []
        for name in self.folder.files():
            if name.startswith(IMAGE):
                with contextlib.suppress(FileNotFoundError):
                    found.append((os.stat(name, dir_fd=self.folder.fd).st_mtime_ns, name))
        return [name for _, name in sorted(found, reverse=True)]


def remove_unused(folder: Folder, name: str) -> None:
    """Remove a file unless it is locked."""
    lock = FileLock.take(folder.fd, name, exclusive=True)
    if lock:
        try:
            os.unlink(name, dir_fd=folder.fd)
        finally:
            lock.release()


def _draft_name() -> str:
    return f"{DRAFT}{secrets.token_hex(8)}"


def _map(lock: FileLock, *, writable: bool) -> mmap.mmap:
    # Opened again: `mmap` keeps a copy of the descriptor, which would keep the lock in a forked child.
    again = os.open(f"/proc/self/fd/{lock.fd}", os.O_RDWR if writable else os.O_RDONLY)
    try:
        # Private pages show the file as it is as long as they are not written to, and numpy and torch accept them as
        # writable memory.
        flags = mmap.MAP_SHARED if writable else mmap.MAP_PRIVATE
        return mmap.mmap(again, os.fstat(again).st_size, flags, mmap.PROT_READ | mmap.PROT_WRITE)
    finally:
        os.close(again)


def _write_end(fd: int, image_bytes: int, header: bytes) -> None:
    """Write header and footer to the end of the file, which grows if they do not fit behind the image."""
    size = os.fstat(fd).st_size
    needed = image_bytes + len(header) + _FOOTER.size
    if needed > size:
        os.posix_fallocate(fd, 0, needed)
        size = needed
    footer = _FOOTER.pack(_MARK, image_bytes, len(header), _digest(image_bytes, header))
    os.pwrite(fd, header + footer, size - len(header) - _FOOTER.size)


def _read_end(fd: int) -> tuple[int, bytes] | None:
    """Read the image's size and its header from the end of the file; return None if they are not valid."""
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
