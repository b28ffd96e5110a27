"""Size and speed of stored weights. `python -m benchmarks.codecs` prints, as Markdown, when compression pays.

This needs no server. Every image is decoded again and compared. Everything runs on one thread and is measured in CPU
time, so the rates are those of one idle core.
"""

from __future__ import annotations

import argparse
import gzip
import time
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from statistics import median

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.measure import Row, progress
from benchmarks.policies import load
from benchmarks.training import Version
from rlbroker.codec.image import EncodedSegment, ImageFormat, ImagePlan
from rlbroker.codec.limits import Limits

#: The measured cases: the recording, the dtype that it is cast to when published, and the target of its delta ratio.
CASES: tuple[tuple[str, str | None, float | None], ...] = (
    ("transformer-master", None, 2.2),
    ("ppo-step", None, 1.5),
    ("ppo", None, None),
    ("atari", None, None),
    ("transformer", None, None),
    ("ppo-step", "bfloat16", None),
    ("ppo", "bfloat16", None),
    ("atari", "bfloat16", None),
)

#: Their titles in the rows.
TITLES = {
    "transformer-master": "transformer, a step of AdamW at 3e-6",
    "transformer": "transformer in bfloat16, a step of AdamW at 3e-6",
    "ppo-step": "policy for CartPole, a step of Adam at 3e-4",
    "ppo": "policy for CartPole, a PPO update of 16 steps at 3e-4",
    "atari": "Atari network, a step of Adam at 2.5e-4",
}

#: Bytes per second of links. The last is the rate of one Redis server and one client on one machine.
LINKS = {"1 Gbit/s": 0.117e9, "10 Gbit/s": 1.17e9, "loopback": 2.5e9}

#: How much gzip compresses for the comparison. It takes a second for 30 MB.
_GZIP_BYTES = 2 << 20

_Image = NDArray[np.uint8]


@dataclass(frozen=True)
class CodecTiming:
    """The sizes and times of one version, encoded and decoded on one core."""

    raw_bytes: int
    stored_bytes: int
    encode_seconds: float
    decode_seconds: float

    @property
    def encode_rate(self) -> float:
        """Raw bytes per second."""
        return self.raw_bytes / self.encode_seconds

    @property
    def decode_rate(self) -> float:
        """Raw bytes per second."""
        return self.raw_bytes / self.decode_seconds


@dataclass(frozen=True)
class Images:
    """Images of consecutive versions in memory, before they are encoded."""

    plan: ImagePlan
    images: list[_Image]
    copy_seconds: float  #: for one version: from the model, with the cast, and back into tensors
    changed: float  #: mean fraction of the elements that an update changes

    @classmethod
    def from_versions(cls, versions: Iterable[Version], dtype: str | None = None) -> Images:
        """Fill an image with each version, cast to `dtype`."""
        images: list[_Image] = []
        seconds: list[float] = []
        for version in versions:
            plan = ImagePlan(version, dtype=dtype)
            image = np.empty(plan.image_bytes, np.uint8)
            image.fill(0)  # touch the pages: a learner reuses its image
            started = time.process_time()
            plan.fill(image)
            filled = time.process_time() - started
            layout = _layout(plan, _encode_raw(plan, image))
            started = time.process_time()
            layout.tree(image)  # views, unless a tensor was cast
            seconds.append(filled + time.process_time() - started)
            images.append(image)
        # All floating tensors have the same width, and the padding between them is always 0.
        word = np.uint16 if dtype or next(iter(version.values())).dtype == torch.bfloat16 else np.uint32
        differing = [np.count_nonzero(a.view(word) != b.view(word)) for a, b in pairwise(images)]
        elements = plan.raw_bytes // np.dtype(word).itemsize
        return cls(plan, images, median(seconds), sum(map(int, differing)) / len(differing) / elements)

    def full(self) -> list[CodecTiming]:
        """Encode and decode each version but the first as a full version."""
        return [self._encode_and_decode(image, None) for image in self.images[1:]]

    def deltas(self) -> list[CodecTiming]:
        """Encode and apply each version but the first as a delta to the version before it."""
        return [self._encode_and_decode(image, base) for base, image in pairwise(self.images)]

    def _encode_and_decode(self, image: _Image, base: _Image | None) -> CodecTiming:
        plan, indices = self.plan, range(self.plan.segment_count)
        digests = [0] * len(indices)
        if base is not None:  # The learner has these digests, because it encoded the base before.
            digests = [segment.raw_digest for segment in _encode_raw(plan, base)]
        started = time.process_time()
        encoded = [
            plan.encode_segment(i, image, compression=True, base=base, base_digest=digests[i])
            for i in indices
        ]
        encoded_at = time.process_time()
        layout = _layout(plan, encoded)
        out = np.ones_like(image) if base is None else base.copy()
        decoding_started = time.process_time()
        for i, segment in enumerate(encoded):
            layout.decode_segment(i, segment.stored, out, None if base is None else out)
        ended = time.process_time()
        for i in indices:
            if not np.array_equal(layout.segment_view(i, out), layout.segment_view(i, image)):
                raise RuntimeError(f"segment {i} was not restored bit for bit")
        stored = sum(len(segment.stored) for segment in encoded)
        return CodecTiming(plan.raw_bytes, stored, encoded_at - started, ended - decoding_started)


