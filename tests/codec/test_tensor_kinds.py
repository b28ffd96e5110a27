"""Every kind of tensor arrives with its bits, or is refused with its path and what to send instead."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from codec_images import image_round_trip
from codec_trees import assert_same

from rlbroker.codec.message import decode, encode
from rlbroker.errors import UnsupportedType

pytestmark = pytest.mark.unit

RoundTrip = Callable[[Any], Any]

ROUND_TRIPS = pytest.mark.parametrize(
    "round_trip", [lambda tree: decode(encode(tree)), image_round_trip], ids=["message", "image"]
)


def lazy_tensors(dtype: torch.dtype, shape: tuple[int, ...]) -> dict[str, torch.Tensor]:
    """Return tensors in one memory that differ only in what torch applies when it reads them."""
    z = torch.randn(shape, dtype=torch.complex128).to(dtype)
    tree = {
        "z": z,
        "conjugate": z.conj(),
        "back": z.conj().conj(),
        "adjoint": z.mH,
        "transposed": z.mT,
        "real": z.real,
        "imaginary": z.imag,
        "negative": z.conj().imag,
        "of a slice": z[1:].conj()[:, ::2],
        "the slice": z[1:][:, ::2],
        "view": torch._neg_view(z.real),
    }
    assert tree["conjugate"].is_conj()
    assert tree["negative"].is_neg()
    assert tree["view"].is_neg()
    return tree


@ROUND_TRIPS
@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
@pytest.mark.parametrize("shape", [(3, 4), (200, 300)])
def test_conjugate_and_negative_views_arrive_resolved_beside_what_they_view(
    round_trip: RoundTrip, dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    tree = lazy_tensors(dtype, shape)
    got = round_trip(tree)
    for name, tensor in tree.items():
        assert torch.equal(got[name], tensor.resolve_conj().resolve_neg()), name
        assert not got[name].is_conj()
        assert not got[name].is_neg()
    assert got["z"] is got["back"]
    assert got["negative"] is got["view"] or torch.equal(got["negative"], -got["imaginary"])


@ROUND_TRIPS
def test_the_same_lazy_view_twice_stays_tied(round_trip: RoundTrip) -> None:
    z = torch.randn(5, dtype=torch.complex64)
    got = round_trip({"a": z.conj(), "b": z.conj(), "z": z})
    assert got["a"] is got["b"]
    assert got["a"] is not got["z"]


def test_half_complex_views_are_resolved() -> None:
    z = torch.tensor([1 + 2j, 3 - 4j], dtype=torch.complex64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        got = decode(encode({"z": z.to(torch.complex32), "conjugate": z.to(torch.complex32).conj()}))
        assert torch.equal(got["conjugate"].to(torch.complex64), z.conj().resolve_conj())


def test_weights_that_are_cast_keep_the_sign_of_negative_views() -> None:
    z = torch.randn(64, dtype=torch.complex64)
    got = image_round_trip({"x": z.imag, "negative": z.conj().imag}, dtype="bfloat16")
    assert torch.equal(got["negative"], -got["x"])


def freed() -> torch.Tensor:
    tensor = torch.ones(8)
    tensor.untyped_storage().resize_(0)
    return tensor


def freed_view() -> torch.Tensor:
    tensor = torch.ones(8)
    view = tensor[2:]
    tensor.untyped_storage().resize_(0)
    return view


def shrunk() -> torch.Tensor:
    tensor = torch.ones(8, 8)
    tensor.untyped_storage().resize_(64 * 4 - 1)
    return tensor


def shrunk_strided() -> torch.Tensor:
    tensor = torch.ones(8, 8)
    view = tensor.T[::3, 1::2]
    tensor.untyped_storage().resize_(200)
    return view


def shrunk_parameter() -> torch.Tensor:
    return torch.nn.Parameter(shrunk())


def within(transform: Callable[..., Any]) -> torch.Tensor:
    """Return the tensor that a function sees under a transform of torch.func."""
    found: list[torch.Tensor] = []

    def note(x: torch.Tensor) -> torch.Tensor:
        found.append(x)
        return x.sum()

    transform(note)(torch.ones(2, 3))
    return found[0]


def fake() -> Any:
    from torch._subclasses import FakeTensorMode

    with FakeTensorMode():
        return torch.ones(3)


def distributed() -> Any:
    class DTensor(torch.Tensor):
        def full_tensor(self) -> torch.Tensor:
            return self.as_subclass(torch.Tensor)

    return torch.ones(2).as_subclass(DTensor)


REFUSED: list[tuple[Callable[[], Any], str]] = [
    (freed, "freed or shrunk: it needs 32 bytes and has 0"),
    (freed_view, "freed or shrunk: it needs 32 bytes and has 0"),
    (shrunk, "freed or shrunk: it needs 256 bytes and has 255"),
    (shrunk_strided, "freed or shrunk"),
    (shrunk_parameter, "freed or shrunk"),
    (lambda: torch.eye(3).to_sparse(), r"sparse_coo cannot travel; send to_dense\(\)"),
    (lambda: torch.eye(3).to_sparse_csr(), r"sparse_csr cannot travel; send to_dense\(\)"),
    (lambda: torch.eye(3).to_sparse_csc(), r"sparse_csc cannot travel; send to_dense\(\)"),
    (lambda: torch.eye(4).to_sparse_bsr((2, 2)), r"sparse_bsr cannot travel; send to_dense\(\)"),
    (lambda: torch.eye(4).to_sparse_bsc((2, 2)), r"sparse_bsc cannot travel; send to_dense\(\)"),
    (lambda: torch.zeros(0).to_sparse(), r"sparse_coo cannot travel"),
    (lambda: torch.eye(3).to_mkldnn(), r"_mkldnn cannot travel; send to_dense\(\)"),
    (lambda: torch._efficientzerotensor((3,)), r"ZeroTensor .* send clone\(\)"),
    (lambda: torch._efficientzerotensor((3,))[1:], r"ZeroTensor .* send clone\(\)"),
    (lambda: torch.ones(2, device="meta"), "meta device has no values"),
    (lambda: torch.ones(4, device="meta")[1:], "meta device has no values"),
    (lambda: torch.ones(0, device="meta"), "meta device has no values"),
    (lambda: within(torch.func.vmap), r"torch\.func"),
    (lambda: within(torch.func.grad), r"torch\.func"),
    (fake, "FakeTensor"),
    (distributed, r"DTensor cannot travel; send a plain one: full_tensor\(\)"),
    (lambda: torch._neg_view(torch.ones(3, dtype=torch.uint16)), "neg_cpu"),
]


@pytest.mark.filterwarnings("ignore")
@ROUND_TRIPS
@pytest.mark.parametrize(("make", "reason"), REFUSED, ids=[reason for _, reason in REFUSED])
def test_a_tensor_without_values_of_its_own_is_refused_with_its_path(
    round_trip: RoundTrip, make: Callable[[], Any], reason: str
) -> None:
    value = make()
    with pytest.raises(UnsupportedType, match=rf"^\['a'\]\[1\]\['x'\]: .*{reason}"):
        round_trip({"a": [1, {"x": value}]})


@ROUND_TRIPS
def test_tensors_of_autograd_and_of_inference_mode_travel(round_trip: RoundTrip) -> None:
    with torch.inference_mode():
        inference = torch.arange(4.0) * 2
    leaf = torch.ones(3, requires_grad=True)
    z = torch.randn(3, dtype=torch.complex64, requires_grad=True)
    tree = {
        "inference": inference,
        "its view": inference[1:],
        "negative": torch._neg_view(inference),
        "leaf": leaf,
        "result": leaf * 3,
        "conjugate": z.conj(),
        "parameter": torch.nn.Parameter(torch.ones(2)),
        "buffer": torch.nn.Buffer(torch.ones(2)),
        "in place": torch.ones(4)[::2].mul_(3),
    }
    got = round_trip(tree)
    for name, tensor in tree.items():
        assert torch.equal(got[name], tensor.detach().resolve_conj().resolve_neg()), name
    with torch.inference_mode():
        assert_same(round_trip({"x": torch.ones(2)}), {"x": torch.ones(2)})


@ROUND_TRIPS
def test_storage_larger_than_its_tensor_and_windows_on_it_travel(round_trip: RoundTrip) -> None:
    base = torch.arange(64.0)
    tree = {
        "window": base[8:24],
        "overlap": base.as_strided((4, 4), (2, 1), 3),
        "expanded": base[5].expand(3, 3),
        "unfolded": base.unfold(0, 8, 4),
        "last": base[63:],
        "whole": torch.ones(4)[:2].clone(),
    }
    assert_same(round_trip(tree), {name: tensor.contiguous() for name, tensor in tree.items()})
