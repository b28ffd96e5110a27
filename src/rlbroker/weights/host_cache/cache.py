"""Decoded weights in memory that all processes of a host share, so that a version is fetched and decoded once.

Of each version there is one file, its *image*: the bytes of all weights, then its header, then a footer. Who uses
an image holds a shared lock on its file; who gets the exclusive one may write another image into it, which is much
faster than into new memory. Before that the file is renamed to that of a *draft*, which nobody looks for.
"""

from __future__ import annotations

import contextlib
import logging
import mmap
import os
import re
import secrets
import sys
from pathlib import Path
from typing import Final, Self

from rlbroker.errors import InvalidArgument
from rlbroker.weights.host_cache.file_lock import Lock
from rlbroker.weights.host_cache.folder import Folder, Refused
from rlbroker.weights.host_cache.image_files import Image, MappedFiles, read_end, write_end

logger = logging.getLogger("rlbroker")

#: What the names of files begin with.
_IMAGE: Final = "image-"
_DRAFT: Final = "draft-"
_CLAIM: Final = "claim-"

#: A new file has this much room for its header and footer; it grows for larger ones.
_HEADER_ROOM: Final = 64 << 10

#: Of the file system's free space at most this share is taken.
_FREE_SHARE: Final = 0.75

#: A file is made or taken over anew so often if another process gets in between.
_TRIES: Final = 10


