"""The host cache: images, drafts and claims that the processes of a host share."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from shared_images import SIZE, USER, Join, claim, files, find, holds, host_caches, name_of, put, reserve

from rlbroker.errors import InvalidArgument
from rlbroker.weights.host_cache import ImageStore

pytestmark = pytest.mark.unit


@pytest.fixture
def join(tmp_path: Path) -> Iterator[Join]:
    """Opens a store, as a process does."""
    with host_caches(tmp_path) as join:
        yield join


# Images


def test_what_one_process_publishes_the_others_find(join: Join) -> None:
    first, second = join(), join()
    put(first, 1, header=b"first")
    found = find(second, 1)
    assert holds(found, 1)
    assert found is not None
    assert found.header == b"first"
    assert find(second, 2) is None


def test_runs_do_not_see_each_other(join: Join) -> None:
    put(join("pong"), 1)
    assert find(join("chess"), 1) is None


def test_torch_takes_an_image_without_a_warning(join: Join) -> None:
    put(join(), 1)
    found = find(join(), 1)
    assert found is not None
    assert torch.from_numpy(found.array).sum() == SIZE


def test_a_write_to_a_found_image_reaches_no_other_process(join: Join) -> None:
    put(join(), 1)
    found = find(join(), 1)
    assert found is not None
    found.array[:] = 9
    assert holds(find(join(), 1), 1)


@pytest.mark.parametrize("size", [0, 1, 4096, 70_000])
@pytest.mark.parametrize("header", [b"", b"h" * 70_000])
def test_every_size_of_image_and_header_fits(join: Join, size: int, header: bytes) -> None:
    put(join(), 1, size, header)
    found = find(join(), 1)
    assert holds(found, 1, size)
    assert found is not None
    assert found.header == header


def test_an_image_is_not_found_before_it_is_whole(join: Join) -> None:
    first, second = join(), join()
    for version in (1, 2):
        put(first, version)
    draft = reserve(first)  # in the memory of version 1
    assert [find(second, 1), find(second, 3)] == [None, None]
    draft.abandon()
    assert [find(second, 1), find(second, 3)] == [None, None]
    assert holds(find(second, 2), 2)


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
    assert find(cache, 1) is None
    assert "damaged" in caplog.text
    path.write_bytes(data[:10])
    assert find(cache, 1) is None


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "../users", "a\0b", "a b", "é", "x" * 300])
def test_names_that_are_not_safe_file_names_are_refused(join: Join, name: str) -> None:
    cache = join()
    draft = reserve(cache)
    uses: list[Callable[[], object]] = [
        lambda: cache.find(name, SIZE),
        lambda: cache.claim(name, SIZE),
        lambda: draft.publish(name, b""),
    ]
    for use in uses:
        with pytest.raises(InvalidArgument):
            use()


# Memory: reused, bounded, never written to while in use


def test_unused_memory_is_reused(join: Join, tmp_path: Path) -> None:
    cache = join()
    put(cache, 1)
    (old,) = files(tmp_path)
    inode = old.stat().st_ino
    put(cache, 2)
    put(cache, 3)
    assert inode in [path.stat().st_ino for path in files(tmp_path)]
    assert holds(find(cache, 3), 3)


def test_an_abandoned_draft_is_reused(join: Join, tmp_path: Path) -> None:
    cache = join()
    drafts = [reserve(cache)]
    for _ in range(3):
        drafts[-1].abandon()
        drafts.append(reserve(cache))
    drafts[-1].abandon()
    put(cache, 1)
    assert len(files(tmp_path)) == 1


def test_memory_in_use_is_never_written_to(join: Join) -> None:
    first, second = join(), join()
    put(first, 1)
    used = find(second, 1)
    for version in range(2, 7):
        put(first, version)
    assert holds(used, 1)


def test_a_copy_of_a_descriptor_keeps_no_memory_in_use(join: Join, tmp_path: Path) -> None:
    cache = join()
    image = put(cache, 1)
    assert image._file is not None
    copy = os.dup(image._file.fd)  # as in a child between fork and exec
    del image
    for version in (2, 3):
        put(cache, version)
    assert len(files(tmp_path)) == 2
    os.close(copy)


def test_three_files_are_enough_for_users_that_are_one_version_late(join: Join, tmp_path: Path) -> None:
    first, second = join(), join()
    inodes = set()
    used = [put(first, 1), find(second, 1)]
    for version in range(2, 20):
        draft = reserve(first)
        used[1] = find(second, version - 1)
        used[0] = draft.publish(name_of(version), b"")
        inodes |= {path.stat().st_ino for path in files(tmp_path)}
    assert len(inodes) == 3


def test_unused_images_are_bounded(join: Join, tmp_path: Path) -> None:
    first, second = join(), join()
    put(first, 1)
    used = find(second, 1)
    for version in range(2, 9):
        put(first, version)
    assert {path.name for path in files(tmp_path)} == {f"image-{name_of(version)}" for version in (1, 7, 8)}
    assert holds(used, 1)
    del used
    put(first, 9)
    assert len(files(tmp_path)) == 2


def test_images_of_several_makers_are_bounded(join: Join, tmp_path: Path) -> None:
    cache = join()
    drafts = [reserve(cache) for _ in range(5)]
    for version in range(5):
        drafts.pop().publish(name_of(version), b"")
    assert len(files(tmp_path)) <= 2


def test_memory_of_another_size_is_not_kept(join: Join, tmp_path: Path) -> None:
    cache = join()
    for version, size in enumerate([SIZE, SIZE, 10 * SIZE, 10 * SIZE, SIZE, SIZE]):
        assert holds(put(cache, version, size), version, size)
    assert sum(path.stat().st_size for path in files(tmp_path)) < 3 * SIZE


def test_files_that_alternate_are_mapped_once(join: Join) -> None:
    first, second = join(), join()
    addresses = set()
    for version in range(1, 20):
        put(first, version)
        found = find(second, version)
        assert holds(found, version)
        assert found is not None
        addresses.add(found.array.ctypes.data)
        del found
    assert len(addresses) == 2


@pytest.mark.skipif(sys.platform != "linux", reason="counts open files in /proc")
def test_descriptors_do_not_accumulate(join: Join) -> None:
    first, second = join(), join()
    counts = []
    for version in range(30):
        with claim(first, version) or pytest.fail("the claim is free"):
            put(first, version, SIZE + version * 10_000)
        assert find(second, version) is not None
        counts.append(len(os.listdir("/proc/self/fd")))  # noqa: PTH208
    assert counts[-1] <= counts[4]


# Drafts


def test_a_draft_is_published_once(join: Join) -> None:
    cache = join()
    draft = reserve(cache)
    draft.array[:] = 1
    image = draft.publish(name_of(1), b"")
    draft.abandon()  # does nothing after publishing
    for version in (2, 3, 4):
        put(cache, version)
    assert holds(image, 1)
    assert draft.publish(name_of(5), b"") is image
    assert find(cache, 5) is None


def test_drafts_of_dead_processes_are_reused_or_removed(join: Join, tmp_path: Path) -> None:
    cache = join()
    put(cache, 1)
    (folder,) = tmp_path.glob(f"{USER}*")
    for number in range(3):
        (folder / f"draft-{number}").write_bytes(bytes(SIZE + 100_000))
    put(cache, 2)
    assert files(tmp_path, "draft") == []
    assert len(files(tmp_path, "image")) == 2


def no_space(*_: int) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_file_system_gives_no_memory_and_is_logged_once(
    join: Join, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    cache = join()
    monkeypatch.setattr(os, "posix_fallocate", no_space)
    for version in (1, 2):
        assert holds(put(cache, version), version)
        assert find(cache, version) is None
    assert files(tmp_path) == []
    assert len(caplog.messages) == 1
    assert "No space left" in caplog.text


def test_an_image_without_room_for_its_header_serves_its_maker_alone(
    join: Join, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    cache = join()
    draft = reserve(cache)
    draft.array[:] = 1
    monkeypatch.setattr(os, "posix_fallocate", no_space)
    assert holds(draft.publish(name_of(1), bytes(100_000)), 1)
    assert find(cache, 1) is None
    assert "not shared" in caplog.text


SMALL_FILE_SYSTEM = """
import logging, pathlib, subprocess, sys
from rlbroker.weights.host_cache import ImageStore
place = pathlib.Path(sys.argv[1])
if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(place)]).returncode:
    sys.exit(77)
