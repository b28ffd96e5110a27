"""Images of weights for tests: encoded and decoded at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rlbroker.codec.image import ImageFormat, ImagePlan
from rlbroker.codec.limits import Limits

Image = NDArray[np.uint8]
LIMITS = Limits()


def fill_image(plan: ImagePlan) -> Image:
    """Return a filled image of the tree."""
    # Not of zeros, so that a byte that is not written shows.
    image = np.full(plan.image_bytes, 0xAA, np.uint8)
    plan.fill(image)
    return image


def encode_image(
    plan: ImagePlan, image: Image, base: Image | None = None, *, compression: bool = True
) -> tuple[bytes, list[bytes]]:
    """Return the header and the stored bytes of each segment, with a base as differences to it."""
    parts = [
        plan.encode_segment(index, image, compression=compression, base=base)
        for index in range(plan.segment_count)
    ]
    return plan.header([part.segment for part in parts]), [bytes(part.stored) for part in parts]


def decode_image(
    header: bytes, stored: Sequence[bytes], image: Image | None = None, base: Image | None = None
) -> tuple[ImageFormat, Image]:
    """Decode all segments into `image`, or into a new one."""
    image_format = ImageFormat(header, LIMITS)
    if image is None:
        image = np.zeros(image_format.image_bytes, np.uint8)
    for index, data in enumerate(stored):
        image_format.decode_segment(index, data, image, base)
    return image_format, image


def image_round_trip(tree: object, *, dtype: str | None = None) -> Any:
    """Return a tree that was written to an image, encoded and decoded."""
    plan = ImagePlan(tree, dtype=dtype)
    image_format, image = decode_image(*encode_image(plan, fill_image(plan)))
    return image_format.tree(image)
