"""Drawings for reports: rooflines and bars, as SVG and PNG.

Colours are Okabe and Ito's, which stay apart for colour-blind readers, and every series also differs by marker or
hatch. Figures are made without pyplot, so nothing global is opened or left behind, and without dates, so that the same
data gives the same file. A digest of the data is kept inside the file: `make report` uses it to see a stale plot.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from module0_profiling.label_places import Box, Label, place
from module0_profiling.roofline import Point, Roof

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Drawing
    from matplotlib.lines import Line2D
    from matplotlib.transforms import Bbox

COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#000000")
MARKERS = "osD^vP*X"
FONT_SIZES = (8, 7, 6, 5)  # of labels: the largest at which all find a place
HATCHES = ("", "//", "..", "xx", "\\\\", "++", "oo", "--")
WITH_UNITS = ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def digest_of(data: object) -> str:
    """A short digest of plain data, to tell whether a drawing shows it."""
    return hashlib.sha256(repr(data).encode()).hexdigest()[:16]


def roofline_plot(
    points: Sequence[Point],
    roofs: Sequence[Roof],
    path: Path,
    *,
    title: str = "",
    digest: str = "",
    levels: Sequence[tuple[str, float]] = (),
) -> tuple[Path, Path]:
    """Draw roofs with their ridges and measured points on log-log axes; returns the paths of the SVG and the PNG.

    `levels` are faster levels of the memory, (name, bytes/s), such as ("L2", 5e12): each is a further slope. A point
    above the slope of the DRAM got its bytes from one of them.

    Raises:
        ValueError: without a roof, or for a point that is not positive (it has no place on a log axis).
    """
    drawing = roofline_drawing(points, roofs, title=title, levels=levels)[0]
    return save(drawing, path, digest)


def roofline_drawing(
    points: Sequence[Point], roofs: Sequence[Roof], *, title: str = "", levels: Sequence[tuple[str, float]] = ()
) -> tuple[Drawing, list[Box]]:
    """The drawing of `roofline_plot` and the boxes of its labels in pixels, those of the slopes first."""
    if not roofs:
        raise ValueError("a roofline needs at least one roof: measure the peaks first (titan peaks)")
    for point in points:
        if not (0 < point.intensity < math.inf and 0 < point.performance < math.inf):
            raise ValueError(f"point {point.label!r} at {point.intensity}, {point.performance}: both must be positive")
    for name, bandwidth in levels:
        if not 0 < bandwidth < math.inf:
            raise ValueError(f"memory level {name!r} at {bandwidth} bytes/s: it must be positive")
    drawing, axes = _canvas(8.0, 5.2)
    ridges = [roof.ridge for roof in roofs]
    ys = [roof.flops for roof in roofs] + [point.performance for point in points]
    xs = ridges + [point.intensity for point in points]
    fastest = max(roof.flops for roof in roofs)
    left, right = min([*xs, *(fastest / bandwidth for _, bandwidth in levels)]) / 8, max(xs) * 8
    axes.set(xscale="log", yscale="log", xlim=(left, right), ylim=(min(ys) / 8, max(ys) * 3))
    slopes = []
    for bandwidth in dict.fromkeys(roof.bandwidth for roof in roofs):
        top = max(roof.flops for roof in roofs if roof.bandwidth == bandwidth)
        slopes.append((f"{'DRAM ' if levels else ''}{short(bandwidth)}B/s", bandwidth, top, "-"))
    slopes += [(f"{name} {short(bandwidth)}B/s", bandwidth, fastest, "--") for name, bandwidth in levels]
    for _, bandwidth, top, style in slopes:
        axes.plot([left, top / bandwidth], [left * bandwidth, top], style, color="black", linewidth=2)
    for index, roof in enumerate(roofs):
        _draw_ceiling(axes, roof, right, COLOURS[index % len(COLOURS)])
    for index, point in enumerate(points):
        colour, marker = COLOURS[(index + len(roofs)) % len(COLOURS)], MARKERS[index % len(MARKERS)]
        axes.plot(
            point.intensity, point.performance, marker, color=colour, markersize=8, markeredgecolor="black", zorder=5
        )
    axes.set(xlabel="arithmetic intensity, FLOP/byte", ylabel="performance, FLOP/s", title=title)
    axes.grid(True, which="major", alpha=0.3)
    axes.legend(loc="lower right", fontsize=8)
    wanted = [_Text(text, _along_slope(axes, bandwidth, top), pointed=False) for text, bandwidth, top, _ in slopes]
    wanted += [_Text(point.label, [(point.intensity, point.performance)]) for point in points]
    return drawing, _write_labels(axes, wanted)


def _along_slope(axes: Axes, bandwidth: float, top: float) -> list[tuple[float, float]]:
    """Points (x, y) on the visible part of a slope at which its label may stand, from its lower end upwards."""
    x0 = max(axes.get_xlim()[0], axes.get_ylim()[0] / bandwidth)
    x1 = top / bandwidth
    xs = [x0 * (x1 / x0) ** (i / 10) for i in range(1, 10)]
    return [(x, x * bandwidth) for x in xs]


def _draw_ceiling(axes: Axes, roof: Roof, right: float, colour: str) -> None:
    label = f"{roof.name or 'roof'}: {short(roof.flops)}FLOP/s, ridge at {roof.ridge:.3g} FLOP/byte"
    axes.plot([roof.ridge, right], [roof.flops, roof.flops], color=colour, linewidth=2, label=label)
    axes.plot(roof.ridge, roof.flops, "|", color=colour, markersize=14, markeredgewidth=2)


def label_points(axes: Axes, labelled: Sequence[tuple[str, float, float]]) -> list[Box]:
    """Write a label near each (x, y) so that no two texts overlap and no point is hidden; returns the texts' boxes.

    A thin line leads from the label to its point. Where the frame has no room for all of them the letters get smaller,
    and what then still has no place is named below the axis.
    """
    return _write_labels(axes, [_Text(label, [(x, y)]) for label, x, y in labelled])


@dataclass(frozen=True)
class _Text:
    """A text, the points (x, y) beside which it may stand, and whether a line leads to the first of them."""

    text: str
    anchors: Sequence[tuple[float, float]]
    pointed: bool = True


def _write_labels(axes: Axes, wanted: Sequence[_Text]) -> list[Box]:
    """Write texts into free places, in smaller letters when there are too many; returns their boxes in pixels."""
    figure = axes.get_figure()
    assert figure is not None
    figure.canvas.draw()
    for size in FONT_SIZES:
        places = _find_places(axes, wanted, size)
        if None not in places:
            break
    omitted: list[str] = []
    axis_label = axes.get_xlabel()
    while None in places:
        omitted += [item.text for item, box in zip(wanted, places, strict=True) if box is None]
        wanted = [item for item, box in zip(wanted, places, strict=True) if box is not None]
        axes.set_xlabel(f"{axis_label}\nno room for {len(omitted)} labels, of {omitted[0]} and others")
        figure.canvas.draw()  # the frame has moved
        places = _find_places(axes, wanted, size)
    boxes = [box for box in places if box is not None]
    line = {"arrowstyle": "-", "linewidth": 0.6, "color": "grey", "shrinkA": 0, "shrinkB": 4}
    for item, box in zip(wanted, boxes, strict=True):
        x, y = axes.transData.transform(item.anchors[0])
        axes.annotate(
            item.text,
            item.anchors[0],
            xytext=((box.x0 - x) * 72 / figure.dpi, (box.y0 - y) * 72 / figure.dpi),
            textcoords="offset points",
            verticalalignment="bottom",
            fontsize=size,
            zorder=6,
            arrowprops=line if item.pointed else None,
        )
    return boxes


def _find_places(axes: Axes, wanted: Sequence[_Text], size: float) -> list[Box | None]:
    figure = axes.get_figure()
    assert figure is not None
    renderer = figure.canvas.get_renderer()  # type: ignore[attr-defined]
    labels = []
    for item in wanted:
        measured = axes.text(*item.anchors[0], item.text, fontsize=size)
        width, height = map(float, measured.get_window_extent(renderer).size)
        measured.remove()
        anchors = [(float(x), float(y)) for x, y in axes.transData.transform(item.anchors)]
        labels.append(Label(width, height, anchors))
    return place(labels, _obstacles(axes, renderer), _box(axes.get_window_extent()))


def _obstacles(axes: Axes, renderer: Any) -> list[Box]:
    """What a label must not cover: texts, the legend, markers and lines."""
    taken = [_box(text.get_window_extent(renderer)) for text in axes.texts]
    for line in axes.lines:
        reach = 6 if line.get_marker() not in ("None", None, "") else 3
        taken += [Box(x - reach, y - reach, x + reach, y + reach) for x, y in _along(line)]
    legend = axes.get_legend()
    if legend is not None:
        taken.append(_box(legend.get_window_extent(renderer)))
    return taken


def _box(extent: Bbox) -> Box:
    return Box(float(extent.x0), float(extent.y0), float(extent.x1), float(extent.y1))


def _along(line: Line2D) -> list[tuple[float, float]]:
    """Pixels on a line, near enough to each other that no text fits between them."""
    corners = [(float(x), float(y)) for x, y in line.get_transform().transform(line.get_xydata())]
    pixels = [corners[0]] if corners else []
    for (x0, y0), (x1, y1) in pairwise(corners):
        steps = max(1, int(math.hypot(x1 - x0, y1 - y0) / 6))
        pixels += [(x0 + (x1 - x0) * i / steps, y0 + (y1 - y0) * i / steps) for i in range(1, steps + 1)]
    return pixels


def bar_plot(
    series: Mapping[str, Mapping[str, float]], unit: str, path: Path, *, title: str = "", digest: str = ""
) -> tuple[Path, Path]:
    """Grouped bars, series -> group -> value, each with its number on top; returns the paths of the SVG and the PNG.

    A series that lacks a group leaves a gap there, so that nothing unmeasured looks like zero.
    """
    groups = list(dict.fromkeys(group for values in series.values() for group in values))
    drawing, axes = _canvas(max(6.0, 1.2 + 0.55 * len(groups) * (len(series) + 1)), 4.2)
    width = 0.8 / max(1, len(series))
    for index, (name, values) in enumerate(series.items()):
        places = [groups.index(group) + (index - (len(series) - 1) / 2) * width for group in values]
        bars = axes.bar(
            places,
            list(values.values()),
            width,
            label=name,
            color=COLOURS[index % len(COLOURS)],
            hatch=HATCHES[index % len(HATCHES)],
            edgecolor="black",
            linewidth=0.6,
        )
        axes.bar_label(bars, [short(value).rstrip() for value in values.values()], fontsize=8)
    axes.set_xticks(range(len(groups)), groups)
    axes.set(ylabel=unit, title=title)
    axes.margins(y=0.15)
    if len(series) > 1:
        axes.legend(fontsize=8)
    return save(drawing, path, digest)


def save(drawing: Drawing, path: Path, digest: str = "") -> tuple[Path, Path]:
    """Write a drawing beside itself as .svg and .png, without a date and with the digest of its data inside."""
    import matplotlib

    path.parent.mkdir(parents=True, exist_ok=True)
    svg, png = path.with_suffix(".svg"), path.with_suffix(".png")
    with matplotlib.rc_context({"svg.hashsalt": "titaninfer"}):
        drawing.savefig(svg, metadata={"Date": None, "Description": f"data {digest}"})
    drawing.savefig(png, dpi=120, metadata={"Software": None, "Description": f"data {digest}"})
    return svg, png


def shows(path: Path, digest: str) -> bool:
    """Whether the SVG at `path` exists and was drawn from data with this digest."""
    svg = path.with_suffix(".svg")
    return svg.exists() and f"data {digest}" in svg.read_text(encoding="utf-8", errors="replace")


def short(value: float) -> str:
    """1.23e12 -> "1.23 T": three digits and a prefix, ready for a unit."""
    for size, prefix in WITH_UNITS:
        if abs(value) >= size:
            return f"{value / size:.3g} {prefix}"
    return f"{value:.3g} "


def _canvas(width: float, height: float) -> tuple[Any, Any]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    drawing = Figure(figsize=(width, height), layout="tight")
    FigureCanvasAgg(drawing)
    return drawing, drawing.add_subplot()
