"""The contents of a stored version: read its header, download it, and write it as a safetensors or npz file.

Needs no torch. Names in a file are paths joined by dots, as in state dictionaries. Leaves keep the dtypes of the stored
form, and tied ones are written under each of their names. Bytes become arrays of uint8, or plain values if they are
shorter than 1 KiB, as in the stored form.
"""

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
from rlbroker.codec.describe import Content, ties
from rlbroker.codec.dtypes import is_carried_as_bits
from rlbroker.codec.image import ImageFormat
from rlbroker.codec.signing import SigningKey
from rlbroker.errors import InvalidArgument, UnsupportedType, UsageError, WireError
from rlbroker.weights.download import WEIGHTS_LIMITS, Downloader, check_hash
from rlbroker.weights.host_cache import ImageStore
from rlbroker.weights.manifest import StoredForm, digest_of

Array = NDArray[Any]

#: File formats that can be written, by suffix.
SUFFIXES: Final = (".safetensors", ".npz")

#: The name that safetensors reserves for metadata.
_RESERVED: Final = "__metadata__"


def read_contents(
    connection: Connection, keys: Keys, path: Sequence[StoredForm], *, key: SigningKey | None = None
) -> list[Content]:
    """Return the contents of a version, from its header alone.

    Args:
        path: the forms to download, from `StoredWeights.path`.
        key: the key that signs weights; None to accept unsigned weights.

    Raises:
        WireError: the header is gone, or cannot be read.
    """
    form = path[-1]
    if key:
        form.check(key, keys.run)
    header = connection.execute("GET", keys.chunk(form.upload, 0))
    if header is None:
        raise WireError(f"the header of version {form.version} is gone")
    if digest_of(header) != form.digest:
        raise WireError(f"the digest of the header of version {form.version} does not match the manifest")
    if key:
        check_hash(form, 0, header)
    return ImageFormat(header, WEIGHTS_LIMITS, arrays_only=True).contents()


def download_weights(
    connection: Connection,
    keys: Keys,
    path: Sequence[StoredForm],
    *,
    chunk_bytes: int,
    received: Callable[[int], object],
    key: SigningKey | None = None,
) -> tuple[list[Content], list[NDArray[Any]]]:
    """Download and decode a version, with the checks of a worker; return its contents and its arrays by leaf number.

    Args:
        path: the forms to download, from `StoredWeights.path`.
        chunk_bytes: the chunk size in the manifest.
        received: called with the size of each piece that arrives.
        key: the key that signs weights; None to accept unsigned weights.

    Raises:
        WireError: a chunk cannot be read, or is gone.
    """
    downloader = Downloader(connection, keys, ImageStore(keys.run, None), key=key, received=received)
    try:
        image_format, image = downloader.fetch_arrays(path, chunk_bytes)
    finally:
        downloader.close()
    arrays = image_format.arrays(image)
    for array in arrays:
        if array.dtype.kind == "b":  # in compiled code, bools other than 0 and 1 are undefined behaviour
            flags = array.reshape(-1).view(np.uint8)
            np.minimum(flags, 1, out=flags)
    return image_format.contents(), arrays


@dataclass(frozen=True)
class WrittenFile:
    """A file with weights.

    Attributes:
        tensors: the number of names in it.
        left_out: names of plain values, which its format cannot store.
        as_bits: by name, the dtype of each leaf that is stored as integers of its bits, as the format lacks the dtype.
    """

    tensors: int
    file_bytes: int
    left_out: tuple[str, ...]
    as_bits: Mapping[str, str]


def check_file(file: Path, *, force: bool) -> None:
    """Check, before a download, that a file can be written.

    Raises:
        InvalidArgument: the suffix is unknown, the directory does not exist, or the file exists and `force` is not set.
        UsageError: a package is missing; the message says how to install it.
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
        raise InvalidArgument(f"{file} exists; --force overwrites it")


def write_weights(
    file: Path, contents: Sequence[Content], arrays: Sequence[Array], *, facts: Mapping[str, Any], force: bool
) -> WrittenFile:
    """Write weights to a file, whole or not at all.

    Args:
        file: its suffix selects the format.
        arrays: by leaf number.
        facts: the origin of the weights, to store in the file; plain values.
        force: whether to replace an existing file.

    Raises:
        InvalidArgument: as `check_file`.
        UnsupportedType: the format cannot hold a value; the message names it.
        OSError: the file could not be written.
    """
    check_file(file, force=force)
    by_name = _index_by_name(contents)
    write: Callable[..., dict[str, str]] = _write_npz if file.suffix == ".npz" else _write_safetensors
    plain = {name: one.value for name, one in by_name.items() if one.leaf is None}
    leaves = {name: one for name, one in by_name.items() if one.leaf is not None}
    with _new_draft(file) as draft:
        mode = draft.stat().st_mode
        as_bits = write(draft, leaves, arrays, plain, facts)
        draft.chmod(mode)  # safetensors has made it readable only by its owner
        with draft.open("rb") as written:
            os.fsync(written.fileno())
        check_file(file, force=force)  # another process may have created it meanwhile
        file_bytes = draft.stat().st_size
        draft.replace(file)
    left_out = tuple(plain) if file.suffix == ".npz" else ()
    return WrittenFile(len(leaves), file_bytes, left_out, as_bits)


def _index_by_name(contents: Sequence[Content]) -> dict[str, Content]:
    by_name: dict[str, Content] = {}
    for one in contents:
        if one.name in by_name:
            raise UnsupportedType(f"two values are called {one.name!r} once their paths are joined with dots")
        by_name[one.name] = one
    return by_name


@contextmanager
def _new_draft(file: Path) -> Iterator[Path]:
    """Make an empty file in the same directory; delete it at the end of the block if it was not moved."""
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

    little_endian = [
        _to_little_endian(array) for array in arrays
    ]  # must stay in memory until they are written
    specs = {}
    for name, one in leaves.items():
        assert one.leaf is not None
        array = little_endian[one.leaf]
        keeps_name = one.kind == "tensor" or is_carried_as_bits(one.kind, one.dtype)
        dtype = one.dtype if keeps_name else array.dtype.name
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
    metadata = {"format": framework, "rlbroker": _dump_json(facts)}
    tied = ties(leaves.values())
    if tied:
        metadata["tied"] = _dump_json(tied)
    if plain:
        metadata["values"] = _dump_json(plain)
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
    # np.savez would take a name such as `file` for one of its own parameters.
    with zipfile.ZipFile(draft, "w", allowZip64=True) as archive:
        archive.comment = _dump_json(facts).encode()
        for name, one in leaves.items():
            assert one.leaf is not None
            array = arrays[one.leaf]
            if is_carried_as_bits(one.kind, one.dtype):
                as_bits[name] = one.dtype
                array = array.view(f"u{array.itemsize}")
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array(member, np.asarray(array), allow_pickle=False)
    return as_bits


def _to_little_endian(array: Array) -> Array:
    """Return an array in little-endian order, which safetensors requires."""
    return np.ascontiguousarray(array.astype(array.dtype.newbyteorder("<"), copy=False)).reshape(array.shape)


def _dump_json(value: Any) -> str:
    return json.dumps(_to_json_value(value), allow_nan=False)


def _to_json_value(value: Any) -> Any:
    """Return a value for JSON: bytes, and numbers such as NaN that JSON lacks, as text."""
    if isinstance(value, Mapping):
        return {str(key): _to_json_value(item) for key, item in value.items()}
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value.hex() if isinstance(value, bytes) else value
