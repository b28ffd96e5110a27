"""The large picture of the page: a lane for each worker, coloured by the version that it ran."""

from __future__ import annotations

from typing import Final

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from rlbroker.cli.page.plots import time_axis
from rlbroker.cli.page.svg import FAINT, INK, ORANGE, RED, inline, new_figure
from rlbroker.cli.page.times import Clock
from rlbroker.observer.course import Course
from rlbroker.observer.lanes import Lanes, lay_lanes

#: Widths in CSS pixels: for a page on a desk, and for one on a telephone.
WIDE, NARROW = 1130, 350

#: Height of a lane in CSS pixels: of few workers, and at least.
_LANE_PIXELS, _LEAST_LANE_PIXELS = 22, 4

#: Lanes that have a label each; of more, every n-th has.
_LABELS = 24

#: How missed versions are drawn, by reason: a sign, its size in points, and a colour.
_SIGNS: Final = {
    "superseded": ("|", 18, INK),
    "failed": ("x", 26, RED),
    "away": ("v", 20, ORANGE),
    "left": ("s", 14, FAINT),
}


def pictures_of(course: Course, clock: Clock) -> dict[str, str]:
    """Draw the picture in both widths, as `svg` elements by name; none without history. Call it within `styled`."""
    found = {}
    for name, width in (("lanes-wide", WIDE), ("lanes-narrow", NARROW)):
        lanes = lay_lanes(course, width - 50)
        if lanes.workers:
            found[name] = inline(_draw(lanes, course, clock, width), name)
    return found


def _draw(lanes: Lanes, course: Course, clock: Clock, width: int) -> Figure:
    count = len(lanes.workers)
    lane_pixels = max(_LEAST_LANE_PIXELS, min(_LANE_PIXELS, 900 / count))
    figure = new_figure(width, count * lane_pixels + 110)
    axes = figure.subplots()
    versions = np.ma.masked_equal(np.array(lanes.versions), 0)
    shown = axes.imshow(
        versions,
        aspect="auto",
        interpolation="nearest",
        cmap="cividis",
        vmin=versions.min() if versions.count() else 0,
        vmax=versions.max() if versions.count() else 1,
        extent=(lanes.begin, lanes.end, count - 0.5, -0.5),
    )
    _mark(axes, lanes)
    step = max(1, -(-count // _LABELS))
    axes.set_yticks(range(0, count, step), [str(worker) for worker in lanes.workers[::step]])
    axes.set_ylabel("worker")
    axes.grid(visible=False)
    time_axis(axes, lanes.begin, lanes.end, course.restarts, clock, ticks=4 if width < WIDE else 10)
    bar = figure.colorbar(shown, ax=axes, orientation="horizontal", fraction=0.03, pad=0.02, aspect=40)
    bar.set_label("version")
    bar.ax.xaxis.set_major_locator(MaxNLocator(4 if width < WIDE else 8, integer=True))
    return figure


def _mark(axes: Axes, lanes: Lanes) -> None:
    cell = (lanes.end - lanes.begin) / max(1, lanes.columns)
    drawn = False
    for why, (sign, size, color) in _SIGNS.items():
        marks = [mark for mark in lanes.marks if mark.why == why]
        if not marks:
            continue
        versions = sum(mark.count for mark in marks)
        axes.scatter(
            [lanes.begin + (mark.column + 0.5) * cell for mark in marks],
            [mark.lane for mark in marks],
            marker=sign,
            s=size,
            c=color,
            linewidths=0.9,
            label=f"missed: {why} ({versions:,})",
        )
        drawn = True
    if drawn:
        axes.legend(
            loc="lower left",
            bbox_to_anchor=(0, 1),
            ncols=4,
            frameon=False,
            handletextpad=0.2,
            columnspacing=1,
        )
