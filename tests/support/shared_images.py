"""Images for tests of the host cache; two caches in one process share no state, like those of two processes."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from rlbroker.weights.host_cache.cache import HostCache, SharedImage

SIZE = 200_000

#: The folder of this user below the directory of the cache.
USER = f"rlbroker-{os.geteuid()}"

Join = Callable[..., HostCache]


@contextmanager
def host_caches(directory: Path) -> Iterator[Join]:
    """Yield a function that opens caches; at the end close them and check that no files are left."""
    joined = []

    def join(run: str = "pong", keep: int = 2) -> HostCache:
        cache = HostCache.open(run, directory, keep=keep)
        assert cache is not None
        joined.append(cache)
        return cache

    yield join
    for cache in joined:
        cache.close()
    assert list(directory.glob("rlbroker-*")) == []


def name_of(version: int) -> str:
    return f"{version}-1764041234567-3-{version:032x}"


def put(cache: HostCache, version: int, size: int = SIZE, header: bytes = b"header") -> SharedImage:
    """Publish an image whose bytes all equal the version."""
    draft = cache.reserve(size)
    assert draft is not None
    draft.image[:] = version % 256
    return draft.publish(name_of(version), header)


def holds(image: SharedImage | None, version: int, size: int = SIZE) -> bool:
    return image is not None and image.image.nbytes == size and bool((image.image == version % 256).all())


def files(directory: Path, kind: str = "") -> list[Path]:
    return sorted(path for path in directory.glob(f"{USER}/*/{kind}*") if path.name != "users")