def run(url: str, *, quick: bool, repetitions: int) -> list[Row]:
    """Return the rows on size and speed of stored weights.

    Args:
        url: not used; the other benchmarks need a server.
        quick: use a quarter of the bytes, and three versions of each recording.
        repetitions: the number of samples of each rate.
    """
    rows: list[Row] = []
    for percent, wanted in ((1, 130), (3, 55)):
        progress(f"bfloat16, {percent} % changed")
        images = Images.from_versions(_make_perturbed((16 if quick else 64) << 20, percent / 100))
        title = f"bfloat16, {percent} % changed by 1 ulp"
        rows += _delta_rows(title, images, wanted, repetitions, encode_wanted=True)
    for name, dtype, ratio in CASES:
        versions = load(name)
        progress(_format_title(name, dtype))
        images = Images.from_versions(versions[:3] if quick else versions, dtype)
        rows += _full_rows(_format_title(name, dtype), images, repetitions)
        rows += _delta_rows(_format_title(name, dtype), images, ratio, repetitions)
    return rows


def _delta_rows(
    title: str, images: Images, wanted: float | None, repetitions: int, *, encode_wanted: bool = False
) -> list[Row]:
    """Return rows with the sizes of deltas and full versions, and the rates of encoding and applying deltas."""
    rounds = [images.deltas() for _ in range(repetitions + 1)][1:]  # the first warms up
    encode, apply = _median_rates(rounds)
    below = break_even_rate(rounds[-1], encode, apply) / 0.125e9
    return [
        Row(
            f"{title}: delta",
            "its full size",
            f"≥ {wanted:g}× fewer bytes" if wanted else "",
            [timing.stored_bytes / 1e6 for timing in rounds[-1]],
            [timing.raw_bytes / 1e6 for timing in rounds[-1]],
            "MB",
            higher_is_better=False,
            target=1 / wanted if wanted else None,
            note=f"{images.changed:.1%} of elements change; pays on links below {below:.2g} Gbit/s",
        ),
        _rate_row(f"{title}: encode the delta, one core", 1.0, encode, wanted=encode_wanted),
        _rate_row(f"{title}: apply the delta, one core", 2.0, apply, wanted=True),
    ]


def _rate_row(work: str, mark: float, rates: list[float], *, wanted: bool) -> Row:
    return Row(
        work,
        f"a mark of {mark:g} GB/s",
        f"≥ {mark:g} GB/s" if wanted else "",
        [rate / 1e9 for rate in rates],
        [mark] * len(rates),
        "GB/s",
        higher_is_better=True,
        target=1.0 if wanted else None,
    )


def _full_rows(title: str, images: Images, repetitions: int) -> list[Row]:
    """Return rows that compare full versions with gzip 6, which the ancestor used."""
    part = bytes(images.images[-1][:_GZIP_BYTES])
    rounds: list[list[CodecTiming]] = []
    gzip_rates: list[float] = []
    images.full()
    for _ in range(repetitions):
        rounds.append(images.full())
        started = time.process_time()
        zipped = gzip.compress(part, 6)
        gzip_rates.append(len(part) / (time.process_time() - started))
    encode, _ = _median_rates(rounds)
    return [
        Row(
            f"{title}: full",
            "gzip 6",
            "",
            [100 * timing.stored_bytes / timing.raw_bytes for timing in rounds[-1]],
            [100 * len(zipped) / len(part)],
            "% of raw",
            higher_is_better=False,
            target=None,
            note=f"gzip on {len(part) / 1e6:.1f} MB of it",
        ),
        Row(
            f"{title}: encode full, one core",
            "gzip 6",
            "",
            [rate / 1e6 for rate in encode],
            [rate / 1e6 for rate in gzip_rates],
            "MB/s",
            higher_is_better=True,
            target=None,
        ),
    ]


