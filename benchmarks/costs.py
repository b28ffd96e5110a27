"""A cost model: what each worker, batch, version and byte costs, fitted to measured crowds, and what a run would need.

python -m benchmarks.costs build/benchmarks/scale.json --workers 1000 --weights-mb 100 --versions-per-minute 10
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Annotated

import numpy as np
import typer
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from benchmarks.crowd import BATCH_BYTES, Point
from benchmarks.measure import Row
from benchmarks.report import number

#: What the rows of the model are compared with, which is nothing.
AGAINST = "cost model"

#: What costs something, each per second (memory and connections: as long as it is there).
TERMS: dict[str, Callable[[Point], float]] = {
    "run": lambda point: 1.0,
    "process": lambda point: float(len(point.crowd)),
    "worker": lambda point: float(point.workers),
    "batch": lambda point: point.batches_per_second,
    "read": lambda point: point.reads_per_second,
    "version": lambda point: point.versions_per_second,
    "delivery": lambda point: point.deliveries_per_second,
    "MB published": lambda point: point.published_per_second / 1e6,
    "MB downloaded": lambda point: point.downloaded_per_second / 1e6,
}


@dataclass(frozen=True)
class Figure:
    """Something that is used up, and by what."""

    name: str
    unit: str
    of: Callable[[Point], float]  #: in that unit, per second if it is a rate
    terms: Sequence[str]


FIGURES = (
    Figure(
        "learner's CPU",
        "ms",
        lambda point: 1e3 * point.learner.cpu_seconds / point.seconds,
        ("run", "worker", "batch", "read", "version", "delivery", "MB published"),
    ),
    Figure(
        "server's CPU",
        "ms",
        lambda point: 1e3 * point.server.cpu_seconds / point.seconds,
        ("run", "worker", "batch", "read", "version", "delivery", "MB published", "MB downloaded"),
    ),
    Figure(
        "workers' CPU",
        "ms",
        lambda point: 1e3 * point.crowd_cpu_seconds / point.seconds,
        ("process", "worker", "batch", "delivery", "MB downloaded"),
    ),
    Figure(
        "bytes to the server",
        "KB",
        lambda point: point.server.received_bytes / point.seconds / 1e3,
        ("run", "worker", "batch", "delivery", "MB published"),
    ),
    Figure(
        "bytes from the server",
        "KB",
        lambda point: point.server.sent_bytes / point.seconds / 1e3,
        ("run", "worker", "batch", "delivery", "MB downloaded"),
    ),
    Figure("connections", "", lambda point: float(point.server.connections), ("run", "worker")),
)

#: Of a crowd that has done nothing yet: versions stay in memory for a while.
SETTLED_FIGURES = (
    Figure("server's memory", "KB", lambda point: point.server.memory_bytes / 1e3, ("run", "worker")),
    Figure("workers' memory", "KB", lambda point: point.crowd_memory_bytes / 1e3, ("process", "worker")),
)

#: By figure and term.
Model = Mapping[tuple[str, str], float]


def least_squares(amounts: NDArray[np.float64], found: NDArray[np.float64]) -> NDArray[np.float64]:
    """Give what one of each thing costs, none less than nothing, such that the relative errors are small.

    A thing whose cost comes out below nothing costs too little to be seen in the noise: it is left out.

    >>> amounts = np.array([[1.0, 0.0], [1.0, 10.0], [1.0, 1000.0]])
    >>> least_squares(amounts, amounts @ [2.0, 0.5]).round(6).tolist()
    [2.0, 0.5]
    """
    weights = 1 / np.maximum(np.abs(found), 1e-9)
    costs = np.zeros(amounts.shape[1])
    kept = [column for column in range(amounts.shape[1]) if amounts[:, column].any()]
    while kept:
        fitted = np.linalg.lstsq(amounts[:, kept] * weights[:, None], found * weights, rcond=None)[0]
        if fitted.min() >= 0:
            costs[kept] = fitted
            break
        del kept[int((fitted * np.abs(amounts[:, kept]).max(axis=0)).argmin())]
    return costs


def fit(points: Sequence[Point], figures: Iterable[Figure] = FIGURES) -> list[Row]:
    """Give the rows of the model: one for each thing that a figure depends on."""
    rows = []
    for figure in figures:
        amounts = np.array([[TERMS[term](point) for term in figure.terms] for point in points])
        found = np.array([figure.of(point) for point in points])
        costs = least_squares(amounts, found)
        error = float(np.median(np.abs(amounts @ costs - found) / np.maximum(np.abs(found), 1e-9)))
        note = f"off by {100 * error:.0f} % (median of {len(points)} measurements)"
        rows += [
            Row(f"{figure.name} per {term}", AGAINST, "", [float(cost)], [], figure.unit, False, None, note)
            for term, cost in zip(figure.terms, costs, strict=True)
        ]
    return rows


def model_of(rows: Iterable[Mapping[str, object]]) -> Model:
    """Give the model that the rows of a saved report hold."""
    model = {}
    for row in rows:
        if row["against"] == AGAINST:
            name, _, term = str(row["work"]).partition(" per ")
            ours = row["ours"]
            assert isinstance(ours, list)
            model[name, term] = median(ours)
    return model


@dataclass(frozen=True)
class Run:
    """A run that somebody thinks of."""

    workers: int
    workers_per_host: int  #: that share what their host downloads; 1 where there is no host cache
    weights_bytes: float  #: as stored: after compression
    versions_per_second: float
    batches_per_second: float
    batch_bytes: float
    reads_per_second: float  #: how often the learner collects, at most

    @property
    def downloads(self) -> float:
        """How often each version leaves the server."""
        return -(-self.workers // self.workers_per_host)

    @property
    def amounts(self) -> dict[str, float]:
        published = self.versions_per_second * self.weights_bytes / 1e6
        return {
            "run": 1.0,
            "process": 0.0,  # polling is the work of the run itself
            "worker": self.workers,
            "batch": self.batches_per_second,
            "read": min(self.reads_per_second, self.batches_per_second),
            "version": self.versions_per_second,
            "delivery": self.workers * self.versions_per_second,
            "MB published": published,
            "MB downloaded": published * self.downloads,
        }


def needed(model: Model, figure: str, run: Run) -> float:
    """Give how much of a figure a run would need, in the figure's unit."""
    return sum(cost * run.amounts[term] for (name, term), cost in model.items() if name == figure)


