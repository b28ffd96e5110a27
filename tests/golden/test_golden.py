"""Messages that earlier releases wrote can be read for ever; a missing file is a failure."""

from __future__ import annotations

import struct
from typing import Any

import numpy as np
import pytest
import torch
from codec_trees import segments_of
from golden_v1 import EXPECTED, HERE, IMAGES
from numpy.typing import NDArray

from rlbroker.codec import compression
from rlbroker.codec.format import DENSE, SAME, SPARSE, read_prelude
from rlbroker.codec.image import ImageFormat
from rlbroker.codec.limits import FORMAT_VERSION, Limits
from rlbroker.codec.message import decode

pytestmark = pytest.mark.unit


def bits(value: Any) -> Any:
    """Return a value that is equal for two trees exactly if types, dtypes, shapes and bits are."""
    if isinstance(value, dict):
        return [(key, bits(item)) for key, item in value.items()]
    if isinstance(value, list | tuple):
        return type(value), [bits(item) for item in value]
    if isinstance(value, torch.Tensor):
        return value.dtype, value.shape, value.contiguous().reshape(-1).view(torch.uint8).tolist()
    if isinstance(value, np.ndarray | np.generic):
        return type(value), value.dtype.str, value.shape, value.tobytes()
    if isinstance(value, float):
        return float, struct.pack("<d", value)
    return type(value), value


@pytest.mark.parametrize("name", sorted(EXPECTED))
def test_a_message_of_an_earlier_release_is_read(name: str) -> None:
    assert bits(decode((HERE / name).read_bytes())) == bits(EXPECTED[name]())


def test_tied_leaves_of_an_earlier_release_are_tied() -> None:
    got = decode((HERE / "v1-large.bin").read_bytes())
    assert got["w"] is got["tied"][0]


def test_each_codec_has_a_golden_message() -> None:
    codecs = {segment.codec for segment in segments_of((HERE / "v1-large.bin").read_bytes())}
    assert codecs == {compression.RAW, compression.BLOSC2}


def read_image(name: str, base: NDArray[np.uint8] | None = None) -> tuple[ImageFormat, NDArray[np.uint8]]:
    message = (HERE / name).read_bytes()
    end, _ = read_prelude(memoryview(message))
    image_format = ImageFormat(message[:end], Limits())
    image = np.empty(image_format.image_bytes, np.uint8)
    for index, segment in enumerate(image_format.segments):
        image_format.decode_segment(index, message[end : end + segment.stored_bytes], image, base)
        end += segment.stored_bytes
    assert end == len(message)
    return image_format, image


def test_a_chain_of_deltas_of_an_earlier_release_is_read() -> None:
    image = None
    codecs = []
    for name in ("v1-image-0.bin", "v1-image-1.bin", "v1-image-2.bin"):
        image_format, image = read_image(name, image)
        assert bits(image_format.tree(image)) == bits(IMAGES[name]())
        codecs.append({segment.codec for segment in image_format.segments})
    assert codecs[0] == {compression.RAW, compression.BLOSC2}
    assert codecs[1] | codecs[2] == {compression.RAW, compression.BLOSC2, SAME, DENSE, SPARSE}


def test_a_cast_image_of_an_earlier_release_is_read() -> None:
    image_format, image = read_image("v1-image-cast.bin")
    assert bits(image_format.tree(image)) == bits(IMAGES["v1-image-cast.bin"]())
    kept = image_format.tree(image, keep_dtype=True)
    assert kept["large"].dtype == kept["small"].dtype == torch.bfloat16
    assert kept["array"].dtype == ">f4"


def test_every_golden_file_is_tested_and_the_version_has_some() -> None:
    assert {path.name for path in HERE.glob("*.bin") if path.name.startswith("v")} == set(EXPECTED | IMAGES)
    assert any(name.startswith(f"v{FORMAT_VERSION}-") for name in EXPECTED)