def _median_rates(rounds: list[list[CodecTiming]]) -> tuple[list[float], list[float]]:
    """Return the median rates of encoding and decoding in each round, in bytes per second."""
    return (
        [median(timing.encode_rate for timing in timings) for timings in rounds],
        [median(timing.decode_rate for timing in timings) for timings in rounds],
    )


def break_even_rate(timings: list[CodecTiming], encode: list[float], decode: list[float]) -> float:
    """Return the rate of a link, in bytes per second, at which encoding and decoding take as much time as they save.

    The steps of one version run one after the other on one core: encoding, the link, decoding. With more cores, and
    with overlapping steps as in rlbroker, the real limit is higher.
    """
    saved = 1 - sum(timing.stored_bytes for timing in timings) / sum(timing.raw_bytes for timing in timings)
    return saved / (1 / median(encode) + 1 / median(decode))


def _encode_raw(plan: ImagePlan, image: _Image) -> list[EncodedSegment]:
    return [plan.encode_segment(i, image, compression=False) for i in range(plan.segment_count)]


def _layout(plan: ImagePlan, encoded: list[EncodedSegment]) -> ImageFormat:
    return ImageFormat(plan.header([encoded_segment.segment for encoded_segment in encoded]), Limits())


def _make_perturbed(nbytes: int, part: float) -> list[Version]:
    """Return two versions of a bfloat16 tensor that differ in a fraction `part` of the elements, by 1 ulp."""
    random = np.random.default_rng(0)
    weights = random.standard_normal(nbytes // 2, np.float32) * np.float32(0.02)
    before = torch.from_numpy(weights).to(torch.bfloat16)
    after = before.clone()
    positions = torch.from_numpy(np.flatnonzero(random.random(nbytes // 2, np.float32) < part))
    signs = torch.from_numpy(random.choice(np.array([-1, 1], np.int16), len(positions)))
    after.view(torch.int16)[positions] += signs
    return [{"weight": before}, {"weight": after}]


def _format_title(name: str, dtype: str | None) -> str:
    return TITLES[name] + (f", cast to {dtype}" if dtype else "")


def format_advice(rounds: int = 3) -> str:
    """Measure, and return as Markdown when compression, deltas and lower precision pay, case by case.

    All times are milliseconds for as many weights as 100 MB of float32. The steps run one after the other on one core:
    the copy from the model and back (with the casts), encoding, the link, decoding.
    """
    head = ["weights", "sent as", "changed", "bytes", "copy", "encode", "decode", *LINKS, "pays below"]
    lines = ["| " + " | ".join(head) + " |", "|---|---|" + "---:|" * (len(head) - 2)]
    for name, dtype, _ in CASES:
        progress(_format_title(name, dtype))
        images = Images.from_versions(load(name), dtype)
        share = 0.5 if dtype or name == "transformer" else 1.0
        for kind in ("raw", "full", "delta"):
            cells = _advice_cells(images, kind, 100e6 * share, rounds)
            lines.append(f"| {_format_title(name, dtype)} | {kind} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _advice_cells(images: Images, kind: str, raw_bytes: float, rounds: int) -> list[str]:
    """Return the cells of one line."""
    copying = images.copy_seconds * raw_bytes / images.plan.raw_bytes
    changed = below = ""
    encoding = decoding = 0.0
    stored_bytes = raw_bytes
    if kind != "raw":
        measured = [images.deltas() if kind == "delta" else images.full() for _ in range(rounds + 1)][1:]
        encode, decode = _median_rates(measured)
        encoding, decoding = raw_bytes / median(encode), raw_bytes / median(decode)
        stored_bytes *= sum(timing.stored_bytes for timing in measured[0]) / (
            len(measured[0]) * images.plan.raw_bytes
        )
        below = f"{break_even_rate(measured[0], encode, decode) / 0.125e9:.2g} Gbit/s"
        changed = f"{images.changed:.1%}" if kind == "delta" else ""
    steps = (copying, encoding, decoding)
    times = [*steps, *(sum(steps) + stored_bytes / link for link in LINKS.values())]
    return [changed, f"{stored_bytes / 100e6:.1%}", *(f"{1e3 * seconds:.0f}" for seconds in times), below]


if __name__ == "__main__":
    argparse.ArgumentParser(
        prog="python -m benchmarks.codecs",
        description="Print, as Markdown, when compression and deltas pay. Record the trainings first if needed.",
    ).parse_args()
    torch.set_num_threads(1)
    print(format_advice())