def needs(model: Model, run: Run) -> dict[str, str]:
    """Give what a run would need, for people."""
    learner, server, workers, received, sent, connections, memory = (
        needed(model, figure, run)
        for figure in (
            "learner's CPU",
            "server's CPU",
            "workers' CPU",
            "bytes to the server",
            "bytes from the server",
            "connections",
            "server's memory",
        )
    )
    larger = run.batches_per_second * (run.batch_bytes - BATCH_BYTES) / 1e3  # than those of the model
    received, sent = received + larger, sent + larger
    return {
        "downloads of each version": f"{run.downloads:,.0f}",
        "to the server": f"{number(received / 1e3)} MB/s",
        "from the server": f"{number(sent / 1e3)} MB/s",
        "link of the server, at least": f"{number(max(sent, received) * 8 / 1e6)} Gbit/s",
        "server's CPU": f"{number(server / 1e3)} cores",
        "learner's CPU for it": f"{number(learner / 1e3)} cores",
        "CPU for it of each worker": f"{number(workers / run.workers)} ms/s",
        "server's memory, besides weights and queues": f"{number(memory / 1e3)} MB",
        "connections": f"{connections:,.0f}",
    }


def costs(
    report: Annotated[Path, typer.Argument(help="What `python -m benchmarks scale` has written.")],
    workers: Annotated[int, typer.Option(min=1)] = 1000,
    workers_per_host: Annotated[
        list[int] | None, typer.Option(min=1, help="That share downloads; 1 for none. [1, 8, 64]")
    ] = None,
    weights_mb: Annotated[float, typer.Option(help="One version as it is stored.")] = 100.0,
    versions_per_minute: Annotated[float, typer.Option()] = 10.0,
    batches_per_second: Annotated[float, typer.Option(help="Of all workers together.")] = 1000.0,
    batch_kb: Annotated[float, typer.Option()] = 4.0,
    reads_per_second: Annotated[float, typer.Option(help="How often the learner collects.")] = 20.0,
) -> None:
    """Say what a run would need of its server, its learner and its links, by the fitted model."""
    shares = workers_per_host or [1, 8, 64]
    model = model_of(json.loads(report.read_text())["rows"])
    columns = [
        needs(
            model,
            Run(
                workers,
                share,
                weights_mb * 1e6,
                versions_per_minute / 60,
                batches_per_second,
                batch_kb * 1024,
                reads_per_second,
            ),
        )
        for share in shares
    ]
    table = Table("", *(f"{share} per host" for share in shares))
    for name in columns[0]:
        table.add_row(name, *(column[name] for column in columns))
    Console(markup=False, highlight=False).print(table)


if __name__ == "__main__":
    typer.run(costs)
