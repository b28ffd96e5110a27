"""What the host cache promises; two caches in one process are as strange to each other as two processes."""

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
import torch

from rlbroker.errors import InvalidArgument
from rlbroker.weights.host_cache.cache import HostCache, SharedImage

pytestmark = pytest.mark.unit

SIZE = 200_000
USER = f"rlbroker-{os.geteuid()}"


def name_of(version: int) -> str:
    return f"{version}-1764041234567-3-{version:032x}"


@pytest.fixture
def join(tmp_path: Path) -> Iterator[Callable[..., HostCache]]:
    joined = []

    def join(run: str = "pong", directory: Path = tmp_path, keep: int = 2) -> HostCache:
        cache = HostCache.open(run, directory, keep=keep)
        assert cache is not None
        joined.append(cache)
        return cache

    yield join
    for cache in joined:
        cache.close()
    assert list(tmp_path.glob("rlbroker-*")) == []


Join = Callable[..., HostCache]


def put(cache: HostCache, version: int, size: int = SIZE, header: bytes = b"header") -> SharedImage:
    draft = cache.reserve(size)
    assert draft is not None
    draft.image[:] = version % 256
    return draft.publish(name_of(version), header)


def holds(image: SharedImage | None, version: int, size: int = SIZE) -> bool:
    return image is not None and image.image.nbytes == size and bool((image.image == version).all())


def files(directory: Path, kind: str = "") -> list[Path]:
    return sorted(path for path in directory.glob(f"{USER}/*/{kind}*") if path.name != "users")


def test_what_one_publishes_the_others_find(join: Join) -> None:
    ours, theirs = join(), join()
    put(ours, 1, header=b"first")
    found = theirs.find(name_of(1))
    assert holds(found, 1)
    assert found is not None
    assert found.header == b"first"
    assert theirs.find(name_of(2)) is None


def test_runs_do_not_see_each_other(join: Join) -> None:
    put(join("pong"), 1)
    assert join("chess").find(name_of(1)) is None


def test_torch_takes_an_image_without_a_warning(join: Join) -> None:
    put(join(), 1)
    found = join().find(name_of(1))
    assert found is not None
    assert torch.from_numpy(found.image).sum() == SIZE


def test_a_write_to_a_found_image_reaches_nobody_else(join: Join) -> None:
    put(join(), 1)
    found = join().find(name_of(1))
    assert found is not None
    found.image[:] = 9
    assert holds(join().find(name_of(1)), 1)


@pytest.mark.parametrize("size", [0, 1, 4096, 70_000])
@pytest.mark.parametrize("header", [b"", b"h" * 70_000])
def test_every_size_of_image_and_header_fits(join: Join, size: int, header: bytes) -> None:
    put(join(), 1, size, header).release()
    found = join().find(name_of(1))
    assert holds(found, 1, size)
    assert found is not None
    assert found.header == header


def test_an_image_is_not_found_before_it_is_whole(join: Join, tmp_path: Path) -> None:
    ours, theirs = join(), join()
    for version in (1, 2):
        put(ours, version).release()
    draft = ours.reserve(SIZE)  # in the memory of version 1
    assert draft is not None
    assert [theirs.find(name_of(1)), theirs.find(name_of(3))] == [None, None]
    draft.abandon()
    assert [theirs.find(name_of(1)), theirs.find(name_of(3))] == [None, None]
    assert holds(theirs.find(name_of(2)), 2)


def test_memory_that_nobody_uses_is_written_again(join: Join, tmp_path: Path) -> None:
    cache = join()
    put(cache, 1).release()
    (old,) = files(tmp_path)
    inode = old.stat().st_ino
    put(cache, 2).release()
    put(cache, 3).release()
    assert inode in [path.stat().st_ino for path in files(tmp_path)]
    assert holds(cache.find(name_of(3)), 3)


def test_an_abandoned_draft_is_written_again(join: Join, tmp_path: Path) -> None:
    cache = join()
    for _ in range(3):
        draft = cache.reserve(SIZE)
        assert draft is not None
        draft.abandon()
    put(cache, 1)
    assert len(files(tmp_path)) == 1


