"""Processes that share a host cache and are killed: `cache_users.py SCENARIO DIRECTORY SEED`; an error ends it.

They are forked from one that has everything imported, so that hundreds of them can die in a few seconds.
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

from rlbroker.weights.host_cache.cache import HostCache, SharedImage

KILL_SECONDS = 3.0
#: The end of a scenario that waits for something that does not come.
PATIENCE_SECONDS = 20.0
USERS = 8
SIZES = [1 << 20, 1 << 20, 1 << 20, 700_000, 1 << 20, 1_500_000, 30_000]
KEEP = 2

_BASE = np.arange(max(SIZES) + 1, dtype=np.uint32).astype(np.uint8)

#: What the processes count together: images made, images found, times without memory; and whether to stop.
MADE, FOUND, NO_MEMORY, STOP = range(4)


def name_of(version: int) -> str:
    return f"{version}-1764041234567-3-{version:032x}"


def size_of(name: str) -> int:
    return SIZES[int(name.split("-")[0]) % len(SIZES)]


def fill(image: np.ndarray[Any, np.dtype[np.uint8]], name: str) -> None:
    mark = np.uint8(int(name.split("-")[0]) % 251)
    for start in range(0, len(image), 100_000):
        piece = image[start : start + 100_000]
        np.bitwise_xor(_BASE[start : start + len(piece)], mark, out=piece)


def check(image: SharedImage, name: str) -> None:
    expected = np.empty(size_of(name), np.uint8)
    fill(expected, name)
    assert image.header == name.encode(), f"{name} has the header {image.header!r}"
    assert np.array_equal(image.image, expected), f"{name} is not whole"


def make(cache: HostCache, name: str) -> SharedImage | None:
    draft = cache.reserve(size_of(name))
    if draft is None:
        return None
    fill(draft.image, name)
    return draft.publish(name, name.encode())


def must(cache: HostCache | None) -> HostCache:
    assert cache is not None, "it cannot be entered"
    return cache


def fork(work: Callable[[], None]) -> int:
    """Run it in a child that ends with 0, or with 1 and a traceback."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        work()
        code = 0
    except BaseException:  # noqa: BLE001 - nothing of the parent may run in the child
        traceback.print_exc()
    os._exit(code)


def ended(pid: int) -> int:
    """Wait for a child, and give how it ended."""
    end = time.monotonic() + PATIENCE_SECONDS
    while time.monotonic() < end:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.001)
    os.kill(pid, signal.SIGKILL)
    raise AssertionError("a process hangs")


def live(directory: Path, seed: int, counts: np.ndarray[Any, np.dtype[np.int64]]) -> None:
    """Look for the version of the moment, make it if it is not there, check every byte, and again."""
    chance = random.Random(seed)
    cache = must(HostCache.open("run", directory, keep=KEEP))
    held: list[tuple[str, SharedImage]] = []
    while not counts[STOP]:
        name = name_of(int(time.time() * 25))
        image = cache.find(name)
        if image:
            counts[FOUND] += 1
        elif chance.random() < 0.1:  # claims save work, but nothing depends on them
            image = make(cache, name)
        else:
            claim = cache.claim(name)
            if claim is None:
                time.sleep(0.001)
                continue
            with claim:
                image = cache.find(name) or make(cache, name)
            counts[MADE] += 1
        if image is None:
            counts[NO_MEMORY] += 1
            continue
        held.append((name, image))
        while len(held) > chance.randrange(3):
            old_name, old = held.pop(0)
            check(old, old_name)
            old.release()
        if chance.random() < 0.02:
            cache.close()
            cache = must(HostCache.open("run", directory, keep=KEEP))
    cache.close()
    for name, image in held:
        check(image, name)


def at_random_moments(directory: Path, seed: int) -> dict[str, Any]:
    """Kill one of eight at random, again and again; then see whether the others, and a new one, are well."""
    chance = random.Random(seed)
    counts = np.frombuffer(mmap.mmap(-1, mmap.PAGESIZE), np.int64)
    seeds = iter(range(seed * 1_000_000, (seed + 1) * 1_000_000))
    users = [fork(lambda: live(directory, next(seeds), counts)) for _ in range(USERS)]
    killed = 0
    end = time.monotonic() + KILL_SECONDS
    while time.monotonic() < end:
        time.sleep(chance.random() * 0.03)
        place = chance.randrange(USERS)
        os.kill(users[place], signal.SIGKILL)
        code = ended(users[place])
        assert code == -signal.SIGKILL, f"a process ended by itself: {code}"
        killed += 1
        next(seeds)
        users[place] = fork(lambda: live(directory, next(seeds), counts))

    found_before = counts[FOUND]
    cache = must(HostCache.open("run", directory, keep=KEEP))
    end = time.monotonic() + PATIENCE_SECONDS
    while counts[FOUND] < found_before + 20:
        assert time.monotonic() < end, "the survivors do nothing"
        time.sleep(0.01)
    for path in directory.glob("*/*/image-*"):
        name = path.name.removeprefix("image-")
        image = cache.find(name)
        if image:  # or it was written over just now
            check(image, name)
            image.release()
    counts[STOP] = 1
    assert [ended(pid) for pid in users] == [0] * USERS
    use_and_leave(directory, cache)
    made, found, no_memory = (int(counts[index]) for index in (MADE, FOUND, NO_MEMORY))
    return {"killed": killed, "made": made, "found": found, "no_memory": no_memory}


