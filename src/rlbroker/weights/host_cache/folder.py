"""The folder that the processes of one user on one host share for a run: who is in, and who cleans up.

Whoever is in holds a shared lock on the file `users`. Who gets the exclusive one knows that nobody is in, and may
remove everything; who enters meanwhile finds that `users` is another file now, or none, and begins again.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import stat
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final, Self

from rlbroker.weights.host_cache.file_lock import Lock

USERS: Final = "users"

#: Entering waits this long for a process that is just cleaning up.
_ENTER_SECONDS: Final = 2.0
_PAUSE_SECONDS: Final = 0.01


class Refused(Exception):
    """The place cannot be used; the message says why."""


class Folder:
    """One run's folder, open, with this process counted among its users."""

    def __init__(self, root: Path, fd: int, users: Lock) -> None:
        """Take over the open folder and the shared lock; use `enter`."""
        self.fd = fd
        self._root, self._users = root, users

    @classmethod
    def enter(cls, base: Path, run: str) -> Self:
        """Become a user of the run's folder below `base`; the first one removes what dead ones left.

        Raises:
            Refused: it is not private, or another process keeps it locked.
            OSError: the system refused.
        """
        if not base.is_dir():
            raise Refused(f"there is no directory {base}")
        root = base / f"rlbroker-{os.geteuid()}"
        name = hashlib.sha256(run.encode()).hexdigest()[:32]
        end = time.monotonic() + _ENTER_SECONDS
        while True:
            # Another user's last step may remove a folder between two of ours.
            with contextlib.suppress(FileNotFoundError):
                folder = cls._try_to_enter(root, name)
                if folder:
                    return folder
            if time.monotonic() > end:
                raise Refused(f"another process keeps {root / name} locked")
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
        """Give the inode of each file by its name."""
        return _files(self.fd)

    def leave(self) -> None:
        """Be no user any more; the last one removes everything. What is open stays usable."""
        self._users.release()
        _sweep(self._root)

    def __del__(self) -> None:
        """Close the folder once nobody works in it any more."""
        os.close(self.fd)


def _become_user(fd: int) -> tuple[Lock | None, bool]:
    """Lock `users` as one of them; None if another process cleans up. Say also whether nobody was in before."""
    users = Lock.take(fd, USERS, exclusive=True, flags=os.O_RDWR | os.O_CREAT)
    if users is None:
        return Lock.take(fd, USERS, exclusive=False), False
    _empty(fd)
    if users.change(exclusive=False) and users.is_at(fd, USERS):
        return users, True
    users.release()
    return None, True


def _sweep(root: Path) -> None:
    """Remove the folders of runs that nobody uses, and their root if it is empty then."""
    with contextlib.suppress(OSError, Refused), _opened(str(root), None) as root_fd:
        for name in _files(root_fd):
            with contextlib.suppress(OSError, Refused), _opened(name, root_fd) as fd:
                _remove_unused(name, root_fd, fd)
        root.rmdir()


def _remove_unused(name: str, root_fd: int, fd: int) -> None:
    users = Lock.take(fd, USERS, exclusive=True, flags=os.O_RDWR | os.O_CREAT)
    if users is None:
        return
    try:
        _empty(fd)
        os.unlink(USERS, dir_fd=fd)  # last: from here on the folder may have new users
        os.rmdir(name, dir_fd=root_fd)
    finally:
        users.release()


def _empty(fd: int) -> None:
    for name in _files(fd):
        if name != USERS:
            with contextlib.suppress(OSError):
                os.unlink(name, dir_fd=fd)


def _files(fd: int) -> dict[str, int]:
    # Opened anew: who lists through the same open folder in another thread would take entries from us.
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
    """Open a folder, without following a link that somebody may have put in its place."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=dir_fd)
    except NotADirectoryError as error:
        raise Refused(f"{path} is a file or a symbolic link") from error
    facts = os.fstat(fd)
    mode = stat.S_IMODE(facts.st_mode) & 0o777
    if facts.st_uid == os.geteuid() and mode == 0o700:
        return fd
    os.close(fd)
    raise Refused(f"{path} is not private: it belongs to user {facts.st_uid}, and its mode is {mode:o}")