def test_memory_in_use_is_never_written(join: Join) -> None:
    ours, theirs = join(), join()
    put(ours, 1).release()
    used = theirs.find(name_of(1))
    for version in range(2, 7):
        put(ours, version).release()
    assert holds(used, 1)


def test_a_copy_of_a_descriptor_keeps_no_memory(join: Join, tmp_path: Path) -> None:
    cache = join()
    image = put(cache, 1)
    copy = os.dup(image._lock.fd)  # as in a child between fork and exec
    image.release()
    for version in (2, 3):
        put(cache, version).release()
    assert len(files(tmp_path)) == 2
    os.close(copy)


def test_memory_is_written_again_also_where_users_are_late(join: Join, tmp_path: Path) -> None:
    ours, theirs = join(), join()
    inodes = set()
    newest, late = put(ours, 1), theirs.find(name_of(1))
    for version in range(2, 20):
        draft = ours.reserve(SIZE)
        assert draft is not None
        assert late is not None
        late.release()
        late = theirs.find(name_of(version - 1))
        newest.release()
        newest = draft.publish(name_of(version), b"")
        inodes |= {path.stat().st_ino for path in files(tmp_path)}
    assert len(inodes) == 3


def test_images_that_nobody_uses_are_bounded(join: Join, tmp_path: Path) -> None:
    ours, theirs = join(keep=3), join(keep=3)
    put(ours, 1).release()
    used = theirs.find(name_of(1))
    for version in range(2, 9):
        put(ours, version).release()
    assert {path.name for path in files(tmp_path)} == {
        f"image-{name_of(version)}" for version in (1, 6, 7, 8)
    }
    assert used is not None
    used.release()
    put(ours, 9)
    assert len(files(tmp_path)) == 3


def test_images_of_several_makers_are_bounded(join: Join, tmp_path: Path) -> None:
    cache = join()
    drafts = [cache.reserve(SIZE) for _ in range(5)]
    for version, draft in enumerate(drafts):
        assert draft is not None
        draft.publish(name_of(version), b"").release()
    assert len(files(tmp_path)) <= 2


def test_memory_of_another_size_is_not_kept(join: Join, tmp_path: Path) -> None:
    cache = join()
    for version, size in enumerate([SIZE, SIZE, 10 * SIZE, 10 * SIZE, SIZE, SIZE]):
        image = put(cache, version, size)
        assert holds(image, version, size)
        image.release()
    assert sum(path.stat().st_size for path in files(tmp_path)) < 3 * SIZE


def test_memory_in_turns_is_mapped_once(join: Join) -> None:
    ours, theirs = join(), join()
    addresses = set()
    for version in range(1, 20):
        put(ours, version).release()
        found = theirs.find(name_of(version))
        assert holds(found, version)
        assert found is not None
        addresses.add(found.image.ctypes.data)
        found.release()
    assert len(addresses) == 2


@pytest.mark.skipif(sys.platform != "linux", reason="/proc tells what is open")
def test_descriptors_do_not_pile_up(join: Join) -> None:
    ours, theirs = join(), join()
    counts = []
    for version in range(30):
        claim = ours.claim(name_of(version))
        assert claim is not None
        with claim:
            put(ours, version, SIZE + version * 10_000).release()
        found = theirs.find(name_of(version))
        assert found is not None
        found.release()
        counts.append(len(os.listdir("/proc/self/fd")))  # noqa: PTH208
    assert counts[-1] <= counts[4]


def test_a_claim_is_exclusive(join: Join) -> None:
    ours, theirs = join(), join()
    claim = ours.claim(name_of(1))
    assert claim is not None
    assert theirs.claim(name_of(1)) is None
    assert ours.claim(name_of(1)) is None
    with theirs.claim(name_of(2)) or pytest.fail("another name is another claim"):
        claim.release()
        claim.release()
        assert theirs.claim(name_of(1)) is not None


def test_claims_leave_no_files(join: Join, tmp_path: Path) -> None:
    cache = join()
    for version in range(5):
        with cache.claim(name_of(version)) or pytest.fail("nobody has it"):
            assert len(files(tmp_path)) == 1
    assert files(tmp_path) == []


