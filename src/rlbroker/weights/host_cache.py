"""Decoded versions in memory: shared by the processes of one user on one host, or of this process alone.

Each run has a private folder below a directory such as `/dev/shm`, with these files:

- `image-NAME`: a version: the bytes of all weights, a header, and a footer. It is not written to any more.
- `draft-…`: memory that a process fills. A rename makes it an image, so no process finds an image that is not whole.
- `claim-NAME`: a process is making this image, or has made it.

A process locks what it uses: images and its draft with a shared lock, its claim with an exclusive one, and the folder
with a shared one. A process that gets the exclusive lock of a file may remove it or write another image into it, which
is much faster than writing into new memory; one that gets the exclusive lock of a folder may remove the folder. The
locks are `flock` locks, which the kernel releases when a process dies. `fcntl` locks belong to the process and are lost
when it closes the file anywhere.
"""

from __future__ import annotations

import hashlib
import logging
import mmap
import os
import re
import secrets
import stat
import struct
import sys
import time
import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext, suppress
from functools import cached_property, partial
from pathlib import Path
from typing import Any, ClassVar, Final, Self

import numpy as np
import xxhash

from rlbroker.codec.leaves import Bytes
from rlbroker.errors import InvalidArgument

if sys.platform != "win32":  # the cache is used on Linux only
    import fcntl

logger = logging.getLogger("rlbroker")

#: Smaller weights are not shared: downloading them is as fast as finding them in the cache.
MIN_SHARED_BYTES: Final = 64 << 10

#: Prefixes of file names.
_IMAGE, _DRAFT, _CLAIM = "image-", "draft-", "claim-"

#: The footer: mark, bytes of the image, bytes of the header, digest of the image's size and the header.
_FOOTER: Final = struct.Struct("<8sQQQ")
_MARK: Final = b"rlbimg1\n"

#: A new file has this much room for header and footer; it grows for larger headers.
_HEADER_ROOM: Final = 64 << 10

#: At most this share of the file system's free space is taken.
_FREE_SHARE: Final = 0.75

#: Entering a folder waits this long for a process that is removing it.
_ENTER_SECONDS: Final = 2.0
_PAUSE_SECONDS: Final = 0.01


class Image:
    """A decoded version, which is not written to any more. It stays as it is until the last reference to it is gone."""

    def __init__(self, array: Bytes, header: bytes, file: _File | None = None) -> None:
        """Wrap the bytes of a version, the header that describes them, and the locked file that they are in, if any."""
        self.array, self.header, self._file = array, header, file


class Draft:
    """Memory for a version that is being written; its content is arbitrary at first."""

    def __init__(
        self,
        array: Bytes,
        *,
        publish: Callable[[str, bytes], Image] | None = None,
        abandon: Callable[[], object] | None = None,
        published: Image | None = None,
    ) -> None:
        """Wrap memory, and how to publish and to release it if it is shared; or an image that was published before."""
        self.array, self._publish, self._abandon, self._published = array, publish, abandon, published

    def publish(self, name: str, header: bytes) -> Image:
        """Publish the image for the processes of this host; it must not be written to any more.

        If that fails, which is logged, only this process uses the image. If it was published before, it keeps its name.
        """
        if self._published is None:
            self._published = self._publish(name, header) if self._publish else Image(self.array, header)
            self._publish = self._abandon = None
        return self._published

    def abandon(self) -> None:
        """Release the memory for the next draft; do nothing if it was published."""
        if self._abandon:
            self._abandon()


