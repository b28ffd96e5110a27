"""The HTML page of the report, from its template."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime

import jinja2

from rlbroker.backend.text import age
from rlbroker.ops.formatting import describe_other_workers, format_bytes, format_number, format_share
from rlbroker.ops.inspect.bottleneck import RULE
from rlbroker.ops.inspect.findings import group_findings
from rlbroker.ops.inspect.timeline import Timeline
from rlbroker.ops.report.plots import draw_plots, styled
from rlbroker.ops.report.timeline_chart import draw_timeline


def render(timeline: Timeline, *, complete_hint: Callable[[str], str]) -> str:
    """Return the HTML page; `complete_hint` turns a hint into a command that can be typed."""
    # One UTC offset for all times of the page.
    now = datetime.fromtimestamp(timeline.snapshot.at).astimezone()
    zone = now.tzinfo or UTC
    with styled():
        plots, lanes = draw_plots(timeline, zone), draw_timeline(timeline, zone)
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
        "percent": format_share,
        "number": lambda number: f"{number:,}",
        "rate": format_number,
        "other_workers": describe_other_workers,
        "sentence": _sentence,
    }
    return environment.get_template("report.html.jinja").render(
        timeline=timeline,
        finding_groups=group_findings(timeline.findings),
        snapshot=timeline.snapshot,
        plots=plots,
        lanes=lanes,
        now=now,
        rule=RULE,
        complete_hint=complete_hint,
        settings=_describe_settings(timeline),
        most_behind=max((behind.most for behind in timeline.behind.values()), default=0),
    )


def _describe_settings(timeline: Timeline) -> dict[str, str]:
    snapshot = timeline.snapshot
    server, settings = snapshot.server, snapshot.settings
    return {
        "server": f"{server.address}, {server.version or 'version unknown'}",
        "maxmemory-policy": server.maxmemory_policy or "unknown",
        "memory used": "unknown"
        if server.used_bytes is None
        else format_bytes(server.used_bytes)
        + (f" of {format_bytes(server.maxmemory_bytes)}" if server.maxmemory_bytes else ", no limit")
        + (f", on {server.node}, the fullest node" if server.node else ""),
        "num_workers": f"{snapshot.expected_workers:,}",
        "max_queue_size": f"{settings.max_queue_size:,}",
        "max_queue_bytes": format_bytes(settings.max_queue_bytes),
        "when_full": settings.when_full,
        "lease_seconds": f"{settings.lease_seconds:g}",
        "forget_seconds": f"{settings.forget_seconds:g}",
    }


def _sentence(text: str) -> str:
    return f"{text[0].upper()}{text[1:]}."
