"""The small plots of the report, each as wide as a phone with metrics over time, and the style of all its plots."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import tzinfo
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.dates import AutoDateLocator, ConciseDateFormatter
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from rlbroker.ops.formatting import format_bytes, format_number, format_share
from rlbroker.ops.inspect.timeline import Timeline, TimelinePoint

#: Width of a plot in CSS pixels.
WIDTH = 330

#: The most times on the axis of a plot; with fewer, some spans would have no round times.
LEAST_TICKS = 7

#: matplotlib's dates are days since 1970.
DAY_SECONDS = 86_400

#: One coordinate of the points of a line.
Values = list[float]

#: CSS pixels per inch.
_PIXELS = 96

#: Size of all text. On a page 400 pixels wide it shrinks to 11 pixels, which is still readable.
_TEXT_PIXELS = 11.5

INK, FAINT, GRID = "#1f2933", "#52606d", "#d9dee4"

#: Colours for people with colour blindness (Okabe and Ito).
BLUE, ORANGE, GREEN, RED, SKY, PURPLE = "#0072b2", "#e69f00", "#009e73", "#d55e00", "#56b4e9", "#a5588a"

_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": _TEXT_PIXELS * 72 / _PIXELS,
    "axes.titlesize": _TEXT_PIXELS * 72 / _PIXELS,
    "axes.labelsize": _TEXT_PIXELS * 72 / _PIXELS,
    "xtick.labelsize": _TEXT_PIXELS * 72 / _PIXELS,
    "ytick.labelsize": _TEXT_PIXELS * 72 / _PIXELS,
    "legend.fontsize": _TEXT_PIXELS * 72 / _PIXELS,
    "text.color": INK,
    "text.parse_math": False,  # text from workers may contain dollar signs
    "axes.edgecolor": "#9aa5b1",
    "axes.labelcolor": FAINT,
    "axes.linewidth": 0.7,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "xtick.color": FAINT,
    "ytick.color": FAINT,
    "xtick.major.size": 3,
    "ytick.major.size": 0,
    "lines.linewidth": 1.3,
    "lines.solid_capstyle": "round",
    "path.simplify_threshold": 0.3,
}


@contextmanager
def styled() -> Iterator[None]:
    """Apply the style of the report in this block, regardless of the user's matplotlib settings."""
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_STYLE)
        yield


def new_figure(width_pixels: float, height_pixels: float) -> Figure:
    """Return an empty figure of this size."""
    return Figure(figsize=(width_pixels / _PIXELS, height_pixels / _PIXELS), layout="constrained")


def to_data_url(figure: Figure) -> str:
    """Return a figure, made within `styled`, as the URL of an SVG image whose text stays text."""
    written = io.BytesIO()
    no_metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    figure.savefig(written, format="svg", dpi=2 * _PIXELS, transparent=True, metadata=no_metadata)
    return f"data:image/svg+xml;base64,{base64.b64encode(written.getvalue()).decode()}"


@dataclass(frozen=True)
class PlotData:
    """The points to plot, and their span of time."""

    points: Sequence[TimelinePoint]
    begin: float
    end: float
    restarts: Sequence[float]
    zone: tzinfo

    @property
    def times(self) -> Values:
        """The times of a line, with NaN at gaps. After a gap it continues where the next interval begins."""
        return self._make_line(
            [((point.at - point.seconds) / DAY_SECONDS, point.at / DAY_SECONDS) for point in self.points]
        )

    def values(self, field: str) -> Values:
        """Return the values of a line, one for each time in `times`, of one of `METRICS`."""
        found = [point.values[field] for point in self.points]
        values = [math.nan if value is None else float(value) for value in found]
        return self._make_line([(value, value) for value in values])

    def _make_line(self, ends: Sequence[tuple[float, float]]) -> Values:
        """Return the coordinates of a line through the ends of all intervals, with NaN at gaps."""
        line: Values = []
        for point, (begin, end) in zip(self.points, ends, strict=True):
            if not point.continues:
                line += [math.nan, begin] if line else [begin]
            line.append(end)
        return line


@dataclass(frozen=True)
class Line:
    """A line of a plot: the metric that it shows, and how."""

    field: str
    color: str
    label: str
    style: str = "-"


def draw_plots(timeline: Timeline, zone: tzinfo) -> dict[str, str]:
    """Return all small plots as URLs of images, by name; must be called within `styled`."""
    data = PlotData(timeline.points(), timeline.begin, timeline.end, timeline.restarts, zone)
    draw_by_name = {
        "throughput": _draw_throughput,
        "weights": _draw_weights,
        "staleness": _draw_staleness,
        "waits": _draw_waits,
        "queues": _draw_queues,
        "workers": _draw_workers,
    }
    return {name: to_data_url(draw(data)) for name, draw in draw_by_name.items()} if data.points else {}