class ImageStore:
    """The images of one run, for one process. Safe to use from several threads; a forked child shares none."""

    def __init__(self, run: str, directory: Path | None) -> None:
        """Share images in a directory such as /dev/shm, which is entered when needed; None to share none."""
        self._run, self._directory = run, directory
        self._logged: set[str] = set()
        #: Mapped files by inode, and whether they are writable. Versions alternate between few files, and touching
        #: pages for the first time costs more than copying them.
        self._mapped: dict[tuple[int, bool], mmap.mmap] = {}

    def shares(self, raw_bytes: int) -> bool:
        """Return whether the processes of this host share one download of a version of this size."""
        return self._folder_for(raw_bytes) is not None

    def find(self, name: str, raw_bytes: int) -> Image | None:
        """Return an image that a process of this host has published; None if there is none."""
        image, folder = _IMAGE + _check_name(name), self._folder_for(raw_bytes)
        if folder is None:
            return None
        try:
            file = _File.lock(image, folder, exclusive=False, flags=os.O_RDONLY)
            if file is None:
                return None
            if end := _read_end(file.fd):
                image_bytes, header = end
                return Image(self._map(folder, file, image_bytes, writable=False), header, file)
            self._warn_once("the shared weights %s are damaged", image)
        except OSError as error:
            self._warn_once("cannot use the shared weights %s: %s", name, error)
        return None

    def claim(self, name: str, raw_bytes: int) -> AbstractContextManager[Any] | None:
        """Claim the exclusive right to make an image until the end of a `with` block, without waiting.

        Return None if another living process has the claim or is just releasing it: call `find`, and try again. Where
        claims are impossible, return an uncontended claim, so that no process waits for nothing.
        """
        claim, folder = _CLAIM + _check_name(name), self._folder_for(raw_bytes)
        try:
            if folder is not None:
                return _File.lock(claim, folder, exclusive=True, flags=os.O_RDWR | os.O_CREAT)
        except OSError as error:
            self._warn_once("cannot claim the shared weights %s: %s", name, error)
        return nullcontext()

    def reserve(self, image_bytes: int, raw_bytes: int) -> Draft:
        """Return memory for a version: that of an old image if possible; memory of this process if there is no room."""
        folder = self._folder_for(raw_bytes)
        try:
            if folder is not None:
                return self._reserve(folder, image_bytes)
        except OSError as error:
            self._warn_once("no room for %d bytes of shared weights: %s", image_bytes, error)
        return Draft(np.empty(image_bytes, np.uint8))

    def close(self) -> None:
        """Leave the folder; the last process to leave removes it. Images, drafts and claims stay as they are."""
        folder, self._folder = self.__dict__.get("_folder"), None
        self._mapped.clear()
        if folder is not None and folder.fd >= 0 and self._directory is not None:
            fcntl.flock(folder.fd, fcntl.LOCK_UN)  # not closed: another thread may be using it
            _sweep(self._directory)

    def _folder_for(self, raw_bytes: int) -> _File | None:
        """Return the run's folder; None if this process shares no images of this size."""
        folder = self._folder if raw_bytes >= MIN_SHARED_BYTES else None
        return folder if folder is not None and folder.fd >= 0 else None

    @cached_property
    def _folder(self) -> _File | None:
        """The run's folder, which is entered now; None if that is impossible, and after `close`."""
        if self._directory is None:
            return None
        if sys.platform != "linux":
            logger.info("weights are shared by the processes of a host on Linux only")
            return None
        try:
            return _enter(self._directory, self._run)
        except OSError as error:
            logger.warning("weights are not shared with other processes of this host: %s", str(error))
            return None

    def _reserve(self, folder: _File, image_bytes: int) -> Draft:
        draft, file = _reuse(folder, image_bytes) or _create(folder, image_bytes + _HEADER_ROOM)
        array = self._map(folder, file, image_bytes, writable=True)
        return Draft(array, publish=partial(self._publish, array, draft, file), abandon=file.release)

    def _publish(self, array: Bytes, draft: str, file: _File, name: str, header: bytes) -> Image:
        """Complete a draft and rename it; if that is impossible, log the reason and return the draft's own memory."""
        image, folder = _IMAGE + _check_name(name), self._folder_for(MIN_SHARED_BYTES)
        try:
            if folder is None or not file.is_at(draft, folder):
                raise OSError("the cache was closed, or removed")
            _write_end(file.fd, array.nbytes, header)
            os.replace(draft, image, src_dir_fd=folder.fd, dst_dir_fd=folder.fd)
            _remove_unused(folder, array.nbytes)
            array = self._map(folder, file, array.nbytes, writable=False)
        except OSError as error:
            self._warn_once("the weights %s are not shared: %s", name, error)
        return Image(array, header, file)

    def _map(self, folder: _File, file: _File, image_bytes: int, *, writable: bool) -> Bytes:
        """Return the bytes of a file: its own memory if writable, private memory otherwise.

        Writes to private memory do not reach the file. The file has all its pages, and no process makes it smaller.
        """
        key = os.fstat(file.fd).st_ino, writable
        memory = self._mapped.get(key)
        if memory is None or len(memory) < image_bytes:
            inodes = set(_list(folder).values())
            for other in list(self._mapped):
                if other[0] not in inodes:
                    self._mapped.pop(other, None)  # the memory of a file that was removed is freed only now
            memory = self._mapped[key] = _map_file(file.fd, writable=writable)
        return np.frombuffer(memory, np.uint8, image_bytes)

    def _warn_once(self, message: str, *arguments: object) -> None:
        if message not in self._logged:
            self._logged.add(message)
            logger.warning(message, *arguments)


