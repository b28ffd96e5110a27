"""The folder of the host cache: private to one user, entered and left by its processes, empty in the end."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import stat
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from shared_images import SIZE, USER, Join, files, holds, host_caches, name_of, put

from rlbroker.weights.host_cache.cache import HostCache

pytestmark = pytest.mark.unit


@pytest.fixture
def join(tmp_path: Path) -> Iterator[Join]:
    """Opens a cache, as a process does."""
    with host_caches(tmp_path) as join:
        yield join


# Places that are refused


def test_folders_and_files_are_private(join: Join, tmp_path: Path) -> None:
    cache = join()
    put(cache, 1)
    claim, draft = cache.claim(name_of(2)), cache.reserve(SIZE)
    assert claim is not None
    assert draft is not None
    paths = list(tmp_path.glob(f"{USER}/**/*"))
    assert len(paths) == 5
    assert {stat.S_IMODE(path.stat().st_mode) for path in paths if path.is_file()} == {0o600}
    assert {stat.S_IMODE(path.stat().st_mode) for path in tmp_path.rglob("*") if path.is_dir()} == {0o700}


def make_root_readable(directory: Path) -> None:
    (directory / USER).mkdir()
    (directory / USER).chmod(0o755)


def make_run_readable(directory: Path) -> None:
    cache = HostCache.open("pong", directory)
    next(directory.glob(f"{USER}/*")).chmod(0o750)
    assert cache is not None


def give_to_another_user(directory: Path) -> None:
    if os.geteuid():
        pytest.skip("only root can give a folder away")
    (directory / USER).mkdir(mode=0o700)
    os.chown(directory / USER, 1234, 1234)


def replace_root_by_a_link(directory: Path) -> None:
    (directory / "elsewhere").mkdir(mode=0o700)
    (directory / USER).symlink_to(directory / "elsewhere")


def replace_root_by_a_file(directory: Path) -> None:
    (directory / USER).touch()


def replace_run_by_a_link(directory: Path) -> None:
    make_run_readable(directory)
    run = next(directory.glob(f"{USER}/*"))
    run.chmod(0o700)
    run.rename(directory / "elsewhere")
    run.symlink_to(directory / "elsewhere")


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (make_root_readable, "its mode is 755"),
        (make_run_readable, "its mode is 750"),
        (give_to_another_user, "belongs to user 1234"),
        (replace_root_by_a_link, "symbolic link"),
        (replace_run_by_a_link, "symbolic link"),
        (replace_root_by_a_file, "a file"),
    ],
)
def test_a_folder_that_is_not_private_is_refused(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, spoil: Callable[[Path], None], reason: str
) -> None:
    spoil(tmp_path)
    assert HostCache.open("pong", tmp_path) is None
    assert len(caplog.messages) == 1
    assert reason in caplog.text


def test_a_directory_that_does_not_exist_is_refused(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").touch()
    assert HostCache.open("pong", tmp_path / "nowhere") is None
    assert HostCache.open("pong", tmp_path / "file") is None
    assert len(caplog.messages) == 2


@pytest.mark.parametrize("call", [(os, "mkdir"), (fcntl, "flock")])
def test_a_directory_without_rights_or_locks_is_refused(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    call: tuple[object, str],
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EACCES, "not here")

    monkeypatch.setattr(*call, refuse)
    assert HostCache.open("pong", tmp_path) is None
    assert len(caplog.messages) == 1
    assert "not here" in caplog.text


def test_systems_other_than_linux_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(sys, "platform", "darwin")
    assert HostCache.open("pong", tmp_path) is None
    assert len(caplog.messages) == 1


def test_a_process_that_hangs_while_it_cleans_up_blocks_no_other(
    join: Join, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("rlbroker.weights.host_cache.folder._ENTER_SECONDS", 0.1)
    cache = join()
    (users,) = tmp_path.glob(f"{USER}/*/users")
    users.unlink()
    with users.open("w") as hung:
        fcntl.flock(hung, fcntl.LOCK_EX)
        assert HostCache.open("pong", tmp_path) is None
    assert "locked" in caplog.text
    assert cache.reserve(SIZE) is not None


# Entering and leaving


def test_the_first_process_to_enter_removes_what_dead_ones_left(join: Join, tmp_path: Path) -> None:
    join("pong").close()
    folder = tmp_path / USER
    folder.mkdir(mode=0o700)
    for run in ("ab" * 16, "cd" * 16):
        (folder / run).mkdir(mode=0o700)
    (folder / ("ab" * 16) / "image-1").write_bytes(bytes(SIZE))
    cache = join("chess")
    assert len(list(folder.iterdir())) == 1
    (own,) = folder.iterdir()
    cache.close()
    own.mkdir(mode=0o700, parents=True)
    folder.chmod(0o700)
    for name in ("users", "image-1", "draft-2", "claim-3"):
        (own / name).write_bytes(bytes(SIZE))
    join("chess")
    assert files(tmp_path) == []


def test_the_last_process_to_leave_removes_everything(join: Join, tmp_path: Path) -> None:
    first, second = join(), join()
    image, draft, claim = put(first, 1), first.reserve(SIZE), first.claim(name_of(2))
    assert draft is not None
    assert claim is not None
    first.close()
    first.close()
    assert holds(second.find(name_of(1)), 1)
    second.close()
    assert list(tmp_path.iterdir()) == []
    assert holds(image, 1)  # images, drafts and claims stay valid
    draft.image[:] = 3
    assert holds(draft.publish(name_of(3), b""), 3)
    claim.release()
    assert list(tmp_path.iterdir()) == []


def test_a_closed_cache_gives_nothing_and_makes_no_process_wait(join: Join) -> None:
    cache = join()
    put(cache, 1)
    cache.close()
    assert cache.find(name_of(1)) is None
    assert cache.reserve(SIZE) is None
    assert cache.claim(name_of(1)) is not None


def test_runs_in_use_are_left_alone(join: Join) -> None:
    cache = join("pong")
    put(cache, 1)
    for _ in range(3):
        join("chess").close()
    assert holds(cache.find(name_of(1)), 1)


def test_no_process_loses_the_folder_to_one_that_leaves(tmp_path: Path) -> None:
    problems: list[str] = []

    def come_and_go(number: int) -> None:
        for turn in range(60):
            cache = HostCache.open("pong", tmp_path, keep=1)
            if cache is None:
                problems.append("refused")
                return
            version = number * 60 + turn
            used = put(cache, version, 100)
            if cache.find(name_of(version)) is None:
                problems.append("lost")
            used.release()
            cache.close()

    threads = [threading.Thread(target=come_and_go, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert problems == []
    assert list(tmp_path.iterdir()) == []


def test_each_process_works_alone_after_the_folder_was_removed(
    join: Join, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cache = join()
    used, draft = put(cache, 1), cache.reserve(SIZE)
    assert draft is not None
    subprocess.run(["rm", "-r", str(tmp_path / USER)], check=True)
    draft.image[:] = 2
    assert holds(draft.publish(name_of(2), b""), 2)
    assert holds(used, 1)
    assert cache.find(name_of(2)) is None
    assert cache.reserve(SIZE) is None
    assert cache.claim(name_of(3)) is not None
    assert len(caplog.messages) == 3
