"""A cost model of workers, batches, versions and bytes, fitted to measurements, and its prediction for a planned run.

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

from benchmarks.measure import Row
from benchmarks.report import format_number
from benchmarks.simulated_run import BATCH_BYTES, Measurement

#: The `against` column of the model's rows, which are compared with nothing.
AGAINST = "cost model"

#: The terms of the model: rates per second. For memory and connections, the numbers at the time.
TERMS: dict[str, Callable[[Measurement], float]] = {
    "run": lambda measurement: 1.0,
    "process": lambda measurement: float(len(measurement.worker_processes)),
    "worker": lambda measurement: float(measurement.workers),
    "batch": lambda measurement: measurement.batches_per_second,
    "read": lambda measurement: measurement.reads_per_second,
    "version": lambda measurement: measurement.versions_per_second,
    "delivery": lambda measurement: measurement.deliveries_per_second,
    "MB published": lambda measurement: measurement.published_per_second / 1e6,
    "MB downloaded": lambda measurement: measurement.downloaded_per_second / 1e6,
}


@dataclass(frozen=True)
class Resource:
    """A resource that a run uses, and the terms that it depends on."""

    name: str
    unit: str
    usage: Callable[[Measurement], float]  #: in this unit, per second if it is a rate
    terms: Sequence[str]


RESOURCES = (
    Resource(
        "learner's CPU",
        "ms",
        lambda measurement: 1e3 * measurement.learner.cpu_seconds / measurement.seconds,
        ("run", "worker", "batch", "read", "version", "delivery", "MB published"),
    ),
    Resource(
        "server's CPU",
        "ms",
        lambda measurement: 1e3 * measurement.server.cpu_seconds / measurement.seconds,
        ("run", "worker", "batch", "read", "version", "delivery", "MB published", "MB downloaded"),
    ),
    Resource(
        "workers' CPU",
        "ms",
        lambda measurement: 1e3 * measurement.workers_cpu_seconds / measurement.seconds,
        ("process", "worker", "batch", "delivery", "MB downloaded"),
    ),
    Resource(
        "bytes to the server",
        "KB",
        lambda measurement: measurement.server.received_bytes / measurement.seconds / 1e3,
        ("run", "worker", "batch", "delivery", "MB published"),
    ),
    Resource(
        "bytes from the server",
        "KB",
        lambda measurement: measurement.server.sent_bytes / measurement.seconds / 1e3,
        ("run", "worker", "batch", "delivery", "MB downloaded"),
    ),
    Resource("connections", "", lambda measurement: float(measurement.server.connections), ("run", "worker")),
)

#: Resources measured in an idle run, because versions stay in memory for a while.
IDLE_RESOURCES = (
    Resource(
        "server's memory", "KB", lambda measurement: measurement.server.memory_bytes / 1e3, ("run", "worker")
    ),
    Resource(
        "workers' memory",
        "KB",
        lambda measurement: measurement.workers_memory_bytes / 1e3,
        ("process", "worker"),
    ),
)

#: The cost of each term, by resource and term.
Model = Mapping[tuple[str, str], float]


def least_squares(amounts: NDArray[np.float64], usage: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return non-negative costs of the terms that minimise the relative errors.

    A term with a negative cost is too cheap to be seen in the noise, so it is left out.

    >>> amounts = np.array([[1.0, 0.0], [1.0, 10.0], [1.0, 1000.0]])
    >>> least_squares(amounts, amounts @ [2.0, 0.5]).round(6).tolist()
    [2.0, 0.5]
    """
    weights = 1 / np.maximum(np.abs(usage), 1e-9)
    costs = np.zeros(amounts.shape[1])
    kept = [column for column in range(amounts.shape[1]) if amounts[:, column].any()]
    while kept:
        fitted = np.linalg.lstsq(amounts[:, kept] * weights[:, None], usage * weights, rcond=None)[0]
        if fitted.min() >= 0:
            costs[kept] = fitted
            break
        del kept[int((fitted * np.abs(amounts[:, kept]).max(axis=0)).argmin())]
    return costs