class _File:
    """An open file or folder, which may be locked. It is unlocked and closed by `release`, or with the last reference.

    As a context manager it is released at the end of the block.
    """

    #: All of this process.
    existing: ClassVar[weakref.WeakSet[_File]] = weakref.WeakSet()

    def __init__(self, path: str | Path, flags: int, folder: _File | None = None) -> None:
        """Open a file, without following a link that another user may have put in its place."""
        flags |= os.O_NOFOLLOW | os.O_CLOEXEC
        # In one step, so that nothing is open and not owned: an interrupted call leaves no file open.
        self.release = weakref.finalize(
            self, _unlock_and_close, os.open(path, flags, 0o600, dir_fd=folder.fd if folder else None)
        )
        self.release.atexit = False
        self.existing.add(self)

    @classmethod
    def lock(cls, name: str, folder: _File, *, exclusive: bool, flags: int = os.O_RDWR) -> Self | None:
        """Open and lock a file without waiting; None if it is missing, locked by another process, or was just moved.

        Raises:
            OSError: the system refused, or the file could not be created because the folder is gone.
        """
        try:
            file = cls(name, flags, folder)
        except FileNotFoundError:
            if flags & os.O_CREAT:
                raise
            return None
        return file if file.change(exclusive=exclusive) and file.is_at(name, folder) else None

    @property
    def fd(self) -> int:
        """The descriptor; -1 once it is closed, and in a forked child."""
        found = self.release.peek()
        return found[2][0] if found else -1

    def change(self, *, exclusive: bool) -> bool:
        """Lock the file, or change the kind of lock, without waiting; return False, unlocked, if that is impossible.

        The change is not atomic: another process may hold the exclusive lock in between.
        """
        try:
            fcntl.flock(self.fd, (fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH) | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def is_at(self, path: str | Path, folder: _File | None = None) -> bool:
        """Return whether this path, or name in a folder, still refers to this file."""
        try:
            found = os.stat(path, dir_fd=folder.fd if folder else None, follow_symlinks=False)
        except FileNotFoundError:
            return False
        return os.path.samestat(found, os.fstat(self.fd))

    def __enter__(self) -> Self:
        """Return the file."""
        return self

    def __exit__(self, *error: object) -> None:
        """Release the file."""
        self.release()


def _unlock_and_close(fd: int) -> None:
    with suppress(OSError):
        fcntl.flock(fd, fcntl.LOCK_UN)  # closing is not enough: a child that was just forked has a copy
    os.close(fd)


def _close_copies() -> None:
    """Close a forked child's copies without unlocking them: they would stay locked after the parent's death."""
    for file in list(_File.existing):
        if found := file.release.detach():
            os.close(found[2][0])


if sys.platform != "win32":
    os.register_at_fork(after_in_child=_close_copies)


def _enter(directory: Path, run: str) -> _File:
    """Create and lock the run's folder, once what dead processes have left is removed.

    Raises:
        OSError: it is not private, another process keeps it locked, or the system refused.
    """
    if not directory.is_dir():
        raise OSError(f"there is no directory {directory}")
    _sweep(directory)
    path = directory / f"{_folder_prefix()}{hashlib.sha256(run.encode()).hexdigest()[:32]}"
    end = time.monotonic() + _ENTER_SECONDS
    while True:
        with suppress(FileNotFoundError):  # another process may remove the folder between two steps
            with suppress(FileExistsError):
                path.mkdir(0o700)
            folder = _open_private(path)
            if folder.change(exclusive=False) and folder.is_at(path):
                return folder
        if time.monotonic() > end:
            raise OSError(f"another process keeps {path} locked")
        time.sleep(_PAUSE_SECONDS)


def _sweep(directory: Path) -> None:
    """Remove the folders of this user that no process uses."""
    for path in list(directory.glob(f"{_folder_prefix()}*")):
        with suppress(OSError), _open_private(path) as folder:
            if folder.change(exclusive=True) and folder.is_at(path):
                for name in _list(folder):
                    os.unlink(name, dir_fd=folder.fd)
                path.rmdir()


def _folder_prefix() -> str:
    return f"rlbroker-{os.geteuid()}-"


def _open_private(path: Path) -> _File:
    """Open a folder of this user, which no other user can read or write."""
    folder = _File(path, os.O_RDONLY | os.O_DIRECTORY)
    found = os.fstat(folder.fd)
    mode = stat.S_IMODE(found.st_mode) & 0o777
    if found.st_uid == os.geteuid() and mode == 0o700:
        return folder
    raise OSError(f"{path} is not private: it belongs to user {found.st_uid}, and its mode is {mode:o}")


def _list(folder: _File) -> dict[str, int]:
    """Return the inode of each file by its name."""
    # Opened again: two threads that list through one descriptor would each get some of the entries.
    again = _File(".", os.O_RDONLY | os.O_DIRECTORY, folder)
    with os.scandir(again.fd) as entries:
        return {entry.name: entry.inode() for entry in entries}


def _unused(folder: _File) -> list[str]:
    """Return the files that may be unused: the images but the newest one, from new to old, then drafts and claims."""
    images, others = [], []
    for name in _list(folder):
        if name.startswith(_IMAGE):
            with suppress(FileNotFoundError):
                images.append((os.stat(name, dir_fd=folder.fd).st_mtime_ns, name))
        else:
            others.append(name)
    return [name for _, name in sorted(images, reverse=True)[1:]] + others


def _remove_unused(folder: _File, image_bytes: int) -> None:
    """Remove unused files, except the newest image and one file that can be reused for an image of this size."""
    spare = False
    for name in _unused(folder):
        file = _File.lock(name, folder, exclusive=True)
        if file and not spare and _fits(file, image_bytes):
            spare = True
        elif file:
            os.unlink(name, dir_fd=folder.fd)


def _reuse(folder: _File, image_bytes: int) -> tuple[str, _File] | None:
    """Make a draft of an unused file of the right size; return its name and the file, with a shared lock."""
    for name in reversed(_unused(folder)):
        file = _File.lock(name, folder, exclusive=True)
        if file and _fits(file, image_bytes):
            draft = _draft_name()
            os.rename(name, draft, src_dir_fd=folder.fd, dst_dir_fd=folder.fd)
            # From here on a shared lock keeps other processes from locking the file exclusively, and it becomes the
            # image's lock. Between the two locks another process may take the file; then this draft is lost.
            if file.change(exclusive=False) and file.is_at(draft, folder):
                return draft, file
    return None


def _create(folder: _File, file_bytes: int) -> tuple[str, _File]:
    """Make a draft of new memory; return its name and the file, with a shared lock."""
    space = os.fstatvfs(folder.fd)
    free = int(space.f_bavail * space.f_frsize * _FREE_SHARE)
    if file_bytes > free:
        raise OSError(f"the file system has only {free} bytes to spare")
    file = None
    while file is None:  # before it is locked, another process may remove it as the draft of a dead process
        name = _draft_name()
        file = _File.lock(name, folder, exclusive=False, flags=os.O_RDWR | os.O_CREAT | os.O_EXCL)
    try:
        os.posix_fallocate(file.fd, 0, file_bytes)
    except BaseException:
        os.unlink(name, dir_fd=folder.fd)
        raise
    return name, file


def _fits(file: _File, image_bytes: int) -> bool:
    needed = image_bytes + _HEADER_ROOM
    return needed <= os.fstat(file.fd).st_size <= 2 * needed


def _draft_name() -> str:
    return f"{_DRAFT}{secrets.token_hex(8)}"


def _map_file(fd: int, *, writable: bool) -> mmap.mmap:
    # Opened again: `mmap` keeps a copy of the descriptor, which would keep the lock in a forked child.
    again = os.open(f"/proc/self/fd/{fd}", os.O_RDWR if writable else os.O_RDONLY)
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


def _check_name(name: str) -> str:
    """Return a name that is safe as a part of a file name."""
    if not re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,199}", name):
        raise InvalidArgument(f"not a name for shared weights: {name!r}")
    return name
