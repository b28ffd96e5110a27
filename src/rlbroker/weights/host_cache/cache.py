"""Decoded weights in memory that all processes of a host share, so that each version is downloaded and decoded once."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import sys
from pathlib import Path
from typing import Final, Self

from rlbroker.errors import InvalidArgument
from rlbroker.weights.host_cache.folder import FileLock, Folder, UnusableFolder
from rlbroker.weights.host_cache.image_files import IMAGE, Bytes, ImageFiles, remove_unused

logger = logging.getLogger("rlbroker")

#: Prefix of the names of files that stand for claims.
_CLAIM: Final = "claim-"


class HostCache:
    """One run's images, shared by the processes of one user on one host. Safe to use from several threads."""

    def __init__(self, files: ImageFiles) -> None:
        """Take ownership of the files in an entered folder; call `open` instead."""
        self._files: ImageFiles | None = files
        self._pid = os.getpid()
        self._logged: set[str] = set()

    @classmethod
    def open(cls, run: str, directory: Path, *, keep: int = 2) -> Self | None:
        """Join the processes that share a run's images; if that is impossible, log the reason and return None.

        Args:
            directory: a directory such as `/dev/shm`.
            keep: unused images that stay, at least 1.

        Raises:
            InvalidArgument: `keep` is below 1.
        """
        if keep < 1:
            raise InvalidArgument(f"keep must be at least 1, not {keep}")
        if sys.platform != "linux":
            logger.info("weights are shared by the processes of a host on Linux only")
            return None
        try:
            return cls(ImageFiles(Folder.enter(directory, run), keep))
        except (UnusableFolder, OSError) as error:
            logger.warning("weights are not shared with other processes of this host: %s", str(error))
            return None

    def find(self, name: str) -> SharedImage | None:
        """Return an image that a process has published; None if there is none."""
        file = IMAGE + _check_name(name)
        files = self._open_files()
        if files is None:
            return None
        try:
            lock = FileLock.take(files.folder.fd, file, exclusive=False, flags=os.O_RDONLY)
            return self._use(files, file, lock) if lock else None
        except OSError as error:
            self._warn_once("cannot use the shared weights %s: %s", name, error)
            return None

    def claim(self, name: str) -> Claim | None:
        """Claim the exclusive right to make an image, without waiting.

        Return None if another living process has the claim or is just releasing it: call `find`, and try again. Where
        claims are impossible, return an uncontended claim, so that no process waits for nothing.
        """
        file = _CLAIM + _check_name(name)
        files = self._open_files()
        if files is None:
            return Claim()
        folder = files.folder
        try:
            for other in folder.files():
                if other.startswith(_CLAIM) and other != file:
                    remove_unused(folder, other)  # left by a dead process
            lock = FileLock.take(folder.fd, file, exclusive=True, flags=os.O_RDWR | os.O_CREAT)
        except OSError as error:
            self._warn_once("cannot claim the shared weights %s: %s", name, error)
            return Claim()
        return Claim(folder, file, lock) if lock else None

    def reserve(self, image_bytes: int) -> SharedDraft | None:
        """Return memory for a new image, private to this process; None if there is no room. Its content is arbitrary.

        The memory of an old image is reused if possible.
        """
        files = self._open_files()
        if files is None:
            return None
        lock = None
        try:
            file, lock = files.reserve(image_bytes)
            return SharedDraft(self, file, lock, files.map(lock, image_bytes, writable=True))
        except OSError as error:
            if lock:
                lock.release()
            self._warn_once("no room for %d bytes of shared weights: %s", image_bytes, error)
            return None

    def close(self) -> None:
        """Leave the cache; the last process removes it. Images, drafts and claims stay valid until released."""
        files = self._open_files()
        self._files = None
        if files:
            files.leave()

    def _open_files(self) -> ImageFiles | None:
        """Return the files, unless this cache is closed or this is a forked child."""
        return self._files if os.getpid() == self._pid else None

    def _warn_once(self, message: str, *arguments: object) -> None:
        if message not in self._logged:
            self._logged.add(message)
            logger.warning(message, *arguments)

    def _use(self, files: ImageFiles, file: str, lock: FileLock) -> SharedImage | None:
        """Map a locked image and take ownership of its lock; release the lock if the image is damaged."""
        try:
            found = files.read(lock)
            if found:
                return SharedImage(*found, lock)
        except BaseException:
            lock.release()
            raise
        lock.release()
        self._warn_once("the shared weights %s are damaged", file)
        return None

    def _publish(self, draft: str, lock: FileLock, image: Bytes, name: str, header: bytes) -> Bytes:
        """Publish a draft; if that is impossible, log the reason and return the draft's own memory."""
        files = self._open_files()
        try:
            if files is None:
                raise OSError("the cache was closed, or removed")
            return files.publish(draft, lock, image.nbytes, IMAGE + name, header)
        except OSError as error:
            self._warn_once("the weights %s are not shared: %s", name, error)
            return image


class SharedDraft:
    """Memory for a new image, private to this process until it is published.

    Attributes:
        image: the memory to fill.
    """

    def __init__(self, cache: HostCache, file: str, lock: FileLock, image: Bytes) -> None:
        """Take ownership of a locked file and its memory; call `HostCache.reserve` instead."""
        self.image = image
        self._cache, self._file = cache, file
        self._lock: FileLock | None = lock

    def publish(self, name: str, header: bytes) -> SharedImage:
        """Publish the image with its header for all processes, and use it; it must not be written to any more.

        If publishing fails, which is logged, only this process uses the image.

        Raises:
            RuntimeError: it was published or abandoned before.
        """
        name = _check_name(name)
        lock, self._lock = self._lock, None
        if lock is None:
            raise RuntimeError("a draft is published once")
        image = self._cache._publish(self._file, lock, self.image, name, header)
        return SharedImage(image, header, lock)

    def abandon(self) -> None:
        """Release the memory for the next draft; do nothing if it was published."""
        lock, self._lock = self._lock, None
        if lock:
            lock.release()


class SharedImage:
    """An image in use. It must not be written to, and not be read after its release.

    Attributes:
        image: its bytes.
        header: the header that it was published with.
    """

    def __init__(self, image: Bytes, header: bytes, lock: FileLock) -> None:
        """Take ownership of a locked image; call `HostCache.find` or `SharedDraft.publish` instead."""
        self.image, self.header = image, header
        self._lock = lock

    def release(self) -> None:
        """Stop using the image: another image may be written into its memory."""
        self._lock.release()


class Claim:
    """The exclusive right to make an image; it ends with `release`, with a `with` block, or with the process."""

    def __init__(self, folder: Folder | None = None, file: str = "", lock: FileLock | None = None) -> None:
        """Take ownership of the exclusively locked file, if there is one; call `HostCache.claim` instead."""
        self._folder, self._file, self._lock = folder, file, lock

    def release(self) -> None:
        """End the claim."""
        if self._folder and self._lock and self._lock.is_held:
            with contextlib.suppress(OSError):
                os.unlink(self._file, dir_fd=self._folder.fd)
            self._lock.release()

    def __enter__(self) -> Self:
        """Return the claim."""
        return self

    def __exit__(self, *error: object) -> None:
        """Release the claim."""
        self.release()


def _check_name(name: str) -> str:
    """Return a name that is safe as a part of a file name."""
    if not re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,199}", name):
        raise InvalidArgument(f"not a name for shared weights: {name!r}")
    return name
