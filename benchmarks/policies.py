"""Recordings of consecutive weights: `python -m benchmarks.policies [--output DIR]` makes them all anew.

They are made once, in about a minute, and kept beside this file; git does not.
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import os
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch

from benchmarks import training
from benchmarks.measure import progress
from benchmarks.training import Effort, Version

#: Where recordings are kept.
FOLDER = Path(__file__).parent / ".recordings"

#: By recording, the training that makes it, perhaps with others, and how far that goes.
RECORDINGS: dict[str, tuple[Callable[[Effort], dict[str, list[Version]]], Effort]] = {
    "ppo": (training.ppo, _PPO := Effort(updates=20, width=1024)),
    "ppo-step": (training.ppo, _PPO),
    "atari": (training.atari, Effort(updates=120, width=512)),
    "transformer": (training.transformer, _TRANSFORMER := Effort(updates=60, width=320)),
    "transformer-master": (training.transformer, _TRANSFORMER),
}


def load(name: str, folder: Path = FOLDER, *, effort: Effort | None = None) -> list[Version]:
    """Give the consecutive versions of a recording, oldest first; train first where it is missing or stale.

    Args:
        name: a key of `RECORDINGS`.
        folder: where recordings are kept.
        effort: how much training, where one is needed; by default as in `RECORDINGS`.
    """
    path = folder / f"{name}.pt"
    if not path.exists() or path.stat().st_mtime < Path(training.__file__).stat().st_mtime:
        make(name, folder, effort=effort)
    versions: list[Version] = torch.load(path, weights_only=True)
    return versions


def make(name: str, folder: Path = FOLDER, *, effort: Effort | None = None) -> None:
    """Train, and write recording `name` and those that come with it.

    On one thread: the sums, and so the weights, are then the same however many cores there are.
    """
    train, usual = RECORDINGS[name]
    progress(f"recording {name} into {folder}")
    started = time.perf_counter()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.random.fork_rng():
            recorded = train(effort or usual)
    finally:
        torch.set_num_threads(threads)
    folder.mkdir(parents=True, exist_ok=True)
    for title, versions in recorded.items():
        # A recording that was broken off must not pass for one.
        unfinished = folder / f"{title}.{os.getpid()}.tmp"
        torch.save(versions, unfinished)
        unfinished.replace(folder / f"{title}.pt")
    progress(f"  took {time.perf_counter() - started:.0f} s")


def main() -> None:
    """Make all recordings, each in a process of its own, the longest first."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.policies", description=__doc__)
    parser.add_argument("--output", type=Path, default=FOLDER, metavar="DIR")
    folder = parser.parse_args().output
    with ProcessPoolExecutor(os.cpu_count(), multiprocessing.get_context("spawn")) as pool:
        list(pool.map(make, ("transformer", "ppo", "atari"), itertools.repeat(folder)))


if __name__ == "__main__":
    main()
