"""matplotlib figures as inline SVG: text stays text, and ids are unique within the page."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from xml.etree import ElementTree

import matplotlib
from matplotlib.figure import Figure

#: CSS pixels per inch.
PIXELS = 96

#: Size of all text. On a page 400 pixels wide it shrinks to 11 pixels, which is still readable.
TEXT_PIXELS = 11.5

INK, FAINT, GRID = "#1f2933", "#52606d", "#d9dee4"

#: Colours for people with colour blindness (Okabe and Ito).
BLUE, ORANGE, GREEN, RED, SKY, PURPLE = "#0072b2", "#e69f00", "#009e73", "#d55e00", "#56b4e9", "#a5588a"

_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": TEXT_PIXELS * 72 / PIXELS,
    "axes.titlesize": TEXT_PIXELS * 72 / PIXELS,
    "axes.labelsize": TEXT_PIXELS * 72 / PIXELS,
    "xtick.labelsize": TEXT_PIXELS * 72 / PIXELS,
    "ytick.labelsize": TEXT_PIXELS * 72 / PIXELS,
    "legend.fontsize": TEXT_PIXELS * 72 / PIXELS,
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

_SVG = "{http://www.w3.org/2000/svg}"
_HREF = "{http://www.w3.org/1999/xlink}href"
_REFERENCE = re.compile(r"url\(#([^)]+)\)")
_NUMBER = re.compile(r"(\d+\.\d\d)\d+")


@contextmanager
def styled() -> Iterator[None]:
    """Apply the style of the report in this block, regardless of the user's matplotlib settings."""
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_STYLE)
        yield


def new_figure(width_pixels: float, height_pixels: float) -> Figure:
    """Return an empty figure of this size."""
    return Figure(figsize=(width_pixels / PIXELS, height_pixels / PIXELS), layout="constrained")


def inline(figure: Figure, name: str) -> str:
    """Return a figure, made within `styled`, as an `svg` element. Its ids begin with `name`, unique within the page."""
    written = io.BytesIO()
    no_metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    figure.savefig(written, format="svg", dpi=2 * PIXELS, transparent=True, metadata=no_metadata)
    root = ElementTree.fromstring(written.getvalue())
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag in (f"{_SVG}style", f"{_SVG}metadata"):  # their rules would apply to the whole page
                parent.remove(child)
    for element in root.iter():
        element.tag = element.tag.removeprefix(_SVG)
        for attribute, value in list(element.attrib.items()):
            del element.attrib[attribute]
            if attribute == "id":
                value = f"{name}-{value}"
            elif attribute in (_HREF, "href"):
                attribute = "href"
                value = f"#{name}-{value[1:]}" if value.startswith("#") else value
            else:
                value = _REFERENCE.sub(rf"url(#{name}-\1)", value)
            # Scale factors keep their digits: rounded ones would make a wide image some pixels too narrow.
            if attribute in ("d", "x", "y") or value.startswith("translate"):
                value = _NUMBER.sub(r"\1", value)
            element.set(attribute, value)
    for attribute in ("width", "height", "version"):
        root.attrib.pop(attribute, None)
    root.set("aria-hidden", "true")  # the figure element around it has a caption
    return ElementTree.tostring(root, encoding="unicode")