class HostCache:
    """One run's images, shared by the processes of one user on one host. Safe to use from several threads."""

    def __init__(self, folder: Folder, keep: int) -> None:
        """Take over an entered folder; use `open`."""
        self._folder: Folder | None = folder
        self._keep = keep
        self._pid = os.getpid()
        self._mapped = MappedFiles()
        self._said: set[str] = set()

    @classmethod
    def open(cls, run: str, directory: Path, *, keep: int = 2) -> Self | None:
        """Join those who share the images of a run; None, and the reason is logged, where that is impossible.

        Args:
            run: the run's name.
            directory: where, such as `/dev/shm`.
            keep: how many images stay that nobody uses, at least 1.

        Raises:
            InvalidArgument: `keep` is below 1.
        """
        if keep < 1:
            raise InvalidArgument(f"keep must be at least 1, not {keep}")
        if sys.platform != "linux":
            logger.info("weights are shared by the processes of a host on Linux only")
            return None
        try:
            return cls(Folder.enter(directory, run), keep)
        except (Refused, OSError) as error:
            logger.warning("weights are not shared with other processes of this host: %s", error)
            return None

    def find(self, name: str) -> SharedImage | None:
        """Map an image that someone has put in place; None if it is not there, or not any more."""
        file = _IMAGE + _checked(name)
        folder = self._in_use()
        if folder is None:
            return None
        try:
            lock = Lock.take(folder.fd, file, exclusive=False, flags=os.O_RDONLY)
            return self._open_image(folder, file, lock) if lock else None
        except OSError as error:
            self._say("cannot use the shared weights %s: %s", name, error)
            return None

    def claim(self, name: str) -> Claim | None:
        """Take the exclusive right to make an image, without waiting.

        None if another living process has it, or was just about to give it back: look for the image then, and ask
        again. Where claims cannot be made, everyone gets one: nobody shall wait for nobody.
        """
        file = _CLAIM + _checked(name)
        folder = self._in_use()
        if folder is None:
            return Claim()
        try:
            for other in folder.files():
                if other.startswith(_CLAIM) and other != file:
                    _remove_unused(folder, other)  # left by a dead process
            lock = Lock.take(folder.fd, file, exclusive=True, flags=os.O_RDWR | os.O_CREAT)
        except OSError as error:
            self._say("cannot claim the shared weights %s: %s", name, error)
            return Claim()
        return Claim(folder, file, lock) if lock else None

    def reserve(self, image_bytes: int) -> Draft | None:
        """Give memory for a new image to this process alone, that of an old image if possible; None without room.

        What it holds before it is filled is arbitrary.
        """
        folder = self._in_use()
        if folder is None:
            return None
        file_bytes = -(-(image_bytes + _HEADER_ROOM) // mmap.PAGESIZE) * mmap.PAGESIZE
        lock = None
        try:
            name, lock = self._recycle(folder, file_bytes) or self._create(folder, file_bytes)
            image = self._mapped.get(folder, lock, image_bytes, writable=True)
            return Draft(self, name, lock, image)
        except OSError as error:
            if lock:
                lock.release()
            self._say("no room for %d bytes of shared weights: %s", image_bytes, error)
            return None

    def close(self) -> None:
        """Leave; the last one removes everything. Images, drafts and claims that are out stay valid till released."""
        folder = self._in_use()
        self._folder = None
        if folder:
            self._mapped.forget(set())
            folder.leave()

    def _in_use(self) -> Folder | None:
        """Give the folder, unless this is closed, or a forked child."""
        return self._folder if os.getpid() == self._pid else None

    def _say(self, message: str, *facts: object) -> None:
        if message not in self._said:
            self._said.add(message)
            logger.warning(message, *facts)

    def _open_image(self, folder: Folder, file: str, lock: Lock) -> SharedImage | None:
        """Map a locked image; take over the lock, or release it."""
        try:
            facts = read_end(lock.fd)
            if facts:
                image_bytes, header = facts
                image = self._mapped.get(folder, lock, image_bytes, writable=False)
                return SharedImage(image, header, lock)
        except BaseException:
            lock.release()
            raise
        lock.release()
        self._say("the shared weights %s are damaged", file)
        return None

    def _recycle(self, folder: Folder, file_bytes: int) -> tuple[str, Lock] | None:
        """Make a draft of a file that nobody uses, of the right size; remove the drafts of dead processes."""
        taken = None
        for name in folder.files():
            if name.startswith(_DRAFT):
                if taken is None:
                    taken = _take_over(folder, name, file_bytes)
                else:
                    with contextlib.suppress(OSError):
                        _remove_unused(folder, name)
        for name in reversed(_images(folder)[self._keep - 1 :]):
            taken = taken or _take_over(folder, name, file_bytes)
        return taken

    def _trim(self, folder: Folder, newest: str) -> None:
        """Remove the oldest images that nobody uses, so that `keep` stay."""
        unused = 0
        for name in _images(folder):
            lock = Lock.take(folder.fd, name, exclusive=True) if name != newest else None
            if lock:
                unused += 1
                if unused >= self._keep:
                    with contextlib.suppress(OSError):
                        os.unlink(name, dir_fd=folder.fd)
                lock.release()

    def _create(self, folder: Folder, file_bytes: int) -> tuple[str, Lock]:
        """Make a draft of new memory; OSError without room."""
        space = os.fstatvfs(folder.fd)
        free = int(space.f_bavail * space.f_frsize * _FREE_SHARE)
        if file_bytes > free:
            raise OSError(f"the file system has only {free} bytes to spare")
        for _ in range(_TRIES):
            name = _draft_name()
            flags = os.O_RDWR | os.O_CREAT | os.O_EXCL
            # Until it is locked, another process may take it for one of a dead process, and remove it.
            lock = Lock.take(folder.fd, name, exclusive=False, flags=flags)
            if lock is None:
                continue
            try:
                os.posix_fallocate(lock.fd, 0, file_bytes)
            except BaseException:
                os.unlink(name, dir_fd=folder.fd)
                lock.release()
                raise
            return name, lock
        raise OSError("other processes removed what was made")

    def _put_in_place(self, draft: str, lock: Lock, image_bytes: int, file: str, header: bytes) -> Image:
        """Finish a draft, rename it, remove images that need not stay, and map it for reading."""
        folder = self._in_use()
        if folder is None or not lock.is_at(folder.fd, draft):
            raise OSError("the cache was closed, or removed")
        write_end(lock.fd, image_bytes, header)
        os.replace(draft, file, src_dir_fd=folder.fd, dst_dir_fd=folder.fd)
        self._trim(folder, file)
        return self._mapped.get(folder, lock, image_bytes, writable=False)


class Draft:
    """Memory for a new image, of this process alone until it is published.

    Attributes:
        image: the memory, to be filled.
    """

    def __init__(self, cache: HostCache, file: str, lock: Lock, image: Image) -> None:
        """Take over a locked file and its memory; use `HostCache.reserve`."""
        self.image = image
        self._cache, self._file = cache, file
        self._lock: Lock | None = lock

    def publish(self, name: str, header: bytes) -> SharedImage:
        """Put the image in place for all, with its header, and use it; do not write to it any more.

        Where that fails, which is logged, the image serves this process alone.

        Raises:
            RuntimeError: it was published or abandoned before.
        """
        file = _IMAGE + _checked(name)
        lock, self._lock = self._lock, None
        if lock is None:
            raise RuntimeError("a draft is published once")
        image = self.image
        try:
            image = self._cache._put_in_place(self._file, lock, image.nbytes, file, header)
        except OSError as error:
            self._cache._say("the weights %s are not shared: %s", name, error)
        return SharedImage(image, header, lock)

    def abandon(self) -> None:
        """Give the memory back, for the next draft; nothing if it was published."""
        lock, self._lock = self._lock, None
        if lock:
            lock.release()


class SharedImage:
    """An image in use. It is not to be written to, and not to be read after its release.

    Attributes:
        image: its bytes.
        header: what was published with them.
    """

    def __init__(self, image: Image, header: bytes, lock: Lock) -> None:
        """Take over a locked image; use `HostCache.find` or `Draft.publish`."""
        self.image, self.header = image, header
        self._lock = lock

    def release(self) -> None:
        """Use it no longer: another image may be written into its memory."""
        self._lock.release()


class Claim:
    """The exclusive right to make an image; it ends with `release`, with a `with` block, or with the process."""

    def __init__(self, folder: Folder | None = None, file: str = "", lock: Lock | None = None) -> None:
        """Take over the exclusively locked file, if there is one; use `HostCache.claim`."""
        self._folder, self._file, self._lock = folder, file, lock

    def release(self) -> None:
        """Give the right back."""
        if self._folder and self._lock and self._lock.is_held:
            with contextlib.suppress(OSError):
                os.unlink(self._file, dir_fd=self._folder.fd)
            self._lock.release()

    def __enter__(self) -> Self:
        """Give the claim."""
        return self

    def __exit__(self, *error: object) -> None:
        """Release it."""
        self.release()


def _images(folder: Folder) -> list[str]:
    """Name the files of images, the newest first."""
    found = []
    for name in folder.files():
        if name.startswith(_IMAGE):
            with contextlib.suppress(FileNotFoundError):
                found.append((os.stat(name, dir_fd=folder.fd).st_mtime_ns, name))
    return [name for _, name in sorted(found, reverse=True)]


def _take_over(folder: Folder, name: str, file_bytes: int) -> tuple[str, Lock] | None:
    """Make a draft of a file if nobody uses it and its size is right; remove it if only that is wrong."""
    lock = Lock.take(folder.fd, name, exclusive=True)
    if lock is None:
        return None
    try:
        if not file_bytes <= os.fstat(lock.fd).st_size <= 2 * file_bytes:
            os.unlink(name, dir_fd=folder.fd)
        else:
            draft = _draft_name()
            os.rename(name, draft, src_dir_fd=folder.fd, dst_dir_fd=folder.fd)
            # A shared lock is enough from now on, and it becomes the image's: nobody else may lock the file
            # exclusively. Between the two locks another process may; then the file is no draft of ours any more.
            if lock.change(exclusive=False) and lock.is_at(folder.fd, draft):
                return draft, lock
    except BaseException:
        lock.release()
        raise
    lock.release()
    return None


def _remove_unused(folder: Folder, name: str) -> None:
    lock = Lock.take(folder.fd, name, exclusive=True)
    if lock:
        try:
            os.unlink(name, dir_fd=folder.fd)
        finally:
            lock.release()


def _draft_name() -> str:
    return f"{_DRAFT}{secrets.token_hex(8)}"


def _checked(name: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,199}", name):
        raise InvalidArgument(f"not a name for shared weights: {name!r}")
    return name
