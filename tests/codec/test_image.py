"""Images: weights as one flat buffer, decoded whole or from a delta."""

from __future__ import annotations

import gc
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import msgpack
import numpy as np
import pytest
import torch
from codec_images import LIMITS, Image, decode_image, encode_image, fill_image
from codec_trees import any_tree, array_of, assert_same, tensor_of
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from rlbroker.codec import compression
from rlbroker.codec.dtypes import NUMPY_DTYPES, TORCH_DTYPES
from rlbroker.codec.format import DENSE, MAGIC, PRELUDE, SAME, SPARSE, digest_of
from rlbroker.codec.image import EncodedSegment, ImageFormat, ImagePlan
from rlbroker.codec.limits import FORMAT_VERSION
from rlbroker.codec.message import MessageAssembly, decode
from rlbroker.errors import InvalidArgument, UnsupportedType, WireError

pytestmark = pytest.mark.unit


def every_dtype(rows: int, seed: int) -> dict[str, Any]:
    return {
        "torch": {name: tensor_of(name, (rows, 3), seed + i) for i, name in enumerate(sorted(TORCH_DTYPES))},
        "numpy": {name: array_of(name, (rows, 3), seed - i) for i, name in enumerate(sorted(NUMPY_DTYPES))},
    }


@settings(max_examples=100, deadline=None)
@given(any_tree, st.integers(1, 200) | st.just(4 << 20), st.booleans())
def test_an_image_holds_any_tree(tree: Any, segment_bytes: int, compression: bool) -> None:
    plan = ImagePlan(tree, segment_bytes=segment_bytes)
    header, stored = encode_image(plan, fill_image(plan), compression=compression)
    image_format, image = decode_image(header, stored)
    assert_same(image_format.tree(image), tree)
    assert not image_format.is_delta
    assert image_format.layout == plan.layout
    assert (image_format.image_bytes, image_format.raw_bytes) == (plan.image_bytes, plan.raw_bytes)
    # A whole image is a message like any other.
    assert_same(decode(b"".join([header, *stored])), tree)


@pytest.mark.parametrize("rows", [5, 30_000])
def test_every_dtype_survives_image_and_delta(rows: int) -> None:
    """Random bits, NaN payloads included."""
    old, new = every_dtype(rows, 100), every_dtype(rows, 900)
    for name, array in new["numpy"].items():
        array[: rows // 3] = old["numpy"][name][: rows // 3]
        array.view(np.uint8)[-1, -1] = 0
    old_plan, new_plan = ImagePlan(old), ImagePlan(new)
    assert old_plan.layout == new_plan.layout
    base, image = fill_image(old_plan), fill_image(new_plan)
    image_format, got = decode_image(*encode_image(new_plan, image, base), base=base)
    assert_same(image_format.tree(got), new)
    image_format, got = decode_image(*encode_image(new_plan, image, base), image=base, base=base)
    assert got is base
    assert_same(image_format.tree(got), new)


@settings(max_examples=150, deadline=None)
@given(
    any_tree,
    st.integers(1, 200) | st.just(4 << 20),
    st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), max_size=30),
    st.booleans(),
)
def test_any_edit_travels_as_a_delta(
    tree: Any, segment_bytes: int, edits: list[tuple[float, int]], in_place: bool
) -> None:
    plan = ImagePlan(tree, segment_bytes=segment_bytes)
    base = fill_image(plan)
    image = base.copy()
    places = np.concatenate([np.zeros(0, int), *(places_of(plan, image))])
    for where, byte in edits:
        if len(places):
            image[places[int(where * len(places))]] = byte
    header, stored = encode_image(plan, image, base)
    image_format = ImageFormat(header, LIMITS)
    out = base if in_place else np.zeros_like(base)
    for index, data in enumerate(stored):
        image_format.decode_segment(index, data, out, base)
    assert (out == image).all()


def places_of(plan: ImagePlan, image: Image) -> list[NDArray[Any]]:
    """Return the indices in the image of each segment's bytes."""
    image_format = ImageFormat(encode_image(plan, image)[0], LIMITS)
    views = [image_format.segment_view(index, image) for index in range(plan.segment_count)]
    start = image.__array_interface__["data"][0]
    return [np.arange(len(view)) + (view.__array_interface__["data"][0] - start) for view in views]


