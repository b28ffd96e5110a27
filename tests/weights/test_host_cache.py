"""The host cache: images, drafts and claims that the processes of a host share."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from shared_images import SIZE, USER, Join, files, holds, host_caches, name_of, put

from rlbroker.errors import InvalidArgument
from rlbroker.weights.host_cache.cache import HostCache

pytestmark = pytest.mark.unit


@pytest.fixture
def join(tmp_path: Path) -> Iterator[Join]:
    """Opens a cache, as a process does."""
    with host_caches(tmp_path) as join:
        yield join


# Images


def test_what_one_process_publishes_the_others_find(join: Join) -> None:
    first, second = join(), join()
    put(first, 1, header=b"first")
    found = second.find(name_of(1))
    assert holds(found, 1)
    assert found is not None
    assert found.header == b"first"
    assert second.find(name_of(2)) is None


def test_runs_do_not_see_each_other(join: Join) -> None:
    put(join("pong"), 1)
    assert join("chess").find(name_of(1)) is None


def test_torch_takes_an_image_without_a_warning(join: Join) -> None:
    put(join(), 1)
    found = join().find(name_of(1))
    assert found is not None
    assert torch.from_numpy(found.image).sum() == SIZE


def test_a_write_to_a_found_image_reaches_no_other_process(join: Join) -> None:
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


def test_an_image_is_not_found_before_it_is_whole(join: Join) -> None:
    first, second = join(), join()
    for version in (1, 2):
        put(first, version).release()
    draft = first.reserve(SIZE)  # in the memory of version 1
    assert draft is not None
    assert [second.find(name_of(1)), second.find(name_of(3))] == [None, None]
    draft.abandon()
    assert [second.find(name_of(1)), second.find(name_of(3))] == [None, None]
    assert holds(second.find(name_of(2)), 2)


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
def test_names_that_are_not_safe_file_names_are_refused(join: Join, name: str) -> None:
    cache = join()
    draft = cache.reserve(SIZE)
    assert draft is not None
    for use in (cache.find, cache.claim, lambda name: draft.publish(name, b"")):
        with pytest.raises(InvalidArgument):
            use(name)


# Memory: reused, bounded, never written to while in use


def test_unused_memory_is_reused(join: Join, tmp_path: Path) -> None:
    cache = join()
    put(cache, 1).release()
    (old,) = files(tmp_path)
    inode = old.stat().st_ino
    put(cache, 2).release()
    put(cache, 3).release()
    assert inode in [path.stat().st_ino for path in files(tmp_path)]
    assert holds(cache.find(name_of(3)), 3)


def test_an_abandoned_draft_is_reused(join: Join, tmp_path: Path) -> None:
    cache = join()
    for _ in range(3):
        draft = cache.reserve(SIZE)
        assert draft is not None
        draft.abandon()
    put(cache, 1)
    assert len(files(tmp_path)) == 1


def test_memory_in_use_is_never_written_to(join: Join) -> None:
    first, second = join(), join()
    put(first, 1).release()
    used = second.find(name_of(1))
    for version in range(2, 7):
        put(first, version).release()
    assert holds(used, 1)


def test_a_copy_of_a_descriptor_keeps_no_memory_in_use(join: Join, tmp_path: Path) -> None:
    cache = join()
    image = put(cache, 1)
    copy = os.dup(image._lock.fd)  # as in a child between fork and exec
    image.release()
    for version in (2, 3):
        put(cache, version).release()
    assert len(files(tmp_path)) == 2
    os.close(copy)


def test_three_files_are_enough_for_users_that_are_one_version_late(join: Join, tmp_path: Path) -> None:
    first, second = join(), join()
    inodes = set()
    newest, late = put(first, 1), second.find(name_of(1))
    for version in range(2, 20):
        draft = first.reserve(SIZE)
        assert draft is not None
        assert late is not None
        late.release()
        late = second.find(name_of(version - 1))
        newest.release()
        newest = draft.publish(name_of(version), b"")
        inodes |= {path.stat().st_ino for path in files(tmp_path)}
    assert len(inodes) == 3


def test_unused_images_are_bounded(join: Join, tmp_path: Path) -> None:
    first, second = join(keep=3), join(keep=3)
    put(first, 1).release()
    used = second.find(name_of(1))
    for version in range(2, 9):
        put(first, version).release()
    assert {path.name for path in files(tmp_path)} == {
        f"image-{name_of(version)}" for version in (1, 6, 7, 8)
    }
    assert used is not None
    used.release()
    put(first, 9)
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


def test_files_that_alternate_are_mapped_once(join: Join) -> None:
    first, second = join(), join()
    addresses = set()
    for version in range(1, 20):
        put(first, version).release()
        found = second.find(name_of(version))
        assert holds(found, version)
        assert found is not None
        addresses.add(found.image.ctypes.data)
        found.release()
    assert len(addresses) == 2


@pytest.mark.skipif(sys.platform != "linux", reason="counts open files in /proc")
def test_descriptors_do_not_accumulate(join: Join) -> None:
    first, second = join(), join()
    counts = []
    for version in range(30):
        claim = first.claim(name_of(version))
        assert claim is not None
        with claim:
            put(first, version, SIZE + version * 10_000).release()
        found = second.find(name_of(version))
        assert found is not None
        found.release()
        counts.append(len(os.listdir("/proc/self/fd")))  # noqa: PTH208
    assert counts[-1] <= counts[4]


# Drafts


def test_a_draft_is_published_once(join: Join) -> None:
    cache = join()
    draft = cache.reserve(SIZE)
    assert draft is not None
    image = draft.publish(name_of(1), b"")
    draft.abandon()  # does nothing after publishing
    for version in (2, 3, 4):
        put(cache, version)
    assert holds(image, 0)
    with pytest.raises(RuntimeError):
        draft.publish(name_of(1), b"")


def test_drafts_of_dead_processes_are_reused_or_removed(join: Join, tmp_path: Path) -> None:
    cache = join()
    put(cache, 1)
    (folder,) = tmp_path.glob(f"{USER}/*")
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
    assert [cache.reserve(SIZE), cache.reserve(SIZE)] == [None, None]
    assert files(tmp_path) == []
    assert len(caplog.messages) == 1
    assert "No space left" in caplog.text


def test_an_image_without_room_for_its_header_serves_its_maker_alone(
    join: Join, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    cache = join()
    draft = cache.reserve(SIZE)
    assert draft is not None
    draft.image[:] = 1
    monkeypatch.setattr(os, "posix_fallocate", no_space)
    assert holds(draft.publish(name_of(1), bytes(100_000)), 1)
    assert cache.find(name_of(1)) is None
    assert "not shared" in caplog.text


SMALL_FILE_SYSTEM = """
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
    claim = first.claim(name_of(1))
    assert claim is not None
    assert second.claim(name_of(1)) is None
    assert first.claim(name_of(1)) is None
    with second.claim(name_of(2)) or pytest.fail("another name is another claim"):
        claim.release()
        claim.release()
        assert second.claim(name_of(1)) is not None


def test_claims_leave_no_files(join: Join, tmp_path: Path) -> None:
    cache = join()
    for version in range(5):
        with cache.claim(name_of(version)) or pytest.fail("the claim is free"):
            assert len(files(tmp_path)) == 1
    assert files(tmp_path) == []


def test_claims_of_dead_processes_are_removed(join: Join, tmp_path: Path) -> None:
    cache = join()
    (folder,) = tmp_path.glob(f"{USER}/*")
    for version in range(5):
        (folder / f"claim-{name_of(version)}").touch()
    with cache.claim(name_of(4)) or pytest.fail("its holder is dead"):
        assert len(files(tmp_path)) == 1


# Settings and places


def test_keeping_no_image_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument):
        HostCache.open("pong", tmp_path, keep=0)


@pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="this system has no /dev/shm")
def test_it_works_in_shared_memory() -> None:
    shared, version = Path("/dev/shm"), os.getpid()
    first, second = (HostCache.open(f"test-{version}", shared) for _ in range(2))
    assert first is not None
    assert second is not None
    put(first, version)
    assert holds(second.find(name_of(version)), version)
    (file,) = shared.glob(f"{USER}/*/image-{name_of(version)}")
    first.close()
    second.close()
    assert not file.parent.exists()