def _draw_throughput(data: PlotData) -> Figure:
    figure = new_figure(WIDTH, 330)
    for axes, (title, color, field, format_value) in zip(
        figure.subplots(3, 1, sharex=True),
        (
            ("batches per second", BLUE, "batches_per_second", format_number),
            ("rows per second", GREEN, "rows_per_second", format_number),
            ("bytes per second", PURPLE, "bytes_per_second", format_bytes),
        ),
        strict=True,
    ):
        _draw_area(axes, data, data.values(field), color)
        _finish(axes, data, title, format_value)
    return figure


def _draw_weights(data: PlotData) -> Figure:
    figure = new_figure(WIDTH, 240)
    first, second = figure.subplots(2, 1, sharex=True)
    _draw_area(first, data, data.values("versions_per_second"), BLUE)
    _finish(first, data, "versions per second", format_number)
    lines = (
        Line("published_bytes_per_second", SKY, "as tensors"),
        Line("published_stored_bytes_per_second", BLUE, "as stored"),
    )
    _draw_lines(second, data, format_bytes, lines)
    return figure


def _draw_staleness(data: PlotData) -> Figure:
    figure = new_figure(WIDTH, 220)
    axes = figure.subplots()
    p50, p90 = data.values("staleness_median"), data.values("staleness_90")
    axes.fill_between(data.times, p50, p90, color=ORANGE, alpha=0.3, lw=0)
    lines = Line("staleness_90", ORANGE, "p90"), Line("staleness_median", BLUE, "p50")
    _draw_lines(axes, data, format_number, lines)
    axes.yaxis.set_major_locator(MaxNLocator(4, integer=True))
    return figure


def _draw_waits(data: PlotData) -> Figure:
    figure = new_figure(WIDTH, 220)
    axes = figure.subplots()
    lines = (
        Line("learner_waits", BLUE, "learner waits for data"),
        Line("workers_wait", RED, "workers wait for room"),
        Line("encoding", GREEN, "encoding", "--"),
        Line("sending", PURPLE, "sending", ":"),
    )
    _draw_lines(axes, data, format_share, lines)
    axes.set_ylim(0, max(1.0, axes.get_ylim()[1]))
    if axes.get_ylim()[1] <= 1:
        axes.set_yticks((0, 0.5, 1))
    return figure


def _draw_queues(data: PlotData) -> Figure:
    figure = new_figure(WIDTH, 200)
    lines = Line("waiting", BLUE, "waiting"), Line("in_hand", ORANGE, "pending")
    _draw_lines(figure.subplots(), data, format_number, lines)
    return figure


def _draw_workers(data: PlotData) -> Figure:
    figure = new_figure(WIDTH, 200)
    axes = figure.subplots()
    _draw_lines(axes, data, format_number, (Line("alive", GREEN, "alive"), Line("away", RED, "away", "--")))
    axes.yaxis.set_major_locator(MaxNLocator(4, integer=True))
    return figure


def _draw_lines(
    axes: Axes, data: PlotData, format_value: Callable[[float], str], lines: Sequence[Line]
) -> None:
    """Draw lines, and a legend in place of a title."""
    for line in lines:
        axes.plot(
            data.times, data.values(line.field), color=line.color, label=line.label, linestyle=line.style
        )
    _finish(axes, data, "", format_value)
    axes.legend(
        loc="lower left",
        bbox_to_anchor=(-0.02, 1.0),
        ncols=2,
        frameon=False,
        borderpad=0,
        borderaxespad=0.3,
        handlelength=1.4,
        handletextpad=0.5,
        columnspacing=1.2,
        labelspacing=0.25,
    )


def _draw_area(axes: Axes, data: PlotData, values: Values, color: str) -> None:
    axes.fill_between(data.times, values, color=color, alpha=0.15, lw=0)
    axes.plot(data.times, values, color=color)


def _finish(axes: Axes, data: PlotData, title: str, format_value: Callable[[float], str]) -> None:
    axes.set_title(title, loc="left", color=FAINT, pad=4)
    axes.set_ylim(bottom=0)
    if axes.get_ylim()[1] <= 0.06:  # no value above 0
        axes.set_ylim(0, 1)
    axes.yaxis.set_major_locator(MaxNLocator(3))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: format_value(value)))
    draw_time_axis(axes, data.begin, data.end, data.restarts, data.zone, ticks=LEAST_TICKS)


def draw_time_axis(
    axes: Axes, begin: float, end: float, restarts: Sequence[float], zone: tzinfo, *, ticks: int
) -> None:
    """Show times on the horizontal axis, and mark the times at which a new learner continued the run."""
    axes.set_xlim(begin / DAY_SECONDS, max(end, begin + 1) / DAY_SECONDS)
    locator = AutoDateLocator(zone, minticks=3, maxticks=ticks)
    axes.xaxis.set_major_locator(locator)
    axes.xaxis.set_major_formatter(ConciseDateFormatter(locator, zone, show_offset=False))
    axes.grid(visible=False, axis="x")
    for at in restarts:
        axes.axvline(at / DAY_SECONDS, color=FAINT, linewidth=0.9, linestyle=(0, (2, 2)))
