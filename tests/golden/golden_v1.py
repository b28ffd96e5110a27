"""The contents of the golden messages of wire format 1, and the program that wrote them.

``python tests/golden/golden_v1.py`` writes the files that are missing. A golden file is never rewritten: a release that
cannot read one has broken the format, and needs a new version of it.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import torch

from rlbroker.codec.dtypes import ML_DTYPES, NUMPY_DTYPES, TORCH_DTYPES
from rlbroker.codec.image import ImagePlan
from rlbroker.codec.message import encode

HERE = Path(__file__).parent


def _bits(dtype: np.dtype[Any], shape: tuple[int, ...]) -> np.ndarray[Any, Any]:
    """Return bytes 0, 7, 14 … (mod 251) as elements, so that no random generator is involved."""
    raw = (np.arange(math.prod(shape) * dtype.itemsize) * 7 % 251).astype(np.uint8)
    return (raw % 2 if dtype.kind == "b" else raw).view(dtype).reshape(shape)


def _numpy() -> Any:
    # Without long doubles, whose layout depends on the platform.
    portable = [name for name in sorted(NUMPY_DTYPES) if "-" not in name]
    return {name: [_bits(NUMPY_DTYPES[name], shape) for shape in ((), (0, 2), (3, 5))] for name in portable}


def _torch() -> Any:
    return {
        name: torch.from_numpy(_bits(carrier, (3, 5))).view(getattr(torch, name))
        for name, (carrier, _) in sorted(TORCH_DTYPES.items())
    }


def _ml_dtypes() -> Any:
    return {
        name: [_bits(carrier, shape).view(getattr(ml_dtypes, name)) for shape in ((), (0, 2), (3, 5))]
        for name, carrier in sorted(ML_DTYPES.items())
    } | {"scalar": ml_dtypes.bfloat16(1.5)}


def _plain() -> Any:
    return {
        "none": None,
        "bools": [True, False],
        "ints": [0, -1, (1 << 63) - 1, -(1 << 63), (1 << 64) - 1, 1 << 64, -(1 << 63) - 1, -(1 << 200)],
        "floats": [0.0, -0.0, 1.5, math.inf, struct.unpack("<d", b"\1\2\3\0\0\0\xf0\x7f")[0]],
        "strings": ["", "abc", "é😀\0"],
        "bytes": [b"", b"\0\xff", bytes(range(256)) * 8],
        "tuples": ((), (1,), ((2,), [3, (4,)])),
        "empty": [{}, []],
        7: "int key",
        -(1 << 70): "long key",
        "scalars": [np.float32(1.25), np.bool(True), np.int64(-5), np.complex64(1 - 2j)],
    }


def _batch() -> Any:
    """Return a message of the ancestor."""
    return {
        "worker_id": 3,
        "experiences": {
            "obs": torch.arange(32 * 36).reshape(32, 4, 9).float() / 8,
            "actions": torch.arange(32) % 9,
            "rewards": torch.linspace(-1, 1, 32),
            "dones": torch.arange(32) % 10 == 9,
            "legal_masks": np.arange(32 * 9).reshape(32, 9) % 3 > 0,
        },
        "batch_size": 32,
        "timestamp": 1722222222.25,
    }


def _large() -> Any:
    """Return leaves large enough for lanes of their own, compressed and raw, and tied ones."""
    weight = torch.arange(20_000, dtype=torch.float32)
    noise = (np.arange(70_000, dtype=np.uint64) ** 3 * 0x9E3779B97F4A7C15 >> 40).astype(np.uint8)
    return {
        "w": weight,
        "tied": [weight],
        "half": weight.bfloat16().repeat(2),
        "noise": noise,
        "0": np.zeros(30_000),
    }


def _image(step: int) -> Any:
    """Return weights at one step, whose leaves differ from the step before in no word, few, all, or completely."""
    counts = np.arange(6_000, dtype=np.uint32)
    few = (counts * 40_503 % 65_521).astype(np.uint16)
    few[:: 97 + step] += np.uint16(step)
    most = counts * np.uint32(2_654_435_761)
    noise = (np.arange(9_000, dtype=np.uint64) ** 3 * 0x9E3779B97F4A7C15 >> np.uint64(40 + step)).astype(
        np.uint8
    )
    return {
        "few": torch.from_numpy(few.view(np.int16).copy()).view(torch.bfloat16),
        "all": torch.from_numpy((most + (counts % 7 + 1) * np.uint32(step)).view(np.int32).copy()),
        "same": torch.from_numpy(most.view(np.int32) // 3),
        "noise": noise,
        "zeros": np.zeros(3_000) if step else np.arange(3_000) ** 0.5,
        "bias": [torch.arange(5.0) + step, np.array(step)],
    }


def _cast() -> Any:
    """Return leaves that bfloat16 represents exactly."""
    return {
        "large": torch.arange(40_000).float() % 256,
        "small": torch.arange(5.0).double(),
        "array": np.arange(9.0).astype(">f4"),
        "int": torch.arange(3),
    }


EXPECTED = {
    "v1-batch.bin": _batch,
    "v1-large.bin": _large,
    "v1-ml-dtypes.bin": _ml_dtypes,
    "v1-numpy.bin": _numpy,
    "v1-plain.bin": _plain,
    "v1-torch.bin": _torch,
}

#: Headers of images with their segments; each but the first and the cast one is a delta to the one before.
IMAGES: dict[str, Callable[[], Any]] = {
    "v1-image-0.bin": lambda: _image(0),
    "v1-image-1.bin": lambda: _image(1),
    "v1-image-2.bin": lambda: _image(2),
    "v1-image-cast.bin": _cast,
}


def _image_messages() -> dict[str, bytes]:
    written = {}
    base = None
    for name, make in IMAGES.items():
        cast = name == "v1-image-cast.bin"
        plan = ImagePlan(make(), dtype="bfloat16" if cast else None, segment_bytes=8192)
        image = np.zeros(plan.image_bytes, np.uint8)
        plan.fill(image)
        parts = [
            plan.encode_segment(index, image, compression=True, base=None if cast else base)
            for index in range(plan.segment_count)
        ]
        header = plan.header([part.segment for part in parts])
        written[name] = b"".join([header, *(part.stored for part in parts)])
        base = image
    return written


if __name__ == "__main__":
    messages = {name: encode(make()) for name, make in EXPECTED.items()} | _image_messages()
    for name, message in messages.items():
        path = HERE / name
        if not path.exists():
            path.write_bytes(message)
            print(name, path.stat().st_size)
