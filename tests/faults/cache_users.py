"""Kill processes that share a host cache: `cache_users.py SCENARIO DIRECTORY SEED`; exits with 1 after an error.

The processes are forks of this one: without imports, hundreds can start and be killed in a few seconds.
"""

from __future__ import annotations

import fcntl
import json
import logging
import mmap
import os
import random
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from rlbroker.weights.host_cache import MIN_SHARED_BYTES, Image, ImageStore

#: The shortest time and the fewest kills of the scenario `random`; on a slow machine, 20 kills take longer.
KILL_SECONDS = 3.0
KILLS = 20

#: The limit for these kills.
KILL_TIMEOUT_SECONDS = 60.0

#: The limit for each other wait.
TIMEOUT_SECONDS = 20.0

USERS = 8
SIZES = [1 << 20, 1 << 20, 1 << 20, 700_000, 1 << 20, 1_500_000, 30_000]

_PATTERN = np.arange(max(SIZES) + 1, dtype=np.uint32).astype(np.uint8)

#: Indexes of the shared counters: images made and images found; and of the stop flag.
MADE, FOUND, STOP = range(3)

Counts = np.ndarray[Any, np.dtype[np.int64]]


def name_of(version: int) -> str:
    return f"{version}-1764041234567-3-{version:032x}"


def size_of(name: str) -> int:
    return SIZES[int(name.split("-")[0]) % len(SIZES)]


def fill(image: np.ndarray[Any, np.dtype[np.uint8]], name: str) -> None:
    """Write bytes that depend on the name and on the offset."""
    mask = np.uint8(int(name.split("-")[0]) % 251)
    for start in range(0, len(image), 100_000):
        piece = image[start : start + 100_000]
        np.bitwise_xor(_PATTERN[start : start + len(piece)], mask, out=piece)


def check(image: Image, name: str) -> None:
    expected = np.empty(size_of(name), np.uint8)
    fill(expected, name)
    assert image.header == name.encode(), f"{name} has the header {image.header!r}"
    assert np.array_equal(image.array, expected), f"{name} is damaged"


def find(store: ImageStore, name: str) -> Image | None:
    return store.find(name, MIN_SHARED_BYTES)


def make(store: ImageStore, name: str) -> Image:
    draft = store.reserve(size_of(name), MIN_SHARED_BYTES)
    fill(draft.array, name)
    return draft.publish(name, name.encode())


def open_store(directory: Path) -> ImageStore:
    store = ImageStore("run", directory)
    assert store.shares(MIN_SHARED_BYTES), "cannot open the cache"
    return store


