"""Recordings of consecutive weights. `python -m benchmarks.policies [--output DIR]` creates all of them again.

They are created once, in about a minute, and kept beside this file. Git ignores them.
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
from benchmarks.training import TrainingSize, Version

#: The folder of the recordings.
FOLDER = Path(__file__).parent / ".recordings"

#: For each recording, the training that creates it (perhaps together with others) and its size.
RECORDINGS: dict[str, tuple[Callable[[TrainingSize], dict[str, list[Version]]], TrainingSize]] = {
    "ppo": (training.ppo, _PPO := TrainingSize(updates=20, width=1024)),
    "ppo-step": (training.ppo, _PPO),
    "atari": (training.atari, TrainingSize(updates=120, width=512)),
    "transformer": (training.transformer, _TRANSFORMER := TrainingSize(updates=60, width=320)),
    "transformer-master": (training.transformer, _TRANSFORMER),
}


def load(name: str, folder: Path = FOLDER, *, size: TrainingSize | None = None) -> list[Version]:
    """Return the consecutive versions of a recording, oldest first. Train first if it is missing or outdated.

    Args:
        name: a key of `RECORDINGS`.
        folder: the folder of the recordings.
        size: the size of the training, if it is needed; None for that in `RECORDINGS`.
    """
    path = folder / f"{name}.pt"
    if not path.exists() or path.stat().st_mtime < Path(training.__file__).stat().st_mtime:
        record(name, folder, size=size)
    versions: list[Version] = torch.load(path, weights_only=True)
    return versions


def record(name: str, folder: Path = FOLDER, *, size: TrainingSize | None = None) -> None:
    """Train, and write recording `name` and those that the same training creates.

    The training uses one thread, so that sums and weights do not depend on the number of cores.
    """
    train, default_size = RECORDINGS[name]
    progress(f"recording {name} into {folder}")
    started = time.perf_counter()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.random.fork_rng():
            recorded = train(size or default_size)
    finally:
        torch.set_num_threads(threads)
    folder.mkdir(parents=True, exist_ok=True)
    for title, versions in recorded.items():
        # Rename atomically: an interrupted recording must not look complete.
        unfinished = folder / f"{title}.{os.getpid()}.tmp"
        torch.save(versions, unfinished)
        unfinished.replace(folder / f"{title}.pt")
    progress(f"  took {time.perf_counter() - started:.0f} s")


def main() -> None:
    """Create all recordings, each in its own process, the longest first."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.policies", description=__doc__)
    parser.add_argument("--output", type=Path, default=FOLDER, metavar="DIR")
    folder = parser.parse_args().output
    with ProcessPoolExecutor(os.cpu_count(), multiprocessing.get_context("spawn")) as pool:
        list(pool.map(record, ("transformer", "ppo", "atari"), itertools.repeat(folder)))


if __name__ == "__main__":
    main()
