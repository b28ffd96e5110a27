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
from benchmarks.report import describe_machine, print_table, save_report
from benchmarks.servers import open_server

#: The modules of each scenario. Each has a function `run(url, quick=…, repetitions=…)` that returns rows.
SCENARIOS = {
    "weights": ("weights", "link", "codecs"),
    "experiences": ("experiences",),
    "latency": ("latency", "pauses"),
    "scale": ("scale", "growth", "nodes"),
    "soak": ("soak",),
}

#: The scenarios of `all`, without the soak, which takes ten minutes alone.
ALL = ("weights", "experiences", "latency", "scale")

#: The modules whose `run` also takes `workers`, and those whose `run` also takes `minutes`.
TAKE_WORKERS, TAKE_MINUTES = ("growth", "soak"), ("soak",)


class Scenario(StrEnum):
    """The scenarios of the command line."""

    WEIGHTS = "weights"
    EXPERIENCES = "experiences"
    LATENCY = "latency"
    SCALE = "scale"
    SOAK = "soak"
    ALL = "all"


def benchmarks(
    scenario: Annotated[Scenario, typer.Argument(help="What to measure.")],
    quick: Annotated[
        bool, typer.Option("--quick", help="Use small sizes, to test the benchmarks and not to compare.")
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
        typer.Option(min=1, help="Simulated workers: the most for scale, the number for soak [1,000]."),
    ] = None,
    minutes: Annotated[float | None, typer.Option(help="Duration of soak [10].")] = None,
    url: Annotated[str | None, typer.Option(help="Server to use; without one, an embedded server.")] = None,
) -> None:
    """Run rlbroker and its peers side by side, and print medians and ratios.

    Takes several minutes. Progress goes to stderr, the table to stdout, and JSON, Markdown and a picture of the same
    rows to the output directory. Some parts need root (network namespaces) or Ray (`pip install '.\\[bench]'`); without
    them the row says so. Exit code: 0, or 130 after Ctrl-C.

    Examples:

        python -m benchmarks all

        python -m benchmarks weights --only link --repetitions 3

        python -m benchmarks latency --quick --output /tmp/figures

        python -m benchmarks soak --workers 1000 --minutes 10
    """
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    started, facts = time.monotonic(), describe_machine() | {"repetitions": repetitions, "quick": quick}
    names = [name for part in _scenario_names(scenario) for name in SCENARIOS[part] if only in (None, name)]
    if not names:
        raise typer.BadParameter(f"{scenario} has no part {only!r}", param_hint="--only")
    rows: list[Row] = []
    try:
        with open_server(url) as server_url:
            for name in names:
                if importlib.util.find_spec(f"benchmarks.{name}") is None:
                    progress(f"{name}: not found")
                    continue
                module = importlib.import_module(f"benchmarks.{name}")
                more: dict[str, Any] = {"workers": workers} if name in TAKE_WORKERS else {}
                more |= {"minutes": minutes} if name in TAKE_MINUTES else {}
                rows += module.run(server_url, quick=quick, repetitions=repetitions, **more)
    except KeyboardInterrupt:
        raise typer.Exit(130) from None
    finally:  # keep the rows measured before Ctrl-C or an error
        if rows:
            print_table(rows)
            for path in save_report(rows, facts, output, only or scenario.value):
                progress(f"wrote {path}")
    progress(f"done in {time.monotonic() - started:.0f} s")


def _scenario_names(scenario: Scenario) -> list[str]:
    return list(ALL) if scenario is Scenario.ALL else [scenario.value]


if __name__ == "__main__":
    app = typer.Typer(
        add_completion=False,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    app.command()(benchmarks)
    sys.exit(app())