def fork(work: Callable[[], None]) -> int:
    """Run a function in a child, which exits with 0, or with 1 and a traceback."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        work()
        code = 0
    except BaseException:  # noqa: BLE001 - the child must not return into the code of the parent
        traceback.print_exc()
    os._exit(code)


def exit_code(pid: int) -> int:
    """Wait for a child to end, and return its exit code; negative for a signal."""
    end = time.monotonic() + TIMEOUT_SECONDS
    while time.monotonic() < end:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.001)
    os.kill(pid, signal.SIGKILL)
    raise AssertionError("the process has not ended in time")


def use_until_stopped(directory: Path, seed: int, counts: Counts) -> None:
    """Find or make the version of the current time, check every byte, and repeat."""
    chance = random.Random(seed)
    cache = open_store(directory)
    used: list[tuple[str, Image]] = []
    while not counts[STOP]:
        name = name_of(int(time.time() * 25))
        image = find(cache, name)
        if image:
            counts[FOUND] += 1
        elif chance.random() < 0.1:  # claims only save work; the cache must be correct without them
            image = make(cache, name)
        else:
            claim = cache.claim(name, MIN_SHARED_BYTES)
            if claim is None:
                time.sleep(0.001)
                continue
            with claim:
                image = find(cache, name) or make(cache, name)
            counts[MADE] += 1
        used.append((name, image))
        while len(used) > chance.randrange(3):
            old_name, old = used.pop(0)
            check(old, old_name)
            del old
        if chance.random() < 0.02:
            cache.close()
            cache = open_store(directory)
    cache.close()
    for name, image in used:
        check(image, name)


def kill_at_random_moments(directory: Path, seed: int) -> dict[str, Any]:
    """Kill random processes of eight and replace them; the survivors and new processes must still work."""
    chance = random.Random(seed)
    counts = np.frombuffer(mmap.mmap(-1, mmap.PAGESIZE), np.int64)
    seeds = iter(range(seed * 1_000_000, (seed + 1) * 1_000_000))
    users = [fork(lambda: use_until_stopped(directory, next(seeds), counts)) for _ in range(USERS)]
    killed = 0
    end = time.monotonic() + KILL_SECONDS
    limit = time.monotonic() + KILL_TIMEOUT_SECONDS
    while time.monotonic() < end or killed < KILLS:
        assert time.monotonic() < limit, f"only {killed} of {KILLS} kills within {KILL_TIMEOUT_SECONDS:g} s"
        time.sleep(chance.random() * 0.03)
        index = chance.randrange(USERS)
        os.kill(users[index], signal.SIGKILL)
        code = exit_code(users[index])
        assert code == -signal.SIGKILL, f"a process exited before it was killed: {code}"
        killed += 1
        next(seeds)
        users[index] = fork(lambda: use_until_stopped(directory, next(seeds), counts))

    found_before = counts[FOUND]
    cache = open_store(directory)
    end = time.monotonic() + TIMEOUT_SECONDS
    while counts[FOUND] < found_before + 20:
        assert time.monotonic() < end, "the survivors find no images"
        time.sleep(0.01)
    for path in directory.glob("*/image-*"):
        name = path.name.removeprefix("image-")
        image = find(cache, name)
        if image:  # None: it was overwritten meanwhile
            check(image, name)
            del image
    counts[STOP] = 1
    assert [exit_code(pid) for pid in users] == [0] * USERS
    use_once_and_close(directory, cache)
    return {"killed": killed, "made": int(counts[MADE]), "found": int(counts[FOUND])}


def use_once_and_close(directory: Path, cache: ImageStore) -> None:
    """Check that a single process can use the cache and leaves no files behind."""
    for version in (7, 8):
        name = name_of(version)
        claim = cache.claim(name, MIN_SHARED_BYTES)
        assert claim, "a dead process still has the claim"
        with claim:
            check(make(cache, name), name)
    assert sorted(path.name.split("-")[0] for path in directory.glob("*/*")) == ["claim", "image", "image"]
    cache.close()
    assert list(directory.iterdir()) == [], "files are left"


#: The functions of `os` that the host cache calls.
CALLS = [
    "open",
    "close",
    "stat",
    "fstat",
    "rename",
    "replace",
    "unlink",
    "pwrite",
    "pread",
    "posix_fallocate",
    "mkdir",
    "rmdir",
    "scandir",
    "fstatvfs",
]


def die_at_call(number: int) -> None:
    """Make this process kill itself before system call `number`, counted from 0."""
    left = number

    def make_deadly(call: Callable[..., Any]) -> Callable[..., Any]:
        def count(*arguments: Any, **options: Any) -> Any:
            nonlocal left
            left -= 1
            if left < 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*arguments, **options)

        return count

    for name in CALLS:
        setattr(os, name, make_deadly(getattr(os, name)))
    fcntl.flock = make_deadly(fcntl.flock)


def use_everything_once(directory: Path) -> None:
    """Call each operation once; the third version reuses the memory of the first."""
    cache = open_store(directory)
    for version in (1, 2, 3):
        name = name_of(version)
        with cache.claim(name, MIN_SHARED_BYTES) or sys.exit("another process has the claim"):
            check(find(cache, name) or make(cache, name), name)
    cache.close()


def kill_at_every_call(directory: Path, seed: int) -> dict[str, Any]:
    """Kill a process before each of its system calls: alone, and beside a process that uses an image."""
    SIZES[:] = [20_000]
    deaths = [0, 0]
    for beside_another in (False, True):
        for number in range(1000):
            other = open_store(directory) if beside_another else None
            used = make(other, name_of(1)) if other else None

            def die_early(number: int = number) -> None:
                die_at_call(number)
                use_everything_once(directory)

            code = exit_code(fork(die_early))
            assert code in (0, -signal.SIGKILL), code
            cache = open_store(directory)
            for version in (1, 2, 3):
                image = find(cache, name_of(version))
                if image:
                    check(image, name_of(version))
                    del image
            if other and used:
                check(used, name_of(1))
                del used
                other.close()
            use_once_and_close(directory, cache)
            if code == 0:
                break
            deaths[beside_another] += 1
    return {"alone": deaths[0], "beside another": deaths[1]}


def fork_children(directory: Path, seed: int) -> dict[str, Any]:
    """Fork children from users of the cache: they neither release nor keep claims, drafts and images."""
    cache, other = open_store(directory), open_store(directory)
    image, draft = make(cache, name_of(1)), cache.reserve(SIZES[0], MIN_SHARED_BYTES)
    claim = cache.claim(name_of(2), MIN_SHARED_BYTES)
    assert claim

    def child() -> None:
        logging.disable()
        check(image, name_of(1))
        assert find(cache, name_of(1)) is None
        make(cache, name_of(4))
        draft.publish(name_of(3), b"")
        with claim:
            pass
        draft.abandon()
        cache.close()

    assert exit_code(fork(child)) == 0
    assert other.claim(name_of(2), MIN_SHARED_BYTES) is None
    assert find(other, name_of(3)) is None
    for version in (4, 5, 6):
        assert make(other, name_of(version))
    check(image, name_of(1))
    cache.close()
    other.close()

    ready, report_ready = os.pipe()
    wait_for_end, end = os.pipe()

    def parent() -> None:
        own = open_store(directory)
        in_use = (
            make(own, name_of(1)),
            own.claim(name_of(2), MIN_SHARED_BYTES),
            own.reserve(SIZES[0], MIN_SHARED_BYTES),
        )

        def grandchild() -> None:
            os.close(end)
            os.write(report_ready, b".")
            os.read(wait_for_end, 1)  # until the end of the scenario

        fork(grandchild)
        time.sleep(TIMEOUT_SECONDS)
        assert in_use

    pid = fork(parent)
    os.read(ready, 1)
    os.kill(pid, signal.SIGKILL)
    exit_code(pid)
    use_once_and_close(directory, open_store(directory))
    os.close(end)
    return {}


SCENARIOS = {"random": kill_at_random_moments, "every": kill_at_every_call, "children": fork_children}

if __name__ == "__main__":
    print(json.dumps(SCENARIOS[sys.argv[1]](Path(sys.argv[2]), int(sys.argv[3]))))
