"""Images for tests of the host cache; two stores in one process share no state, like those of two processes."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

from rlbroker.weights.host_cache import Draft, Image, ImageStore

SIZE = 200_000

#: What the names of this user's folders begin with.
USER = f"rlbroker-{os.geteuid()}-"

Join = Callable[..., ImageStore]


@contextmanager
def host_caches(directory: Path) -> Iterator[Join]:
    """Yield a function that opens stores; at the end close them and check that no files are left."""
    joined = []

    def join(run: str = "pong") -> ImageStore:
        store = ImageStore(run, directory)
        assert shares(store)
        joined.append(store)
        return store

    yield join
    for store in joined:
        store.close()
    assert list(directory.glob("rlbroker-*")) == []


def folder_of(directory: Path, run: str = "pong") -> Path:
    return directory / f"{USER}{hashlib.sha256(run.encode()).hexdigest()[:32]}"


def name_of(version: int) -> str:
    return f"{version}-1764041234567-3-{version:032x}"


def shares(store: ImageStore) -> bool:
    return store.shares(SIZE)


def find(store: ImageStore, version: int) -> Image | None:
    return store.find(name_of(version), SIZE)


def claim(store: ImageStore, version: int) -> AbstractContextManager[Any] | None:
    return store.claim(name_of(version), SIZE)


def reserve(store: ImageStore, size: int = SIZE) -> Draft:
    """Return memory in the cache, also for an image that is too small to be shared in earnest."""
    return store.reserve(size, SIZE)


def put(store: ImageStore, version: int, size: int = SIZE, header: bytes = b"header") -> Image:
    """Publish an image whose bytes all equal the version."""
    draft = reserve(store, size)
    draft.array[:] = version % 256
    return draft.publish(name_of(version), header)


def holds(image: Image | None, version: int, size: int = SIZE) -> bool:
    return image is not None and image.array.nbytes == size and bool((image.array == version % 256).all())


def files(directory: Path, kind: str = "") -> list[Path]:
    return sorted(path for path in directory.glob(f"{USER}*/{kind}*"))
