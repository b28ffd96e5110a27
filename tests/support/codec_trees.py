"""Random trees for the wire format, and the check that one came back unchanged."""

from __future__ import annotations

import math
import struct
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st

from rlbroker.codec.dtypes import NUMPY_DTYPES, NUMPY_NAMES, TORCH_DTYPES
from rlbroker.codec.format import StoredSegment, find_body, read_header
from rlbroker.codec.limits import Limits


def assert_same(got: Any, sent: Any) -> None:
    """Check types, order of keys, shapes, dtypes and bits, and that arrays and tensors are writable."""
    assert type(got) is type(sent)
    if isinstance(sent, dict):
        assert list(got) == list(sent)
        for key in sent:
            assert_same(got[key], sent[key])
    elif isinstance(sent, list | tuple):
        assert len(got) == len(sent)
        for got_item, sent_item in zip(got, sent, strict=True):
            assert_same(got_item, sent_item)
    elif isinstance(sent, torch.Tensor):
        assert got.dtype == sent.dtype
        assert got.shape == sent.shape
        assert got.stride() == torch.empty(sent.shape, device="meta").stride()
        assert got.device.type == "cpu"
        assert not got.requires_grad
        assert tensor_bytes(got) == tensor_bytes(sent)
        if got.dtype in (torch.float32, torch.int64) and got.numel():
            assert got.numpy().flags.writeable
    elif isinstance(sent, np.ndarray):
        assert got.dtype == sent.dtype
        assert got.dtype.str == sent.dtype.str
        assert got.shape == sent.shape
        assert got.flags.writeable
        assert got.flags.c_contiguous
        assert element_bytes(got) == element_bytes(sent)
    elif isinstance(sent, np.generic):
        assert got.dtype == sent.dtype
        assert element_bytes(got) == element_bytes(sent)
    elif isinstance(sent, float):
        assert struct.pack("<d", got) == struct.pack("<d", sent)
    else:
        assert got == sent


def segments_of(message: bytes) -> list[StoredSegment]:
    """Return the descriptions of all segments of a whole message."""
    view = memoryview(message)
    return read_header(view[: find_body(view)], Limits()).segments


def element_bytes(array: np.ndarray[Any, Any] | np.generic) -> bytes:
    """Return the elements as bytes, without the six bytes of padding in each x87 long double."""
    raw = array.tobytes()
    if "x87" not in NUMPY_NAMES.get(array.dtype, ""):
        return raw
    elements = np.frombuffer(raw, np.uint8).reshape(-1, np.dtype(np.longdouble).itemsize)
    return elements[:, :10].tobytes() if array.dtype.byteorder in "=<" else elements[:, -10:].tobytes()


def tensor_bytes(tensor: torch.Tensor) -> bytes:
    """Return the elements of any tensor as bytes, in C order."""
    plain = tensor.detach().resolve_conj().resolve_neg().contiguous().reshape(-1)
    return plain.view(torch.uint8).numpy().tobytes() if plain.numel() else b""


def tensor_of(dtype_name: str, shape: tuple[int, ...], seed: int) -> torch.Tensor:
    """Return a tensor of random bits, NaN payloads and all."""
    dtype: torch.dtype = getattr(torch, dtype_name)
    raw = np.random.default_rng(seed).bytes(math.prod(shape) * dtype.itemsize)
    if not raw:
        # Through the carrier: torch warns when complex32 is made directly.
        view = TORCH_DTYPES[dtype_name].view
        return torch.empty(shape, dtype=getattr(torch, view) if view else dtype).view(dtype)
    carrier = np.frombuffer(raw, np.uint8).copy()
    if dtype_name == "bool":
        carrier %= 2
    return torch.from_numpy(carrier).view(dtype).reshape(shape)


def array_of(dtype_name: str, shape: tuple[int, ...], seed: int) -> np.ndarray[Any, Any]:
    """Return an array of random bits, NaN payloads and all."""
    dtype = NUMPY_DTYPES[dtype_name]
    raw = np.frombuffer(np.random.default_rng(seed).bytes(math.prod(shape) * dtype.itemsize), np.uint8).copy()
    if dtype_name == "|b1":
        raw %= 2
    return raw.view(dtype).reshape(shape)


shapes = st.lists(st.integers(0, 5), max_size=4).map(tuple)
seeds = st.integers(0, 1 << 32)
tensors = st.builds(tensor_of, st.sampled_from(sorted(TORCH_DTYPES)), shapes, seeds)
arrays = st.builds(array_of, st.sampled_from(sorted(NUMPY_DTYPES)), shapes, seeds)
native = [name for name, dtype in NUMPY_DTYPES.items() if dtype.isnative]
scalars = st.builds(lambda name, seed: array_of(name, (), seed)[()], st.sampled_from(native), seeds)
texts = st.text(max_size=12)
integers = st.integers() | st.integers(-(1 << 200), 1 << 200)
floats = st.integers(0, (1 << 64) - 1).map(lambda bits: struct.unpack("<d", struct.pack("<Q", bits))[0])
plain_values = (
    st.none() | st.booleans() | integers | floats | texts | st.binary(max_size=20) | st.floats()
) | st.integers(1000, 3000).map(bytes)
keys = texts | integers


def trees(leaves: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """Return nested dictionaries, lists and tuples of `leaves`."""
    return st.recursive(
        leaves,
        lambda inner: (
            st.dictionaries(keys, inner, max_size=4)
            | st.lists(inner, max_size=4)
            | st.lists(inner, max_size=4).map(tuple)
        ),
        max_leaves=12,
    )


any_tree = trees(plain_values | tensors | arrays | scalars)