def test_claim_files_of_dead_processes_go(join: Join, tmp_path: Path) -> None:
    cache = join()
    (folder,) = tmp_path.glob(f"{USER}/*")
    for version in range(5):
        (folder / f"claim-{name_of(version)}").touch()
    with cache.claim(name_of(4)) or pytest.fail("its holder is dead"):
        assert len(files(tmp_path)) == 1


def test_drafts_of_dead_processes_are_used_or_removed(join: Join, tmp_path: Path) -> None:
    cache = join()
    put(cache, 1)
    (folder,) = tmp_path.glob(f"{USER}/*")
    for number in range(3):
        (folder / f"draft-{number}").write_bytes(bytes(SIZE + 100_000))
    put(cache, 2)
    assert files(tmp_path, "draft") == []
    assert len(files(tmp_path, "image")) == 2


def test_a_full_file_system_gives_no_memory_and_says_so_once(
    join: Join, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    cache = join()
    monkeypatch.setattr(os, "posix_fallocate", full)
    assert [cache.reserve(SIZE), cache.reserve(SIZE)] == [None, None]
    assert files(tmp_path) == []
    assert len(caplog.messages) == 1
    assert "No space left" in caplog.text


def test_an_image_without_room_for_its_header_serves_its_maker(
    join: Join, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    cache = join()
    draft = cache.reserve(SIZE)
    assert draft is not None
    draft.image[:] = 1
    monkeypatch.setattr(os, "posix_fallocate", full)
    assert holds(draft.publish(name_of(1), bytes(100_000)), 1)
    assert cache.find(name_of(1)) is None
    assert "not shared" in caplog.text


SMALL = """
import logging, pathlib, subprocess, sys
from rlbroker.weights.host_cache.cache import HostCache
place = pathlib.Path(sys.argv[1])
if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(place)]).returncode:
    sys.exit(77)
logging.basicConfig(format="%(message)s")
cache = HostCache.open("pong", place)
assert cache.reserve(7 << 20) is None  # it would fit, but leave less than a quarter
first = cache.reserve(5 << 20)
first.image[:] = 1
assert cache.reserve(4 << 20) is None
image = first.publish("1", b"")
assert (cache.find("1").image == 1).all()
(place / "other").write_bytes(bytes(2 << 20))
assert cache.reserve(2 << 20) is None
assert image.image.sum() == 5 << 20
"""


def test_a_small_file_system_is_not_filled(tmp_path: Path) -> None:
    command = ["unshare", "--user", "--map-root-user", "--mount", sys.executable, "-c", SMALL, str(tmp_path)]
    try:
        ended = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        pytest.skip("there is no unshare to mount a small file system with")
    if ended.returncode == 77 or ended.stderr.startswith("unshare"):
        pytest.skip(f"cannot mount a small file system: {ended.stderr}")
    assert ended.returncode == 0, ended.stderr
    assert ended.stderr.count("no room") == 1


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


def open_to_others(directory: Path) -> None:
    (directory / USER).mkdir()
    (directory / USER).chmod(0o755)


def run_open_to_others(directory: Path) -> None:
    cache = HostCache.open("pong", directory)
    next(directory.glob(f"{USER}/*")).chmod(0o750)
    assert cache is not None


def of_another(directory: Path) -> None:
    if os.geteuid():
        pytest.skip("only root can give a folder away")
    (directory / USER).mkdir(mode=0o700)
    os.chown(directory / USER, 1234, 1234)


def a_link(directory: Path) -> None:
    (directory / "elsewhere").mkdir(mode=0o700)
    (directory / USER).symlink_to(directory / "elsewhere")


def a_file(directory: Path) -> None:
    (directory / USER).touch()


def a_linked_run(directory: Path) -> None:
    run_open_to_others(directory)
    run = next(directory.glob(f"{USER}/*"))
    run.chmod(0o700)
    run.rename(directory / "elsewhere")
    run.symlink_to(directory / "elsewhere")


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (open_to_others, "its mode is 755"),
        (run_open_to_others, "its mode is 750"),
        (of_another, "belongs to user 1234"),
        (a_link, "symbolic link"),
        (a_linked_run, "symbolic link"),
        (a_file, "a file"),
    ],
)
def test_a_place_that_is_not_private_is_refused(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, spoil: Callable[[Path], None], reason: str
) -> None:
    spoil(tmp_path)
    assert HostCache.open("pong", tmp_path) is None
    assert len(caplog.messages) == 1
    assert reason in caplog.text


