"""What a stored version of the weights holds, and its elements; reading changes nothing, and needs no torch."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from rlbroker.backend.connection import Connection
from rlbroker.backend.keys import Keys
from rlbroker.codec.contents import Content
from rlbroker.codec.contents import ties as ties
from rlbroker.codec.dtypes import TORCH_DTYPES
from rlbroker.codec.image import ImageFormat
from rlbroker.codec.signing import SigningKey
from rlbroker.errors import InvalidArgument, UnsupportedType, UsageError, WireError
from rlbroker.weights.download import WEIGHTS_LIMITS, Downloader, check_hash
from rlbroker.weights.image_store import ImageStore
from rlbroker.weights.manifest import StoredForm, digest_of

Array = NDArray[Any]

#: What files can be written, by suffix.
SUFFIXES: Final = (".safetensors", ".npz")

#: Where safetensors keeps what is no tensor.
_RESERVED: Final = "__metadata__"


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


@dataclass(frozen=True)
class Written:
    """What a file holds.

    Attributes:
        tensors: how many names it has.
        file_bytes: its size.
        left_out: names of plain values that it has no place for.
        as_bits: names of leaves whose dtype it does not know, with that dtype: their bits are there, as integers.
    """

    tensors: int
    file_bytes: int
    left_out: tuple[str, ...]
    as_bits: Mapping[str, str]


def check_file(file: Path, *, force: bool) -> None:
    """Check, before anything is downloaded, that weights can be written there.

    Raises:
        InvalidArgument: the suffix is none of ours, the directory is not there, or the file is, and `force` is not set.
        UsageError: the package for it is missing; the message says how to install it.
    """
    if file.suffix not in SUFFIXES:
        raise InvalidArgument(f"cannot write {file.name!r}: the name must end in {' or '.join(SUFFIXES)}")
    if file.suffix == ".safetensors" and importlib.util.find_spec("safetensors") is None:
        raise UsageError(
            "writing .safetensors needs the package safetensors: run `pip install 'rlbroker[safetensors]'`, or write "
            "a file that ends in .npz"
        )
    if not file.parent.is_dir():
        raise InvalidArgument(f"there is no directory {file.parent}")
    if file.is_dir():
        raise InvalidArgument(f"{file} is a directory")
    if not force and os.path.lexists(file):
        raise InvalidArgument(f"{file} is there already; --force overwrites it")


def write_weights(
    file: Path, contents: Sequence[Content], arrays: Sequence[Array], *, facts: Mapping[str, Any], force: bool
) -> Written:
    """Write a file: whole, or not at all.

    Args:
        file: its suffix decides what it is.
        contents: what there is.
        arrays: elements of the leaves, by number.
        facts: where it comes from, for those who look into the file; plain values.
        force: whether a file that is there may be replaced.

    Raises:
        InvalidArgument: as `check_file`.
        UnsupportedType: something cannot be in such a file; it is named.
        OSError: it could not be written.
    """
    check_file(file, force=force)
    named = _by_name(contents)
    write: Callable[..., dict[str, str]] = _write_npz if file.suffix == ".npz" else _write_safetensors
    plain = {name: one.value for name, one in named.items() if one.leaf is None}
    leaves = {name: one for name, one in named.items() if one.leaf is not None}
    with _beside(file) as draft:
        mode = draft.stat().st_mode
        as_bits = write(draft, leaves, arrays, plain, facts)
        draft.chmod(mode)  # safetensors makes a file that only its owner may read
        with draft.open("rb") as written:
            os.fsync(written.fileno())
        check_file(file, force=force)  # it may have come meanwhile
        file_bytes = draft.stat().st_size
        draft.replace(file)
    left_out = tuple(plain) if file.suffix == ".npz" else ()
    return Written(len(leaves), file_bytes, left_out, as_bits)


def _by_name(contents: Sequence[Content]) -> dict[str, Content]:
    """Give what there is by name."""
    found: dict[str, Content] = {}
    for one in contents:
        if one.name in found:
            raise UnsupportedType(f"two values are called {one.name!r} once their paths are joined with dots")
        found[one.name] = one
    return found


@contextmanager
def _beside(file: Path) -> Iterator[Path]:
    """Give the path of a new, empty file beside another one; it is deleted if it is still there at the end."""
    draft = file.with_name(f".{file.name}.{os.getpid()}.part")
    os.close(os.open(draft, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
    try:
        yield draft
    finally:
        draft.unlink(missing_ok=True)


def _write_safetensors(
    draft: Path,
    leaves: Mapping[str, Content],
    arrays: Sequence[Array],
    plain: Mapping[str, Any],
    facts: Mapping[str, Any],
) -> dict[str, str]:
    from safetensors import SafetensorError, TensorSpec, serialize_file

    ready = [_native(array) for array in arrays]  # they must stay until all is written
    specs = {}
    for name, one in leaves.items():
        assert one.leaf is not None
        array = ready[one.leaf]
        dtype = one.dtype if one.kind == "tensor" or one.dtype == "bfloat16" else array.dtype.name
        if name == _RESERVED:
            raise UnsupportedType(
                f"safetensors has no tensor called {name!r}; write a file that ends in .npz"
            )
        try:
            specs[name] = TensorSpec(
                dtype=dtype, shape=list(array.shape), data_ptr=array.ctypes.data, data_len=array.nbytes
            )
        except SafetensorError as error:
            raise UnsupportedType(
                f"{name!r} is {dtype}, which safetensors does not know; write a file that ends in .npz"
            ) from error
    framework = "pt" if any(one.kind == "tensor" for one in leaves.values()) else "np"
    metadata = {"format": framework, "rlbroker": _json(facts)}
    tied = ties(leaves.values())
    if tied:
        metadata["tied"] = _json(tied)
    if plain:
        metadata["values"] = _json(plain)
    try:
        serialize_file(specs, str(draft), metadata)
    except SafetensorError as error:
        raise OSError(str(error)) from error
    return {}


def _write_npz(
    draft: Path,
    leaves: Mapping[str, Content],
    arrays: Sequence[Array],
    plain: Mapping[str, Any],
    facts: Mapping[str, Any],
) -> dict[str, str]:
    as_bits = {}
    # As np.savez does, but for names such as `file`, which are its own arguments.
    with zipfile.ZipFile(draft, "w", allowZip64=True) as archive:
        archive.comment = _json(facts).encode()
        for name, one in leaves.items():
            assert one.leaf is not None
            array = arrays[one.leaf]
            if one.dtype == "bfloat16" or (one.kind == "tensor" and TORCH_DTYPES[one.dtype].view is not None):
                as_bits[name] = one.dtype
                array = array.view(f"u{array.itemsize}")
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array(member, np.asarray(array), allow_pickle=False)
    return as_bits


def _native(array: Array) -> Array:
    """Give elements in little endian, as safetensors has them."""
    return np.ascontiguousarray(array.astype(array.dtype.newbyteorder("<"), copy=False)).reshape(array.shape)


def _json(value: Any) -> str:
    return json.dumps(_plain(value), allow_nan=False)


def _plain(value: Any) -> Any:
    """Give what JSON can hold: numbers that it has no word for, and bytes, as text."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value.hex() if isinstance(value, bytes) else value