def fit_rows(measurements: Sequence[Measurement], resources: Iterable[Resource] = RESOURCES) -> list[Row]:
    """Fit the model; return a row for each resource and term."""
    rows = []
    for resource in resources:
        amounts = np.array(
            [[TERMS[term](measurement) for term in resource.terms] for measurement in measurements]
        )
        usage = np.array([resource.usage(measurement) for measurement in measurements])
        costs = least_squares(amounts, usage)
        error = float(np.median(np.abs(amounts @ costs - usage) / np.maximum(np.abs(usage), 1e-9)))
        note = f"off by {100 * error:.0f} % (median of {len(measurements)} measurements)"
        rows += [
            Row(
                f"{resource.name} per {term}",
                AGAINST,
                "",
                [float(cost)],
                [],
                resource.unit,
                False,
                None,
                note,
            )
            for term, cost in zip(resource.terms, costs, strict=True)
        ]
    return rows


def read_model(rows: Iterable[Mapping[str, object]]) -> Model:
    """Return the model from the rows of a saved report."""
    model = {}
    for row in rows:
        if row["against"] == AGAINST:
            name, _, term = str(row["work"]).partition(" per ")
            ours = row["ours"]
            assert isinstance(ours, list)
            model[name, term] = median(ours)
    return model


@dataclass(frozen=True)
class PlannedRun:
    """A run whose needs are to be predicted."""

    workers: int
    workers_per_host: int  #: workers that share downloads; 1 without a host cache
    weights_bytes: float  #: the stored size, after compression
    versions_per_second: float
    batches_per_second: float
    batch_bytes: float
    reads_per_second: float  #: the highest rate at which the learner collects

    @property
    def downloads(self) -> float:
        """The number of downloads of each version."""
        return -(-self.workers // self.workers_per_host)

    @property
    def amounts(self) -> dict[str, float]:
        published = self.versions_per_second * self.weights_bytes / 1e6
        return {
            "run": 1.0,
            "process": 0.0,  # polling is part of the run's own work
            "worker": self.workers,
            "batch": self.batches_per_second,
            "read": min(self.reads_per_second, self.batches_per_second),
            "version": self.versions_per_second,
            "delivery": self.workers * self.versions_per_second,
            "MB published": published,
            "MB downloaded": published * self.downloads,
        }


def predict_usage(model: Model, resource: str, run: PlannedRun) -> float:
    """Return how much of a resource a run would use, in the resource's unit."""
    return sum(cost * run.amounts[term] for (name, term), cost in model.items() if name == resource)


def describe_needs(model: Model, run: PlannedRun) -> dict[str, str]:
    """Return what a run would need, as text by title."""
    learner, server, workers, received, sent, connections, memory = (
        predict_usage(model, resource, run)
        for resource in (
            "learner's CPU",
            "server's CPU",
            "workers' CPU",
            "bytes to the server",
            "bytes from the server",
            "connections",
            "server's memory",
        )
    )
    # The batches of the model have `BATCH_BYTES`.
    additional = run.batches_per_second * (run.batch_bytes - BATCH_BYTES) / 1e3
    received, sent = received + additional, sent + additional
    return {
        "downloads of each version": f"{run.downloads:,.0f}",
        "to the server": f"{format_number(received / 1e3)} MB/s",
        "from the server": f"{format_number(sent / 1e3)} MB/s",
        "link of the server, at least": f"{format_number(max(sent, received) * 8 / 1e6)} Gbit/s",
        "server's CPU": f"{format_number(server / 1e3)} cores",
        "learner's CPU for it": f"{format_number(learner / 1e3)} cores",
        "CPU for it of each worker": f"{format_number(workers / run.workers)} ms/s",
        "server's memory, besides weights and queues": f"{format_number(memory / 1e3)} MB",
        "connections": f"{connections:,.0f}",
    }


def costs(
    report: Annotated[Path, typer.Argument(help="The JSON report of `python -m benchmarks scale`.")],
    workers: Annotated[int, typer.Option(min=1)] = 1000,
    workers_per_host: Annotated[
        list[int] | None,
        typer.Option(min=1, help="Workers that share downloads; 1 without a host cache. [1, 8, 64]"),
    ] = None,
    weights_mb: Annotated[float, typer.Option(help="Stored size of one version.")] = 100.0,
    versions_per_minute: Annotated[float, typer.Option()] = 10.0,
    batches_per_second: Annotated[float, typer.Option(help="Of all workers together.")] = 1000.0,
    batch_kb: Annotated[float, typer.Option()] = 4.0,
    reads_per_second: Annotated[float, typer.Option(help="How often the learner collects.")] = 20.0,
) -> None:
    """Predict with the fitted model what a run would need of its server, its learner and its links."""
    shares = workers_per_host or [1, 8, 64]
    model = read_model(json.loads(report.read_text())["rows"])
    columns = [
        describe_needs(
            model,
            PlannedRun(
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
