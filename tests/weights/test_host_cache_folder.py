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
from shared_images import (
    SIZE,
    Join,
    claim,
    files,
    find,
    folder_of,
    holds,
    host_caches,
    name_of,
    put,
    reserve,
    shares,
)

from rlbroker.weights.host_cache import ImageStore

pytestmark = pytest.mark.unit


@pytest.fixture
def join(tmp_path: Path) -> Iterator[Join]:
    """Opens a cache, as a process does."""
    with host_caches(tmp_path) as join:
        yield join


# Places that are refused


def test_folders_and_files_are_private(join: Join, tmp_path: Path) -> None:
    store = join()
    put(store, 1)
    in_use = claim(store, 2), reserve(store)
    assert None not in in_use
    (folder,) = tmp_path.iterdir()
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert [stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()] == [0o600] * 3


def make_readable(folder: Path) -> None:
    folder.mkdir()
    folder.chmod(0o750)


def give_to_another_user(folder: Path) -> None:
    if os.geteuid():
        pytest.skip("only root can give a folder away")
    folder.mkdir(mode=0o700)
    os.chown(folder, 1234, 1234)


def replace_by_a_link(folder: Path) -> None:
    (folder.parent / "elsewhere").mkdir(mode=0o700)
    folder.symlink_to(folder.parent / "elsewhere")


def replace_by_a_file(folder: Path) -> None:
    folder.touch()


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (make_readable, "its mode is 750"),
        (give_to_another_user, "belongs to user 1234"),
        (replace_by_a_link, "Not a directory"),
        (replace_by_a_file, "Not a directory"),
    ],
)
def test_a_folder_that_is_not_private_is_refused(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, spoil: Callable[[Path], None], reason: str
) -> None:
    spoil(folder_of(tmp_path))
    assert not shares(ImageStore("pong", tmp_path))
    assert len(caplog.messages) == 1
    assert reason in caplog.text


def test_a_directory_that_does_not_exist_is_refused(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").touch()
    assert not shares(ImageStore("pong", tmp_path / "nowhere"))
    assert not shares(ImageStore("pong", tmp_path / "file"))
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
    assert not shares(ImageStore("pong", tmp_path))
    assert len(caplog.messages) == 1
    assert "not here" in caplog.text


def test_systems_other_than_linux_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(sys, "platform", "darwin")
    assert not shares(ImageStore("pong", tmp_path))
    assert len(caplog.messages) == 1


def test_a_process_that_hangs_while_it_cleans_up_blocks_no_other(
    join: Join, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("rlbroker.weights.host_cache._ENTER_SECONDS", 0.1)
    folder_of(tmp_path).mkdir(mode=0o700)
    hung = os.open(folder_of(tmp_path), os.O_RDONLY)
    fcntl.flock(hung, fcntl.LOCK_EX)
    assert not shares(ImageStore("pong", tmp_path))
    assert "locked" in caplog.text
    assert holds(put(join("chess"), 1), 1)
    os.close(hung)
    assert holds(put(join("pong"), 1), 1)


# Entering and leaving


def test_the_first_process_to_enter_removes_what_dead_ones_left(join: Join, tmp_path: Path) -> None:
    for run in ("pong", "go"):
        folder_of(tmp_path, run).mkdir(mode=0o700)
        for name in ("image-1", "draft-2", "claim-3"):
            (folder_of(tmp_path, run) / name).write_bytes(bytes(SIZE))
    join("pong")
    assert list(tmp_path.iterdir()) == [folder_of(tmp_path)]
    assert files(tmp_path) == []


def test_the_last_process_to_leave_removes_everything(join: Join, tmp_path: Path) -> None:
    first, second = join(), join()
    image, draft, claimed = put(first, 1), reserve(first), claim(first, 2)
    first.close()
    first.close()
    assert holds(find(second, 1), 1)
    second.close()
    assert list(tmp_path.iterdir()) == []
    assert holds(image, 1)  # images, drafts and claims stay valid
    draft.array[:] = 3
    assert holds(draft.publish(name_of(3), b""), 3)
    with claimed or pytest.fail("the claim was free"):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_closed_cache_gives_nothing_and_makes_no_process_wait(join: Join) -> None:
    cache = join()
    put(cache, 1)
    cache.close()
    assert find(cache, 1) is None
    assert holds(put(cache, 2), 2)
    assert claim(cache, 1) is not None


def test_runs_in_use_are_left_alone(join: Join) -> None:
    cache = join("pong")
    put(cache, 1)
    for _ in range(3):
        join("chess").close()
    assert holds(find(cache, 1), 1)


def test_no_process_loses_the_folder_to_one_that_leaves(tmp_path: Path) -> None:
    problems: list[str] = []

    def come_and_go(number: int) -> None:
        for turn in range(60):
            cache = ImageStore("pong", tmp_path)
            if not shares(cache):
                problems.append("refused")
                return
            version = number * 60 + turn
            used = put(cache, version, 100)
            if find(cache, version) is None:
                problems.append("lost")
            cache.close()
            del used

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
    used, draft = put(cache, 1), reserve(cache)
    subprocess.run(["rm", "-r", str(folder_of(tmp_path))], check=True)
    draft.array[:] = 2
    assert holds(draft.publish(name_of(2), b""), 2)
    assert holds(used, 1)
    assert find(cache, 2) is None
    assert holds(put(cache, 3), 3)
    assert claim(cache, 3) is not None
    assert len(caplog.messages) == 3