def weights(seed: int) -> dict[str, Any]:
    torch.manual_seed(seed)
    shared = torch.randn(150, 200)
    return {
        "in": shared,
        "out": shared,
        "half": torch.randn(60_000).bfloat16(),
        "turned": torch.randn(300, 200).t(),
        "bias": torch.randn(7),
        "mask": torch.rand(90_000) < 0.5,
        "steps": np.arange(20_000) * seed,
        "column": np.random.default_rng(seed).standard_normal((30_000, 2))[:, 0],
    }


def test_two_hundred_deltas_in_a_row_lead_to_the_same_bits() -> None:
    rng = np.random.default_rng(5)
    tied = torch.randn(100, 90)
    latest: dict[str, Any] = {
        "in": tied,
        "out": tied,
        "half": torch.randn(10_000).bfloat16(),
        "steps": np.arange(3000),
    }
    plan = ImagePlan(latest, segment_bytes=10_000)
    learner_image = fill_image(plan)
    image_format, worker_image = decode_image(*encode_image(plan, learner_image))
    digests = [0] * plan.segment_count
    for step in range(200):
        for value in (latest["in"].numpy(), latest["half"].view(torch.int16).numpy(), latest["steps"]):
            flat = value.reshape(-1)
            flat[rng.integers(0, flat.size, rng.integers(0, flat.size // 10))] += 1
        plan = ImagePlan(latest, segment_bytes=10_000)
        before, learner_image = learner_image, fill_image(plan)
        parts = [
            plan.encode_segment(i, learner_image, compression=True, base=before, base_digest=digests[i])
            for i in range(plan.segment_count)
        ]
        digests = [part.raw_digest for part in parts]
        image_format, worker_image = decode_image(
            plan.header([part.segment for part in parts]),
            [bytes(part.stored) for part in parts],
            image=worker_image,
            base=worker_image,
        )
        assert image_format.is_delta
        assert (worker_image == learner_image).all(), step
    got = image_format.tree(worker_image)
    assert_same(got, latest)
    assert got["in"] is got["out"]


def test_a_wrong_base_is_never_applied() -> None:
    tree = weights(1)
    base = fill_image(ImagePlan(tree))
    tree["in"] *= 1.00001
    tree["half"][::50] *= 2
    plan = ImagePlan(tree)
    header, stored = encode_image(plan, fill_image(plan), base)
    image_format = ImageFormat(header, LIMITS)
    deltas = [i for i, segment in enumerate(image_format.segments) if segment.is_delta]
    assert {image_format.segments[index].codec for index in deltas} == {SAME, DENSE, SPARSE}
    for index in deltas:
        for wrong in (None, base[:-64]):
            with pytest.raises(WireError, match="base"):
                image_format.decode_segment(index, stored[index], base.copy(), wrong)
        wrong = base.copy()
        image_format.segment_view(index, wrong)[-1] ^= 1
        out = np.full_like(base, 7)
        with pytest.raises(WireError, match="base"):
            image_format.decode_segment(index, stored[index], out, wrong)
        assert (out == 7).all()


def test_a_delta_without_a_base_is_refused() -> None:
    plan = ImagePlan(weights(1))
    base = fill_image(plan)
    image = base.copy()
    image[100] ^= 1
    header, stored = encode_image(plan, image, base)
    with pytest.raises(WireError, match="this is a delta"):
        MessageAssembly(header)
    with pytest.raises(WireError, match="this is a delta"):
        decode(b"".join([header, *stored]))
    assert all(segment.is_delta for segment in ImageFormat(header, LIMITS).segments)


def test_the_tree_may_change_once_an_image_is_filled() -> None:
    tree = weights(1)
    plan = ImagePlan(tree)
    image = fill_image(plan)
    tree["in"].zero_()
    tree["steps"][:] = 0
    image_format, got = decode_image(*encode_image(plan, image))
    assert_same(image_format.tree(got), weights(1))


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_filling_copies_large_leaves_straight_into_the_image(dtype: str | None) -> None:
    tree = {"w": np.zeros((1000, 3000), np.float32).T, "b": np.zeros(3_000_000, np.float64)[::2]}
    plan = ImagePlan(tree, dtype=dtype)
    image = np.zeros(plan.image_bytes, np.uint8)
    tracemalloc.start()
    plan.fill(image)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2 << 20


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_tensors_of_any_layout_fill_an_image(dtype: str | None) -> None:
    pairs = torch.randn(40_000, 2, dtype=torch.complex64)
    tree = {
        "negated": pairs.conj().imag,
        "conjugated": pairs.conj(),
        "expanded": torch.randn(3, 1).expand(3, 40_000),
        "parameter": torch.nn.Parameter(torch.randn(200, 200)),
        "small": pairs.conj().imag[:3],
    }
    plan = ImagePlan(tree, dtype=dtype)
    image_format, image = decode_image(*encode_image(plan, fill_image(plan)))
    for name, got in image_format.tree(image).items():
        plain = tree[name].detach().resolve_conj().resolve_neg()
        assert torch.equal(got, plain.bfloat16().float() if dtype and plain.is_floating_point() else plain)


def test_large_leaves_are_views_of_the_image_and_small_ones_are_not() -> None:
    plan = ImagePlan(weights(1))
    image_format, image = decode_image(*encode_image(plan, fill_image(plan)))
    got = image_format.tree(image)
    image[:] = 0
    assert not got["in"].any()
    assert not got["half"].any()
    assert got["bias"].all()
    assert got["mask"].any()


def test_a_view_keeps_its_image() -> None:
    plan = ImagePlan(weights(1))
    image_format, image = decode_image(*encode_image(plan, fill_image(plan)))
    got = image_format.tree(image)
    del image
    gc.collect()
    assert_same(got, weights(1))


def test_a_read_only_image_can_be_read() -> None:
    plan = ImagePlan(weights(1))
    image_format, image = decode_image(*encode_image(plan, fill_image(plan)))
    image.flags.writeable = False
    got = image_format.tree(image)
    assert torch.equal(got["in"], weights(1)["in"])
    assert not got["steps"].flags.writeable


def test_threads_may_encode_and_decode_segments_together() -> None:
    plan = ImagePlan(weights(1), segment_bytes=50_000)
    base = fill_image(plan)
    image = base.copy()
    image[::1000] ^= 1

    def encode(index: int) -> EncodedSegment:
        return plan.encode_segment(index, image, compression=True, base=base)

    with ThreadPoolExecutor(8) as pool:
        parts = list(pool.map(encode, range(plan.segment_count)))
        image_format = ImageFormat(plan.header([part.segment for part in parts]), LIMITS)
        decoded = pool.map(
            lambda index: image_format.decode_segment(index, parts[index].stored, base, base),
            range(len(parts)),
        )
        assert len(list(decoded)) > 20
    assert (base == image).all()


def test_lanes_begin_at_multiples_of_64_with_zeros_between() -> None:
    tree = [torch.full((70_001,), 0xFF, dtype=torch.uint8), torch.ones(33_333).half(), np.int8(1)]
    plan = ImagePlan(tree)
    image = fill_image(plan)
    # The small leaf has its lane last, as it was met last.
    starts = (0, 70_016, 70_016 + 66_688)
    assert plan.image_bytes == starts[2] + 64
    assert not image[70_001 : starts[1]].any()
    assert not image[starts[1] + 66_666 : starts[2]].any()
    assert not image[starts[2] + 1 :].any()


def test_a_raw_segment_may_be_received_into_its_place() -> None:
    plan = ImagePlan(weights(1))
    header, stored = encode_image(plan, fill_image(plan), compression=False)
    image_format = ImageFormat(header, LIMITS)
    assert {segment.codec for segment in image_format.segments} == {compression.RAW}
    image = np.zeros(image_format.image_bytes, np.uint8)
    for index, data in enumerate(stored):
        place = image_format.segment_view(index, image)
        place[:] = np.frombuffer(data, np.uint8)
        image.flags.writeable = False  # It is checked, and not written again.
        image_format.decode_segment(index, place.data, image)
        image.flags.writeable = True
        place[0] ^= 1
        with pytest.raises(WireError, match="digest"):
            image_format.decode_segment(index, place.data, image)
        place[0] ^= 1
    assert_same(image_format.tree(image), weights(1))


def test_raw_segments_are_sent_from_the_image_itself() -> None:
    plan = ImagePlan(weights(1))
    image = fill_image(plan)
    part = plan.encode_segment(0, image, compression=False, base=image)
    assert np.shares_memory(np.frombuffer(part.stored, np.uint8), image)
    assert part.raw_digest == part.segment.digest


@pytest.mark.parametrize(
    "change",
    [
        lambda tree: tree | {"in": tree["in"].reshape(200, 150)},
        lambda tree: tree | {"half": tree["half"].half()},
        lambda tree: tree | {"steps": tree["steps"][:-1]},
        lambda tree: tree | {"extra": np.ones(3)},
        lambda tree: tree | {"out": tree["in"].clone()},
        lambda tree: dict(reversed(tree.items())),
    ],
)
def test_another_architecture_has_another_layout(change: Any) -> None:
    tree = weights(1)
    plan = ImagePlan(tree)
    assert ImagePlan(weights(2)).layout == plan.layout
    assert ImagePlan(change(weights(1))).layout != plan.layout
    assert ImagePlan(tree, segment_bytes=1 << 20).layout == plan.layout
    assert ImagePlan(tree, segment_bytes=1 << 16).layout != plan.layout


def test_an_unsupported_value_is_refused_with_its_path() -> None:
    with pytest.raises(UnsupportedType, match=r"^\['a'\]\[1\]: "):
        ImagePlan({"a": [1, object()]})
    with pytest.raises(InvalidArgument, match="segment_bytes"):
        ImagePlan({}, segment_bytes=0)


@pytest.mark.parametrize(
    "image", [np.zeros(63, np.uint8), np.zeros(128, np.uint8)[::2], np.zeros(64, np.int8)]
)
def test_an_image_of_the_wrong_size_or_type_is_refused(image: Any) -> None:
    plan = ImagePlan([1.5, np.ones(3)])
    with pytest.raises(InvalidArgument, match="must be 64 contiguous bytes"):
        plan.fill(image)
    with pytest.raises(InvalidArgument, match="must be 64 contiguous bytes"):
        plan.encode_segment(0, image, compression=True)


def test_booleans_in_an_image_are_zero_or_one() -> None:
    odd = np.full(70_000, 0xFE, np.uint8)
    odd[::2] = 0
    tree = {"array": odd.view(bool), "tensor": torch.from_numpy(odd[:99].copy()).view(torch.bool)}
    plan = ImagePlan(tree)
    image = fill_image(plan)
    assert set(image.tolist()) == {0, 1}
    image_format, got = decode_image(*encode_image(plan, image))
    got[got == 1] = 3
    assert set(image_format.tree(got)["array"].view(np.uint8).tolist()) == {0, 1}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
def test_tensors_of_a_gpu_fill_an_image() -> None:
    tree = {"w": torch.randn(300, 500), "b": torch.randn(5), "t": torch.randn(400, 300).t()}
    plan = ImagePlan({name: tensor.cuda() for name, tensor in tree.items()})
    image_format, image = decode_image(*encode_image(plan, fill_image(plan)))
    assert_same(image_format.tree(image), tree)


@pytest.mark.parametrize(
    "metadata", [None, {}, {"": {"version": 1}, "a.b": {"v": (1, [None, "x", 1 << 70])}}]
)
def test_the_metadata_of_a_state_dict_is_kept(metadata: Any) -> None:
    header, _ = encode_image(ImagePlan({"w": 1}, metadata=metadata), np.zeros(0, np.uint8), compression=False)
    assert ImageFormat(header, LIMITS).metadata == metadata


@pytest.mark.parametrize("metadata", [[], {"": 1}, {1: {}}, {"": {"w": np.ones(1)}}, {"": {"w": object()}}])
def test_metadata_that_is_no_values_by_module_is_refused(metadata: Any) -> None:
    with pytest.raises(UnsupportedType, match="_metadata"):
        ImagePlan({"w": 1}, metadata=metadata)


@pytest.mark.parametrize("forged", [[], {"": 1}, {1: {}}, None, {"": {"w": msgpack.ExtType(1, bytes(4))}}])
def test_forged_metadata_is_refused(forged: Any) -> None:
    header, _ = encode_image(ImagePlan({"w": np.ones(1)}), np.zeros(64, np.uint8), compression=False)
    _, _, _, _, body_bytes, _ = PRELUDE.unpack_from(header)
    fields = msgpack.unpackb(header[PRELUDE.size :], strict_map_key=False)
    packed = msgpack.packb({**fields, "metadata": forged})
    prelude = PRELUDE.pack(MAGIC, FORMAT_VERSION, 0, len(packed), body_bytes, digest_of(packed))
    with pytest.raises(WireError, match=r"metadata|leaf 0 of 0"):
        ImageFormat(prelude + packed, LIMITS)