def test_a_place_that_is_not_there_is_refused(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").touch()
    assert HostCache.open("pong", tmp_path / "nowhere") is None
    assert HostCache.open("pong", tmp_path / "file") is None
    assert len(caplog.messages) == 2


@pytest.mark.parametrize("call", [(os, "mkdir"), (fcntl, "flock")])
def test_a_place_without_rights_or_locks_is_refused(
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


def test_another_system_than_linux_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(sys, "platform", "darwin")
    assert HostCache.open("pong", tmp_path) is None
    assert len(caplog.messages) == 1


def test_a_process_that_hangs_while_it_cleans_up_keeps_nobody_waiting(
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


def test_the_last_one_to_leave_removes_everything(join: Join, tmp_path: Path) -> None:
    first, second = join(), join()
    kept, draft, claim = put(first, 1), first.reserve(SIZE), first.claim(name_of(2))
    assert draft is not None
    assert claim is not None
    first.close()
    first.close()
    assert holds(second.find(name_of(1)), 1)
    second.close()
    assert list(tmp_path.iterdir()) == []
    assert holds(kept, 1)  # what is out stays as it is
    draft.image[:] = 3
    assert holds(draft.publish(name_of(3), b""), 3)
    claim.release()
    assert list(tmp_path.iterdir()) == []


def test_what_is_closed_gives_nothing_and_keeps_nobody_waiting(join: Join) -> None:
    cache = join()
    put(cache, 1)
    cache.close()
    assert cache.find(name_of(1)) is None
    assert cache.reserve(SIZE) is None
    assert cache.claim(name_of(1)) is not None


def test_the_first_one_to_enter_finds_nothing(join: Join, tmp_path: Path) -> None:
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


def test_runs_in_use_are_left_alone(join: Join) -> None:
    cache = join("pong")
    put(cache, 1)
    for _ in range(3):
        join("chess").close()
    assert holds(cache.find(name_of(1)), 1)


def test_nobody_loses_the_folder_to_one_who_leaves(tmp_path: Path) -> None:
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


def test_a_folder_that_was_removed_leaves_all_working_alone(
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


@pytest.mark.parametrize("where", [-1, -20, -28])
def test_a_damaged_image_is_not_used(
    join: Join, tmp_path: Path, caplog: pytest.LogCaptureFixture, where: int
) -> None:
    cache = join()
    put(cache, 1)
    (path,) = files(tmp_path)
    data = bytearray(path.read_bytes())
    data[where] ^= 0x10
    path.write_bytes(data)
    assert cache.find(name_of(1)) is None
    assert "damaged" in caplog.text
    path.write_bytes(data[:10])
    assert cache.find(name_of(1)) is None


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "../users", "a\0b", "a b", "é", "x" * 300])
def test_names_that_are_no_file_names_are_refused(join: Join, name: str) -> None:
    cache = join()
    draft = cache.reserve(SIZE)
    assert draft is not None
    for use in (cache.find, cache.claim, lambda name: draft.publish(name, b"")):
        with pytest.raises(InvalidArgument):
            use(name)


def test_a_draft_is_published_once(join: Join) -> None:
    cache = join()
    draft = cache.reserve(SIZE)
    assert draft is not None
    image = draft.publish(name_of(1), b"")
    draft.abandon()  # nothing is left of it to abandon
    for version in (2, 3, 4):
        put(cache, version)
    assert holds(image, 0)
    with pytest.raises(RuntimeError):
        draft.publish(name_of(1), b"")


def test_keeping_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument):
        HostCache.open("pong", tmp_path, keep=0)


@pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="this system has no /dev/shm")
def test_it_works_in_shared_memory() -> None:
    shared, version = Path("/dev/shm"), os.getpid()
    first, second = (HostCache.open(f"test-{version}", shared) for _ in range(2))
    assert first is not None
    assert second is not None
    put(first, version)
    assert holds(second.find(name_of(version)), version % 256)
    (file,) = shared.glob(f"{USER}/*/image-{name_of(version)}")
    first.close()
    second.close()
    assert not file.parent.exists()
