"""The folder that the processes of one user on one host share for a run, and the locks on its files.

Each process holds a shared lock on the file `users`. A process that gets the exclusive lock knows that there are no
users, and may remove everything. A process that enters at the same time finds that `users` is gone or is another file,
and tries again.

The locks are `flock` locks, which the kernel releases when a process dies. `fcntl` locks belong to the process and are
lost when it closes the file anywhere.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import stat
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final, Self

if sys.platform != "win32":  # `HostCache.open` refuses to work on Windows
    import fcntl

USERS: Final = "users"

#: Entering waits this long for a process that is cleaning up.
_ENTER_SECONDS: Final = 2.0
_PAUSE_SECONDS: Final = 0.01

#: The locks of this process. A forked child closes its copies: a copy would keep the lock of a dead parent.
_held: set[FileLock] = set()


class UnusableFolder(Exception):
    """The folder cannot be used; the message says why."""


class FileLock:
    """An open file of this process, which may be locked."""

    def __init__(self, fd: int) -> None:
        """Take ownership of an open file."""
        self.fd = fd
        _held.add(self)

    @classmethod
    def take(cls, folder_fd: int, name: str, *, exclusive: bool, flags: int = os.O_RDWR) -> Self | None:
        """Open and lock a file without waiting; None if it is missing, locked by another process, or was just moved.

        Raises:
            OSError: the system refused, or the file could not be created because the folder is gone.
        """
        try:
            lock = cls(os.open(name, flags | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600, dir_fd=folder_fd))
        except FileNotFoundError:
            if flags & os.O_CREAT:
                raise
            return None
        try:
            if lock.change(exclusive=exclusive) and lock.is_at(folder_fd, name):
                return lock
        except BaseException:
            lock.release()
            raise
        lock.release()
        return None

    @property
    def is_held(self) -> bool:
        """Whether it is not released yet; always False in a forked child."""
        return self in _held

    def change(self, *, exclusive: bool) -> bool:
        """Lock the file, or change the kind of lock, without waiting; return False, unlocked, if that is impossible.

        The change is not atomic: another process may hold the exclusive lock in between.
        """
        try:
            fcntl.flock(self.fd, (fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH) | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def is_at(self, folder_fd: int, name: str) -> bool:
        """Return whether this name in a folder still refers to this file."""
        try:
            found = os.stat(name, dir_fd=folder_fd, follow_symlinks=False)
        except FileNotFoundError:
            return False
        return os.path.samestat(found, os.fstat(self.fd))

    def release(self) -> None:
        """Unlock and close the file; do nothing in a forked child, or when called again."""
        try:
            _held.remove(self)
        except KeyError:
            return
        fd, self.fd = self.fd, -1
        with contextlib.suppress(OSError):
            # Closing is not enough: a child that was just forked has a copy of the descriptor.
            fcntl.flock(fd, fcntl.LOCK_UN)
        os.close(fd)


def _close_copies() -> None:
    for lock in _held:
        fd, lock.fd = lock.fd, -1
        os.close(fd)
    _held.clear()


if sys.platform != "win32":
    os.register_at_fork(after_in_child=_close_copies)


class Folder:
    """The open folder of one run. This process is one of its users."""

    def __init__(self, root: Path, fd: int, users: FileLock) -> None:
        """Take ownership of the open folder and the shared lock; call `enter` instead."""
        self.fd = fd
        self._root, self._users = root, users

    @classmethod
    def enter(cls, base: Path, run: str) -> Self:
        """Become a user of the run's folder below `base`; the first user removes what dead processes left.

        Raises:
            UnusableFolder: it is not private, or another process keeps it locked.
            OSError: the system refused.
        """
        if not base.is_dir():
            raise UnusableFolder(f"there is no directory {base}")
        root = base / f"rlbroker-{os.geteuid()}"
        name = hashlib.sha256(run.encode()).hexdigest()[:32]
        end = time.monotonic() + _ENTER_SECONDS
        while True:
            # The last user may remove a folder between two steps of this process.
            with contextlib.suppress(FileNotFoundError):
                folder = cls._try_to_enter(root, name)
                if folder:
                    return folder
            if time.monotonic() > end:
                raise UnusableFolder(f"another process keeps {root / name} locked")
            time.sleep(_PAUSE_SECONDS)

    @classmethod
    def _try_to_enter(cls, root: Path, name: str) -> Self | None:
        _make_private(str(root), None)
        with _opened(str(root), None) as root_fd:
            _make_private(name, root_fd)
            fd = _open_private(name, root_fd)
        try:
            users, first = _become_user(fd)
        except BaseException:
            os.close(fd)
            raise
        if users is None:
            os.close(fd)
            return None
        if first:
            _sweep(root)
        return cls(root, fd, users)

    def files(self) -> dict[str, int]:
        """Return the inode of each file by its name."""
        return _files(self.fd)

    def leave(self) -> None:
        """Stop being a user; the last user removes everything. Open files stay usable."""
        self._users.release()
        _sweep(self._root)

    def __del__(self) -> None:
        """Close the folder with the last reference to it."""
        os.close(self.fd)


def _become_user(fd: int) -> tuple[FileLock | None, bool]:
    """Lock `users`, and return the lock and whether this is the first user; no lock if another process cleans up."""
    users = FileLock.take(fd, USERS, exclusive=True, flags=os.O_RDWR | os.O_CREAT)
    if users is None:
        return FileLock.take(fd, USERS, exclusive=False), False
    _empty(fd)
    if users.change(exclusive=False) and users.is_at(fd, USERS):
        return users, True
    users.release()
    return None, True


def _sweep(root: Path) -> None:
    """Remove the folders of runs that have no users, and then their root if it is empty."""
    with contextlib.suppress(OSError, UnusableFolder), _opened(str(root), None) as root_fd:
        for name in _files(root_fd):
            with contextlib.suppress(OSError, UnusableFolder), _opened(name, root_fd) as fd:
                _remove_unused(name, root_fd, fd)
        root.rmdir()


def _remove_unused(name: str, root_fd: int, fd: int) -> None:
    users = FileLock.take(fd, USERS, exclusive=True, flags=os.O_RDWR | os.O_CREAT)
    if users is None:
        return
    try:
        _empty(fd)
        os.unlink(USERS, dir_fd=fd)  # last: from now on the folder may have new users
        os.rmdir(name, dir_fd=root_fd)
    finally:
        users.release()


def _empty(fd: int) -> None:
    for name in _files(fd):
        if name != USERS:
            with contextlib.suppress(OSError):
                os.unlink(name, dir_fd=fd)


def _files(fd: int) -> dict[str, int]:
    # Opened again: two threads that list through one descriptor would each get some of the entries.
    again = os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=fd)
    try:
        with os.scandir(again) as entries:
            return {entry.name: entry.inode() for entry in entries}
    finally:
        os.close(again)


def _make_private(path: str, dir_fd: int | None) -> None:
    with contextlib.suppress(FileExistsError):
        os.mkdir(path, 0o700, dir_fd=dir_fd)


@contextlib.contextmanager
def _opened(path: str, dir_fd: int | None) -> Iterator[int]:
    fd = _open_private(path, dir_fd)
    try:
        yield fd
    finally:
        os.close(fd)


def _open_private(path: str, dir_fd: int | None) -> int:
    """Open a folder, without following a link that another user may have put in its place."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=dir_fd)
    except NotADirectoryError as error:
        raise UnusableFolder(f"{path} is a file or a symbolic link") from error
    found = os.fstat(fd)
    mode = stat.S_IMODE(found.st_mode) & 0o777
    if found.st_uid == os.geteuid() and mode == 0o700:
        return fd
    os.close(fd)
    raise UnusableFolder(
        f"{path} is not private: it belongs to user {found.st_uid}, and its mode is {mode:o}"
    )
