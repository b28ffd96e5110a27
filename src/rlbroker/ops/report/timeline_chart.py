"""The timeline chart of the report: a lane for each worker, coloured by the version that it ran.

It is drawn as an image: a shape for each of a thousand versions of a hundred workers would be too much for one page.
Marks at the foot of a lane are versions that the worker missed; in high lanes they lie on white.
"""

from __future__ import annotations

from datetime import tzinfo
from typing import Final

import matplotlib
import numpy as np
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize, to_rgba
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from rlbroker.ops.inspect.timeline import Timeline, VersionLanes, build_lanes
from rlbroker.ops.report.plots import (
    DAY_SECONDS,
    LEAST_TICKS,
    ORANGE,
    PURPLE,
    RED,
    draw_time_axis,
    new_figure,
    to_data_url,
)

#: Width in CSS pixels. A narrower page scrolls the chart, a wider one enlarges it.
WIDTH: Final = 800

#: Height in CSS pixels: of a lane, at most and at least, and of all lanes together unless they would be too low.
_LANE_PIXELS, _LEAST_LANE_PIXELS, _ALL_LANES_PIXELS = 22, 3, 560

#: The least height of lanes that are separated by white.
_SEPARATED_LANE_PIXELS = 6

#: Height of a line of text in CSS pixels.
_LINE_PIXELS = 14

#: Characters of a host name that are shown.
_HOST_LETTERS = 18

#: Least width of a mark in CSS pixels: one pixel would be invisible.
_MARK_PIXELS = 3

#: Colours of missed versions by reason; later ones cover earlier ones. Superseded versions are frequent and harmless.
_MISSED: Final = {"superseded": "#8d99a6", "left": PURPLE, "away": ORANGE, "failed": RED}

_COLORS: Final = "viridis"


def draw_timeline(timeline: Timeline, zone: tzinfo) -> str:
    """Return the chart as the URL of an image, or an empty text; must be called within `styled`."""
    lanes = build_lanes(timeline, WIDTH - 50)
    return to_data_url(_draw_lanes(lanes, timeline, zone)) if lanes.workers else ""


def _draw_lanes(lanes: VersionLanes, timeline: Timeline, zone: tzinfo) -> Figure:
    count = len(lanes.workers)
    lane_pixels = max(_LEAST_LANE_PIXELS, min(_LANE_PIXELS, _ALL_LANES_PIXELS // count))
    legend = _make_legend(lanes)
    lines = 4 + bool(legend)
    figure = new_figure(WIDTH, count * lane_pixels + lines * _LINE_PIXELS + 34)
    axes = figure.subplots()
    versions = [version for lane in lanes.versions for version in lane if version]
    lowest, highest = min(versions, default=0), max(versions, default=0)
    scale = Normalize(lowest, max(highest, lowest + 1))
    axes.imshow(
        _make_pixels(lanes, scale, lane_pixels, max(1, round(_MARK_PIXELS * lanes.columns / (WIDTH - 50)))),
        aspect="auto",
        interpolation="none",
        extent=(lanes.begin / DAY_SECONDS, lanes.end / DAY_SECONDS, count - 0.5, -0.5),
    )
    step = next(step for step in (1, 2, 4, 8, 16, 32) if step * lane_pixels >= _LINE_PIXELS - 1)
    labelled = range(0, count, step)
    axes.set_yticks(
        labelled,
        [_label_worker(timeline, lanes.workers[lane], with_host=step == 1) for lane in labelled],
    )
    axes.set_ylabel("worker")
    axes.grid(visible=False)
    axes.spines["left"].set_visible(False)
    draw_time_axis(axes, lanes.begin, lanes.end, timeline.restarts, zone, ticks=LEAST_TICKS)
    if legend:
        axes.legend(
            handles=legend,
            loc="lower left",
            bbox_to_anchor=(0, 1),
            ncols=4,
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
        # The same thickness in a low chart and in a high one.
        fraction=10 / (count * lane_pixels),
        pad=0.01,
        aspect=(WIDTH - 100) / 10,
    )
    bar.set_label("version")
    bar.outline.set_visible(False)
    bar.ax.xaxis.set_major_locator(MaxNLocator(8, integer=True))
    return figure


def _make_pixels(lanes: VersionLanes, scale: Normalize, lane_pixels: int, mark_cells: int) -> np.ndarray:
    """Return the colour of each pixel: for each lane rows for versions, rows for missed versions, and a gap if high."""
    versions = np.array(lanes.versions)
    colors = matplotlib.colormaps[_COLORS](scale(versions), bytes=True)
    colors[versions == 0] = 255
    between = 1 if lane_pixels >= _SEPARATED_LANE_PIXELS else 0
    missed = np.full_like(colors, 255) if between else colors.copy()
    for why, color in _MISSED.items():
        for mark in lanes.marks:
            if mark.why == why:
                first = max(0, min(mark.column - mark_cells // 2, lanes.columns - mark_cells))
                missed[mark.lane, first : first + mark_cells] = np.round(np.array(to_rgba(color)) * 255)
    missed_rows = max(1, lane_pixels // 4)
    lane = (
        [colors] * (lane_pixels - missed_rows - between)
        + [missed] * missed_rows
        + [np.full_like(colors, 255)] * between
    )
    # Stack the rows of each lane below one another.
    pixels: np.ndarray = np.stack(lane, axis=1).reshape(-1, lanes.columns, 4)
    return pixels


def _make_legend(lanes: VersionLanes) -> list[Patch]:
    missed = {why: sum(mark.count for mark in lanes.marks if mark.why == why) for why in reversed(_MISSED)}
    return [Patch(color=_MISSED[why], label=f"{why}: {count:,}") for why, count in missed.items() if count]


def _label_worker(timeline: Timeline, worker: int, *, with_host: bool) -> str:
    status = timeline.snapshot.workers.get(worker)
    if not with_host or status is None or status.info is None:
        return str(worker)
    host = status.info.host
    return f"{host[:_HOST_LETTERS]}{'…' if len(host) > _HOST_LETTERS else ''}  {worker}"
