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
import weakref
from pathlib import Path
from typing import Final, Self

if sys.platform != "win32":  # `HostCache.open` refuses to work on Windows
    import fcntl

USERS: Final = "users"

#: Entering waits this long for a process that is cleaning up.
_ENTER_SECONDS: Final = 2.0
_PAUSE_SECONDS: Final = 0.01

#: The locks of this process. A forked child closes its copies: a copy would keep the lock of a dead parent.
_held: weakref.WeakSet[FileLock] = weakref.WeakSet()


class UnusableFolder(Exception):
    """The folder cannot be used; the message says why."""


class OpenFile:
    """An open file or folder, which is closed with the last reference to it: an interrupted call leaves none."""

    def __init__(self, path: str, flags: int, *, dir_fd: int | None = None) -> None:
        """Open a file, without following a link that another user may have put in its place."""
        # In one step, so that nothing is open and not owned.
        self._close = weakref.finalize(
            self, os.close, os.open(path, flags | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600, dir_fd=dir_fd)
        )
        self._close.atexit = False

    @property
    def fd(self) -> int:
        """The file's descriptor; -1 once it is closed."""
        found = self._close.peek()
        return found[2][0] if found else -1

    def close(self) -> None:
        """Close the file. May be called again."""
        self._close()


class FileLock(OpenFile):
    """An open file of this process, which may be locked."""

    @classmethod
    def take(cls, folder_fd: int, name: str, *, exclusive: bool, flags: int = os.O_RDWR) -> Self | None:
        """Open and lock a file without waiting; None if it is missing, locked by another process, or was just moved.

        Raises:
            OSError: the system refused, or the file could not be created because the folder is gone.
        """
        try:
            lock = cls(name, flags, dir_fd=folder_fd)
        except FileNotFoundError:
            if flags & os.O_CREAT:
                raise
            return None
        _held.add(lock)
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
        return self._close.alive

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
        if self.is_held:
            with contextlib.suppress(OSError):
                # Closing is not enough: a child that was just forked has a copy of the descriptor.
                fcntl.flock(self.fd, fcntl.LOCK_UN)
            self.close()


def _close_copies() -> None:
    for lock in list(_held):
        lock.close()


if sys.platform != "win32":
    os.register_at_fork(after_in_child=_close_copies)


class Folder:
    """The open folder of one run. This process is one of its users."""

    def __init__(self, root: Path, opened: OpenFile, users: FileLock) -> None:
        """Take ownership of the open folder and the shared lock; call `enter` instead."""
        self._root, self._opened, self._users = root, opened, users

    @property
    def fd(self) -> int:
        """The folder's descriptor."""
        return self._opened.fd

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
        root_folder = _open_private(str(root), None)
        _make_private(name, root_folder.fd)
        opened = _open_private(name, root_folder.fd)
        users, first = _become_user(opened.fd)
        if users is None:
            return None
        if first:
            _sweep(root)
        return cls(root, opened, users)

    def files(self) -> dict[str, int]:
        """Return the inode of each file by its name."""
        return _files(self.fd)

    def leave(self) -> None:
        """Stop being a user; the last user removes everything. Open files stay usable."""
        self._users.release()
        _sweep(self._root)


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
    with contextlib.suppress(OSError, UnusableFolder):
        root_folder = _open_private(str(root), None)
        for name in _files(root_folder.fd):
            with contextlib.suppress(OSError, UnusableFolder):
                opened = _open_private(name, root_folder.fd)
                _remove_unused(name, root_folder.fd, opened.fd)
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
    again = OpenFile(".", os.O_RDONLY | os.O_DIRECTORY, dir_fd=fd)
    with os.scandir(again.fd) as entries:
        return {entry.name: entry.inode() for entry in entries}


def _make_private(path: str, dir_fd: int | None) -> None:
    with contextlib.suppress(FileExistsError):
        os.mkdir(path, 0o700, dir_fd=dir_fd)


def _open_private(path: str, dir_fd: int | None) -> OpenFile:
    """Open a folder of this user, which no other user can read or write."""
    try:
        opened = OpenFile(path, os.O_RDONLY | os.O_DIRECTORY, dir_fd=dir_fd)
    except NotADirectoryError as error:
        raise UnusableFolder(f"{path} is a file or a symbolic link") from error
    found = os.fstat(opened.fd)
    mode = stat.S_IMODE(found.st_mode) & 0o777
    if found.st_uid == os.geteuid() and mode == 0o700:
        return opened
    raise UnusableFolder(
        f"{path} is not private: it belongs to user {found.st_uid}, and its mode is {mode:o}"
    )
