"""What a stored version of the weights holds, and its elements; reading changes nothing, and needs no torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rlbroker.backend.connection import Connection
from rlbroker.backend.keys import Keys
from rlbroker.codec.describe import Content
from rlbroker.codec.describe import ties as ties
from rlbroker.codec.image import ImageFormat
from rlbroker.codec.signing import SigningKey
from rlbroker.errors import WireError
from rlbroker.weights.download import WEIGHTS_LIMITS, Downloader, check_hash
from rlbroker.weights.image_store import ImageStore
from rlbroker.weights.manifest import StoredForm, digest_of


def weights_contents(
    connection: Connection, keys: Keys, path: Sequence[StoredForm], *, key: SigningKey | None = None
) -> list[Content]:
    """Give what a version holds, from its header alone.

    Args:
        connection: way to the server.
        keys: names of the run's keys.
        path: as `StoredWeights.path` gives it.
        key: which signs weights; None to take them unsigned.

    Raises:
        WireError: the header is gone, or cannot be read.
        PeerError: the server refused, or could not be reached in time.
    """
    form = path[-1]
    if key:
        form.check(key, keys.run)
    header = connection.execute("GET", keys.chunk(form.upload, 0))
    if header is None:
        raise WireError(f"the header of version {form.version} is gone")
    if digest_of(header) != form.digest:
        raise WireError(f"the digest of the header of version {form.version} does not match the pointer")
    if key:
        check_hash(form, 0, header)
    return ImageFormat(header, WEIGHTS_LIMITS, arrays_only=True).contents()


def pull_weights(
    connection: Connection,
    keys: Keys,
    path: Sequence[StoredForm],
    *,
    chunk_bytes: int,
    received: Callable[[int], object],
    key: SigningKey | None = None,
) -> tuple[list[Content], list[NDArray[Any]]]:
    """Download and decode a version; give what it holds, and the elements of its leaves by number.

    Everything is checked as workers do. Needs no torch.

    Args:
        connection: way to the server.
        keys: names of the run's keys.
        path: as `StoredWeights.path` gives it.
        chunk_bytes: as the pointer says.
        received: is told of bytes as they come.
        key: which signs weights; None to take them unsigned.

    Raises:
        WireError: what is stored cannot be read, or is gone.
        PeerError: the server refused, or could not be reached in time.
    """
    fetcher = Downloader(connection, keys, ImageStore(keys.run, None), key=key, received=received)
    try:
        image_format, image = fetcher.fetch_arrays(path, chunk_bytes)
    finally:
        fetcher.close()
    arrays = image_format.arrays(image)
    for array in arrays:
        if array.dtype.kind == "b":  # compiled code counts on it that there is nothing else
            octets = array.reshape(-1).view(np.uint8)
            np.minimum(octets, 1, out=octets)
    return image_format.contents(), arrays