def use_and_leave(directory: Path, cache: HostCache) -> None:
    """See that everything works for one that is alone, and that it leaves nothing."""
    for version in (7, 8):
        name = name_of(version)
        claim = cache.claim(name)
        assert claim, "a dead process has a claim"
        with claim:
            image = make(cache, name)
            assert image, "there is no memory"
            check(image, name)
            image.release()
        there = sorted(path.name for path in directory.glob("*/*/*"))
        assert not [file for file in there if file.startswith(("draft", "claim"))], there
        assert len(there) <= KEEP + 1, there
    cache.close()
    assert list(directory.iterdir()) == [], "something is left"


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
]
CALLS += ["mkdir", "rmdir", "scandir", "fstatvfs"]


def die_at(number: int) -> None:
    """Make this process kill itself at that call of the system, counted from 0."""
    left = number

    def deadly(call: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*arguments: Any, **options: Any) -> Any:
            nonlocal left
            left -= 1
            if left < 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*arguments, **options)

        return counted

    for name in CALLS:
        setattr(os, name, deadly(getattr(os, name)))
    fcntl.flock = deadly(fcntl.flock)


def one_life(directory: Path) -> None:
    """Do everything that can be done, once; the second version gets the memory of the first."""
    cache = must(HostCache.open("run", directory, keep=1))
    for version in (1, 2):
        name = name_of(version)
        with cache.claim(name) or sys.exit("somebody else has the claim"):
            image = cache.find(name) or make(cache, name)
            assert image
            check(image, name)
            image.release()
    cache.close()


def at_every_call(directory: Path, seed: int) -> dict[str, Any]:
    """Let one die before each of its calls of the system: alone, and where another has images in use."""
    SIZES[:] = [20_000]
    deaths = [0, 0]
    for company in (False, True):
        for number in range(1000):
            witness = must(HostCache.open("run", directory, keep=1)) if company else None
            used = make(witness, name_of(1)) if witness else None

            def short_life(number: int = number) -> None:
                die_at(number)
                one_life(directory)

            code = ended(fork(short_life))
            assert code in (0, -signal.SIGKILL), code
            cache = must(HostCache.open("run", directory, keep=1))
            for version in (1, 2):
                image = cache.find(name_of(version))
                if image:
                    check(image, name_of(version))
                    image.release()
            if witness and used:
                check(used, name_of(1))
                used.release()
                witness.close()
            use_and_leave(directory, cache)
            if code == 0:
                break
            deaths[company] += 1
    return {"alone": deaths[0], "in company": deaths[1]}


def with_children(directory: Path, seed: int) -> dict[str, Any]:
    """Fork children that have nothing to do with the cache: they free nothing, and keep nothing."""
    cache, other = must(HostCache.open("run", directory)), must(HostCache.open("run", directory))
    image, claim, draft = make(cache, name_of(1)), cache.claim(name_of(2)), cache.reserve(SIZES[0])
    assert image
    assert claim
    assert draft

    def child() -> None:
        logging.disable()
        check(image, name_of(1))
        assert cache.find(name_of(1)) is None
        assert cache.reserve(10) is None
        draft.publish(name_of(3), b"").release()
        image.release()
        claim.release()
        draft.abandon()
        cache.close()

    assert ended(fork(child)) == 0
    assert other.claim(name_of(2)) is None
    assert other.find(name_of(3)) is None
    for version in (4, 5, 6):
        assert make(other, name_of(version))
    check(image, name_of(1))
    cache.close()
    other.close()

    ready, tell = os.pipe()
    go_on, end = os.pipe()

    def parent() -> None:
        ours = must(HostCache.open("run", directory))
        kept = (
            make(ours, name_of(1)),
            ours.claim(name_of(2)),
            ours.reserve(SIZES[0]),
        )

        def grandchild() -> None:
            os.close(end)
            os.write(tell, b".")
            os.read(go_on, 1)  # until the end of the scenario

        fork(grandchild)
        time.sleep(PATIENCE_SECONDS)
        assert kept

    pid = fork(parent)
    os.read(ready, 1)
    os.kill(pid, signal.SIGKILL)
    ended(pid)
    use_and_leave(directory, must(HostCache.open("run", directory)))
    os.close(end)
    return {}


SCENARIOS = {"random": at_random_moments, "every": at_every_call, "children": with_children}

if __name__ == "__main__":
    print(json.dumps(SCENARIOS[sys.argv[1]](Path(sys.argv[2]), int(sys.argv[3]))))
