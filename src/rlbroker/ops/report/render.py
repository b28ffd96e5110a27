"""Puts the page together."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jinja2

from rlbroker.ops.cli.formatting import age, describe_other_workers, format_bytes
from rlbroker.ops.inspect.bottleneck import RULE, percent
from rlbroker.ops.inspect.findings import gather
from rlbroker.ops.inspect.timeline import Timeline
from rlbroker.ops.report.plots import plots_of
from rlbroker.ops.report.svg import styled
from rlbroker.ops.report.timeline_chart import pictures_of
from rlbroker.ops.report.times import Clock, duration


def render(course: Timeline, *, typed: Callable[[str], str]) -> str:
    """Give the page.

    Args:
        course: what is known of the run.
        typed: completes a hint to what a person can type.
    """
    clock = Clock(course.snapshot.at)
    with styled():
        plots = plots_of(course, clock) | pictures_of(course, clock)
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("rlbroker.ops.report", "."),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters |= {
        "age": age,
        "size": format_bytes,
        "percent": percent,
        "duration": duration,
        "number": lambda number: f"{number:,}",
        "rate": _rate,
        "the_same_of": describe_other_workers,
        "sentence": _sentence,
        "full": clock.full,
        "iso": clock.iso,
    }
    return environment.get_template("report.html.jinja").render(
        course=course,
        gathered=gather(course.findings),
        run=course.snapshot,
        plots={name: _drawn(svg) for name, svg in plots.items()},
        zone=clock.zone,
        rule=RULE,
        typed=typed,
        settings=_settings(course),
        most_behind=max((one.most for one in course.behind.values()), default=0),
    )


def _drawn(svg: str) -> Any:
    from markupsafe import Markup

    return Markup(svg)


def _rate(number: float) -> str:
    """Give a rate that is short to read.

    >>> [_rate(number) for number in (0, 0.25, 12.34, 12345.6)]
    ['0', '0.25', '12.3', '12,346']
    """
    return f"{number:,.0f}" if number >= 100 else f"{number:.3g}"


def _settings(course: Timeline) -> dict[str, str]:
    run = course.snapshot
    chosen = run.settings
    return {
        "server": f"{run.server.address}, {run.server.version or 'version unknown'}",
        "maxmemory-policy": run.server.maxmemory_policy or "unknown",
        "memory used": "unknown"
        if run.server.used_bytes is None
        else format_bytes(run.server.used_bytes)
        + (f" of {format_bytes(run.server.maxmemory_bytes)}" if run.server.maxmemory_bytes else ", no limit")
        + (f", on {run.server.node}, the fullest node" if run.server.node else ""),
        "num_workers": f"{run.expected_workers:,}",
        "max_queue_size": f"{chosen.max_queue_size:,}",
        "max_queue_bytes": format_bytes(chosen.max_queue_bytes),
        "when_full": chosen.when_full,
        "lease_seconds": f"{chosen.lease_seconds:g}",
        "forget_seconds": f"{chosen.forget_seconds:g}",
    }


def _sentence(text: str) -> str:
    return f"{text[0].upper()}{text[1:]}."
