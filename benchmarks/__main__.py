"""The command `python -m benchmarks`."""

from __future__ import annotations

import importlib
import importlib.util
import signal
import sys
import time
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks.measure import Row, progress
from benchmarks.report import machine, save, show
from benchmarks.servers import server

#: The modules that measure, by what they are about; each has `run(url, quick=…, repetitions=…)`, which gives rows.
SCENARIOS = {
    "weights": ("weights", "link", "codecs"),
    "experiences": ("experiences",),
    "latency": ("latency", "pauses"),
    "scale": ("scale", "growth", "nodes"),
    "soak": ("soak",),
}

#: Those of `all`; a soak takes ten minutes by itself.
ALL = ("weights", "experiences", "latency", "scale")

#: Parts that take a number of workers, and minutes.
CROWDS, LONG = ("growth", "soak"), ("soak",)


class Scenario(StrEnum):
    """What to measure."""

    WEIGHTS = "weights"
    EXPERIENCES = "experiences"
    LATENCY = "latency"
    SCALE = "scale"
    SOAK = "soak"
    ALL = "all"


def benchmarks(
    scenario: Annotated[Scenario, typer.Argument(help="What to measure.")],
    quick: Annotated[
        bool, typer.Option("--quick", help="Small sizes: to see that it works, not to compare.")
    ] = False,
    repetitions: Annotated[int, typer.Option(min=1, help="Samples of each contender.")] = 5,
    output: Annotated[Path, typer.Option(help="Directory for NAME.json, NAME.md and NAME.png.")] = Path(
        "build/benchmarks"
    ),
    only: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="One part: weights, link, codecs, experiences, latency, pauses, scale, growth, nodes.",
        ),
    ] = None,
    workers: Annotated[
        int | None,
        typer.Option(min=1, help="Simulated workers: of scale at most, of soak all the time [1,000]."),
    ] = None,
    minutes: Annotated[float | None, typer.Option(help="How long soak takes [10].")] = None,
    url: Annotated[str | None, typer.Option(help="Server to use; without one, an embedded server.")] = None,
) -> None:
    """Run rlbroker and its peers side by side, and print medians and ratios.

    Several minutes; progress goes to stderr, the table to stdout, and the same as JSON, Markdown and a picture to
    the output directory. Part of it needs root (network namespaces) or Ray (`pip install '.\\[bench]'`), and says so
    where they are missing. Exit code: 0, or 130 after Ctrl-C.

    Examples:

        python -m benchmarks all

        python -m benchmarks weights --only link --repetitions 3

        python -m benchmarks latency --quick --output /tmp/figures

        python -m benchmarks soak --workers 1000 --minutes 10
    """
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    began, facts = time.monotonic(), machine() | {"repetitions": repetitions, "quick": quick}
    names = [name for one in _chosen(scenario) for name in SCENARIOS[one] if only in (None, name)]
    if not names:
        raise typer.BadParameter(f"{scenario} has no part {only!r}", param_hint="--only")
    rows: list[Row] = []
    try:
        with server(url) as place:
            for name in names:
                if importlib.util.find_spec(f"benchmarks.{name}") is None:
                    progress(f"{name}: not there")
                    continue
                module = importlib.import_module(f"benchmarks.{name}")
                more: dict[str, Any] = {"workers": workers} if name in CROWDS else {}
                more |= {"minutes": minutes} if name in LONG else {}
                rows += module.run(place, quick=quick, repetitions=repetitions, **more)
    except KeyboardInterrupt:
        raise typer.Exit(130) from None
    finally:  # what was measured before Ctrl-C, or before an error, is not lost
        if rows:
            show(rows)
            for path in save(rows, facts, output, only or scenario.value):
                progress(f"wrote {path}")
    progress(f"done in {time.monotonic() - began:.0f} s")


def _chosen(scenario: Scenario) -> list[str]:
    return list(ALL) if scenario is Scenario.ALL else [scenario.value]


if __name__ == "__main__":
    app = typer.Typer(
        add_completion=False,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    app.command()(benchmarks)
    sys.exit(app())
