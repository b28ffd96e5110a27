"""The small plots of the page, each as wide as a telephone: what happened over time."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from rlbroker.ops.cli.formatting import format_bytes
from rlbroker.ops.inspect.bottleneck import percent
from rlbroker.ops.inspect.timeline import Timeline, TimelinePoint
from rlbroker.ops.report.svg import BLUE, FAINT, GREEN, ORANGE, PURPLE, RED, SKY, inline, new_figure
from rlbroker.ops.report.times import Clock

#: Their natural width, in CSS pixels.
WIDTH = 330

#: Values of a line, one for each point.
Values = list[float]


@dataclass(frozen=True)
class Plotted:
    """The span that the plots show, and its points with gaps as NaN."""

    points: Sequence[TimelinePoint]
    begin: float
    end: float
    restarts: Sequence[float]
    clock: Clock

    @property
    def times(self) -> Values:
        """When each point ended; each line begins where its first interval did."""
        return self._line([(one.at - one.seconds, one.at) for one in self.points])

    def values(self, of: Callable[[TimelinePoint], float | None]) -> Values:
        """Give one value of each point, with gaps."""
        found = [math.nan if (value := of(one)) is None else float(value) for one in self.points]
        return self._line([(value, value) for value in found])

    def _line(self, both: Sequence[tuple[float, float]]) -> Values:
        line: Values = []
        for one, (first, second) in zip(self.points, both, strict=True):
            if not one.continues:
                line += [math.nan, first] if line else [first]
            line.append(second)
        return line


def plots_of(course: Timeline, clock: Clock) -> dict[str, str]:
    """Draw all small plots; give them as `svg` elements by name. Call it within `styled`."""
    shown = Plotted(course.points(), course.begin, course.end, course.restarts, clock)
    draw = {
        "throughput": _throughput,
        "weights": _weights,
        "staleness": _staleness,
        "waits": _waits,
        "queues": _queues,
        "workers": _workers,
    }
    return {name: inline(one(shown), name) for name, one in draw.items()} if shown.points else {}


def _throughput(shown: Plotted) -> Figure:
    figure = new_figure(WIDTH, 330)
    for axes, (title, color, of, write) in zip(
        figure.subplots(3, 1, sharex=True),
        (
            ("batches per second", BLUE, lambda one: one.batches_per_second, _short),
            ("rows per second", GREEN, lambda one: one.rows_per_second, _short),
            ("bytes per second", PURPLE, lambda one: one.bytes_per_second, format_bytes),
        ),
        strict=True,
    ):
        _area(axes, shown, shown.values(of), color)
        _dress(axes, shown, title, write)
    return figure


def _weights(shown: Plotted) -> Figure:
    figure = new_figure(WIDTH, 240)
    first, second = figure.subplots(2, 1, sharex=True)
    _area(first, shown, shown.values(lambda one: one.versions_per_second), BLUE)
    _dress(first, shown, "versions per second", _short)
    second.plot(
        shown.times, shown.values(lambda one: one.published_bytes_per_second), color=SKY, label="as tensors"
    )
    second.plot(
        shown.times,
        shown.values(lambda one: one.published_stored_bytes_per_second),
        color=BLUE,
        label="as stored",
    )
    _dress(second, shown, "bytes per second", format_bytes)
    _legend(second)
    return figure


def _staleness(shown: Plotted) -> Figure:
    figure = new_figure(WIDTH, 220)
    axes = figure.subplots()
    median, ninth = (
        shown.values(lambda one: one.staleness_median),
        shown.values(lambda one: one.staleness_90),
    )
    axes.fill_between(shown.times, median, ninth, color=ORANGE, alpha=0.3, lw=0)
    axes.plot(shown.times, ninth, color=ORANGE, label="nine of ten")
    axes.plot(shown.times, median, color=BLUE, label="median")
    _dress(axes, shown, "versions behind", _short)
    axes.yaxis.set_major_locator(MaxNLocator(4, integer=True))
    _legend(axes)
    return figure


def _waits(shown: Plotted) -> Figure:
    figure = new_figure(WIDTH, 220)
    axes = figure.subplots()
    for of, color, label, style in (
        (lambda one: one.learner_waits, BLUE, "learner waits for data", "-"),
        (lambda one: one.workers_wait, RED, "workers wait for room", "-"),
        (lambda one: one.encoding, GREEN, "encoding", "--"),
        (lambda one: one.sending, PURPLE, "sending", ":"),
    ):
        axes.plot(shown.times, shown.values(of), color=color, label=label, linestyle=style)
    _dress(axes, shown, "share of the time", percent)
    axes.set_ylim(0, max(1.0, axes.get_ylim()[1]))
    if axes.get_ylim()[1] <= 1:
        axes.set_yticks((0, 0.5, 1))
    _legend(axes)
    return figure


def _queues(shown: Plotted) -> Figure:
    figure = new_figure(WIDTH, 200)
    axes = figure.subplots()
    axes.plot(shown.times, shown.values(lambda one: one.waiting), color=BLUE, label="waiting")
    axes.plot(
        shown.times, shown.values(lambda one: one.in_hand), color=ORANGE, label="in the learner's hands"
    )
    _dress(axes, shown, "batches", _short)
    _legend(axes)
    return figure


def _workers(shown: Plotted) -> Figure:
    figure = new_figure(WIDTH, 200)
    axes = figure.subplots()
    axes.plot(shown.times, shown.values(lambda one: one.alive), color=GREEN, label="alive")
    axes.plot(shown.times, shown.values(lambda one: one.away), color=RED, label="away", linestyle="--")
    _dress(axes, shown, "workers", _short)
    axes.yaxis.set_major_locator(MaxNLocator(4, integer=True))
    _legend(axes)
    return figure


def _area(axes: Axes, shown: Plotted, values: Values, color: str) -> None:
    axes.fill_between(shown.times, values, color=color, alpha=0.15, lw=0)
    axes.plot(shown.times, values, color=color)


def _dress(axes: Axes, shown: Plotted, title: str, write: Callable[[float], str]) -> None:
    axes.set_title(title, loc="left", color=FAINT, pad=4)
    axes.set_ylim(bottom=0)
    if axes.get_ylim()[1] <= 0.06:  # nothing happened
        axes.set_ylim(0, 1)
    axes.yaxis.set_major_locator(MaxNLocator(3))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: write(value)))
    time_axis(axes, shown.begin, shown.end, shown.restarts, shown.clock, ticks=4)


def time_axis(
    axes: Axes, begin: float, end: float, restarts: Sequence[float], clock: Clock, *, ticks: int
) -> None:
    """Have the horizontal axis show times, and mark where a new learner went on."""
    axes.set_xlim(begin, max(end, begin + 1))
    places, write = clock.ticks(begin, end, ticks)
    axes.set_xticks(places, [write(one) for one in places])
    axes.grid(visible=False, axis="x")
    for at in restarts:
        axes.axvline(at, color=FAINT, linewidth=0.9, linestyle=(0, (2, 2)))


def _legend(axes: Axes) -> None:
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
    axes.set_title("", loc="left")  # the legend says it


def _short(value: float) -> str:
    for limit, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= limit:
            return f"{value / limit:.3g} {unit}"
    return f"{value:.3g}"