logging.basicConfig(format="%(message)s")
store = ImageStore("pong", place)

def is_shared(size):
    name = str(size)
    store.reserve(size << 20, size << 20).publish(name, b"")
    return store.find(name, size << 20) is not None

assert not is_shared(7)  # it would fit, but leave less than a quarter
first = store.reserve(5 << 20, 5 << 20)
first.array[:] = 1
assert not is_shared(4)
image = first.publish("1", b"")
assert (store.find("1", 5 << 20).array == 1).all()
(place / "other").write_bytes(bytes(2 << 20))
assert not is_shared(2)
assert image.array.sum() == 5 << 20
"""


def test_a_small_file_system_is_not_filled(tmp_path: Path) -> None:
    namespace = ["unshare", "--user", "--map-root-user", "--mount"]
    command = [*namespace, sys.executable, "-c", SMALL_FILE_SYSTEM, str(tmp_path)]
    try:
        ended = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        pytest.skip("there is no unshare to mount a small file system with")
    if ended.returncode == 77 or ended.stderr.startswith("unshare"):
        pytest.skip(f"cannot mount a small file system: {ended.stderr}")
    assert ended.returncode == 0, ended.stderr
    assert ended.stderr.count("no room") == 1


# Claims


def test_a_claim_is_exclusive(join: Join) -> None:
    first, second = join(), join()
    with claim(first, 1) or pytest.fail("the claim is free"):
        assert claim(second, 1) is None
        assert claim(first, 1) is None
        with claim(second, 2) or pytest.fail("another name is another claim"):
            assert claim(first, 2) is None
    assert claim(second, 1) is not None


def test_files_of_claims_are_removed_with_the_next_image(join: Join, tmp_path: Path) -> None:
    first, second = join(), join()
    (folder,) = tmp_path.glob(f"{USER}*")
    for version in range(5):
        (folder / f"claim-{name_of(version)}").touch()  # as of a dead process
    for version in range(4, 8):
        with claim(first, version) or pytest.fail("the claim is free"):
            put(first, version)
            assert claim(second, version) is None
            assert [path.name for path in files(tmp_path, "claim")] == [f"claim-{name_of(version)}"]


# Places


@pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="this system has no /dev/shm")
def test_it_works_in_shared_memory() -> None:
    shared, version = Path("/dev/shm"), os.getpid()
    first, second = (ImageStore(f"test-{version}", shared) for _ in range(2))
    put(first, version)
    assert holds(find(second, version), version)
    (file,) = shared.glob(f"{USER}*/image-{name_of(version)}")
    first.close()
    second.close()
    assert not file.parent.exists()
