"""Locks on files that processes of one host share; the kernel frees those of a process that dies.

`flock` and not `fcntl` locks: those belong to the process, and are lost when it closes the file anywhere.
"""

from __future__ import annotations

import contextlib
import os
import sys
from typing import Self

if sys.platform != "win32":  # there nobody gets here: a host cache is refused before
    import fcntl

#: Locks of this process. A forked child closes its copies: a copy would keep the lock of a dead parent.
_held: set[Lock] = set()


class Lock:
    """An open file, which may be locked, of one process."""

    def __init__(self, fd: int) -> None:
        """Take over an open file."""
        self.fd = fd
        _held.add(self)

    @classmethod
    def take(cls, folder: int, name: str, *, exclusive: bool, flags: int = os.O_RDWR) -> Self | None:
        """Open and lock a file without waiting; None if it is not there, locked by others, or was just moved.

        Raises:
            OSError: the system refused; one to be made also if the folder is gone.
        """
        try:
            lock = cls(os.open(name, flags | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600, dir_fd=folder))
        except FileNotFoundError:
            if flags & os.O_CREAT:
                raise
            return None
        try:
            if lock.change(exclusive=exclusive) and lock.is_at(folder, name):
                return lock
        except BaseException:
            lock.release()
            raise
        lock.release()
        return None

    @property
    def is_held(self) -> bool:
        """Whether it was not released, and this is not a forked child, which has none."""
        return self in _held

    def change(self, *, exclusive: bool) -> bool:
        """Lock, or lock otherwise, without waiting; false if others keep it from that, and then it is not locked.

        In between it is not locked either: others may have had it exclusively.
        """
        try:
            fcntl.flock(self.fd, (fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH) | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def is_at(self, folder: int, name: str) -> bool:
        """Whether a name in a folder leads to this file."""
        try:
            there = os.stat(name, dir_fd=folder, follow_symlinks=False)
        except FileNotFoundError:
            return False
        return os.path.samestat(there, os.fstat(self.fd))

    def release(self) -> None:
        """Unlock and close the file; nothing in a forked child, and nothing the second time."""
        try:
            _held.remove(self)
        except KeyError:
            return
        fd, self.fd = self.fd, -1
        with contextlib.suppress(OSError):
            fcntl.flock(
                fd, fcntl.LOCK_UN
            )  # closing is not enough while a child that was just forked has a copy
        os.close(fd)


def _close_copies() -> None:
    for lock in _held:
        fd, lock.fd = lock.fd, -1
        os.close(fd)
    _held.clear()


if sys.platform != "win32":
    os.register_at_fork(after_in_child=_close_copies)
