"""The large picture of the page: a lane for each worker, coloured by the version that it ran.

It is drawn pixel by pixel, as a thousand versions of a hundred workers would be too many shapes for one page. The
versions that a worker missed are marks at the foot of its lane, on white where lanes are high enough for that.
"""

from __future__ import annotations

from typing import Final

import matplotlib
import numpy as np
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize, to_rgba
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from rlbroker.ops.inspect.timeline import Timeline, VersionLanes, build_lanes
from rlbroker.ops.report.plots import time_axis
from rlbroker.ops.report.svg import ORANGE, PURPLE, RED, inline, new_figure
from rlbroker.ops.report.times import Clock

#: Widths in CSS pixels: for a page on a desk, on paper and on a telephone.
WIDTHS: Final = {"wide": 1130, "middle": 660, "narrow": 325}

#: Height of a lane in CSS pixels: at most, at least, and of all of them together where that leaves room for it.
_LANE_PIXELS, _LEAST_LANE_PIXELS, _ALL_LANES_PIXELS = 22, 3, 560

#: Lanes of this height have white between them.
_WHITE_FROM_PIXELS = 6

#: Height of a line of text, in CSS pixels.
_LINE_PIXELS = 14

#: Letters of a host's name that are shown.
_HOST_LETTERS = 18

#: Missed versions are this wide at least, in CSS pixels: one pixel would not be seen.
_MARK_PIXELS = 3

#: Colours of missed versions, by reason; the later ones hide the earlier ones. Most are superseded, which is no harm.
_MISSED: Final = {"superseded": "#8d99a6", "left": PURPLE, "away": ORANGE, "failed": RED}

_COLORS: Final = "viridis"


def draw_timeline(course: Timeline, clock: Clock) -> dict[str, str]:
    """Draw the picture in each width, as `svg` elements by name; none without history. Call it within `styled`."""
    found = {}
    for name, width in WIDTHS.items():
        lanes = build_lanes(course, width - 50)
        if lanes.workers:
            found[f"lanes-{name}"] = inline(_draw(lanes, course, clock, width), f"lanes-{name}")
    return found


def _draw(lanes: VersionLanes, course: Timeline, clock: Clock, width: int) -> Figure:
    count, wide, narrow = len(lanes.workers), width == WIDTHS["wide"], width == WIDTHS["narrow"]
    lane_pixels = max(_LEAST_LANE_PIXELS, min(_LANE_PIXELS, _ALL_LANES_PIXELS // count))
    legend = _legend(lanes)
    legend_columns = 2 if narrow else 4
    lines = 4 + -(-len(legend) // legend_columns)
    figure = new_figure(width, count * lane_pixels + lines * _LINE_PIXELS + 34)
    axes = figure.subplots()
    known = [version for lane in lanes.versions for version in lane if version]
    scale = Normalize(min(known, default=0), max(max(known, default=0), min(known, default=0) + 1))
    axes.imshow(
        _pixels(lanes, scale, lane_pixels, max(1, round(_MARK_PIXELS * lanes.columns / (width - 50)))),
        aspect="auto",
        interpolation="none",
        extent=(lanes.begin, lanes.end, count - 0.5, -0.5),
    )
    step = next(step for step in (1, 2, 4, 8, 16, 32) if step * lane_pixels >= _LINE_PIXELS - 1)
    labelled = range(0, count, step)
    axes.set_yticks(
        labelled, [_label(course, lanes.workers[lane], with_host=wide and step == 1) for lane in labelled]
    )
    axes.set_ylabel("worker")
    axes.grid(visible=False)
    axes.spines["left"].set_visible(False)
    time_axis(axes, lanes.begin, lanes.end, course.restarts, clock, ticks=max(4, width // 110))
    if legend:
        axes.legend(
            handles=legend,
            loc="lower left",
            bbox_to_anchor=(0, 1),
            ncols=legend_columns,
            frameon=False,
            borderpad=0,
            borderaxespad=0.5,
            handlelength=0.9,
            handletextpad=0.5,
            columnspacing=1.5,
        )
    bar = figure.colorbar(
        ScalarMappable(scale, _COLORS),
        ax=axes,
        location="bottom",
        # As thick in a low picture as in a high one.
        fraction=10 / (count * lane_pixels),
        pad=0.01,
        aspect=(width - 100) / 10,
    )
    bar.set_label("version")
    bar.outline.set_visible(False)
    bar.ax.xaxis.set_major_locator(MaxNLocator(4 if narrow else 8, integer=True))
    return figure


def _pixels(lanes: VersionLanes, scale: Normalize, lane_pixels: int, mark_cells: int) -> np.ndarray:
    """Give the colour of each pixel: rows of the version, rows of what was missed, and a row between high lanes."""
    versions = np.array(lanes.versions)
    colors = matplotlib.colormaps[_COLORS](scale(versions), bytes=True)
    colors[versions == 0] = 255
    between = 1 if lane_pixels >= _WHITE_FROM_PIXELS else 0
    missed = np.full_like(colors, 255) if between else colors.copy()
    for why, color in _MISSED.items():
        for mark in lanes.marks:
            if mark.why == why:
                first = max(0, min(mark.column - mark_cells // 2, lanes.columns - mark_cells))
                missed[mark.lane, first : first + mark_cells] = np.round(np.array(to_rgba(color)) * 255)
    strip = max(1, lane_pixels // 4)
    lane = (
        [colors] * (lane_pixels - strip - between) + [missed] * strip + [np.full_like(colors, 255)] * between
    )
    # The first pixel of all lanes, the second of all lanes, … become pixels one below the other.
    pixels: np.ndarray = np.stack(lane, axis=1).reshape(-1, lanes.columns, 4)
    return pixels


def _legend(lanes: VersionLanes) -> list[Patch]:
    missed = {why: sum(mark.count for mark in lanes.marks if mark.why == why) for why in reversed(_MISSED)}
    return [Patch(color=_MISSED[why], label=f"{why}: {count:,}") for why, count in missed.items() if count]


def _label(course: Timeline, worker: int, *, with_host: bool) -> str:
    status = course.snapshot.workers.get(worker)
    if not with_host or status is None or status.info is None:
        return str(worker)
    host = status.info.host
    return f"{host[:_HOST_LETTERS]}{'…' if len(host) > _HOST_LETTERS else ''}  {worker}"
