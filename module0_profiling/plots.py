"""Drawings for reports: rooflines and bars, as SVG and PNG.

Colours are Okabe and Ito's, which stay apart for colour-blind readers, and every series also differs by marker or
hatch. Figures are made without pyplot, so nothing global is opened or left behind, and without dates, so that the same
data gives the same file. A digest of the data is kept inside the file: `make report` uses it to see a stale plot.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from module0_profiling.roofline import Point, Roof

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Drawing
    from matplotlib.lines import Line2D
    from matplotlib.transforms import Bbox

COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#000000")
MARKERS = "osD^vP*X"
HATCHES = ("", "//", "..", "xx", "\\\\", "++", "oo", "--")
WITH_UNITS = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def digest_of(data: object) -> str:
    """A short digest of plain data, to tell whether a drawing shows it."""
    return hashlib.sha256(repr(data).encode()).hexdigest()[:16]


def roofline_plot(
    points: Sequence[Point], roofs: Sequence[Roof], path: Path, *, title: str = "", digest: str = ""
) -> tuple[Path, Path]:
    """Draw roofs with their ridges and measured points on log-log axes; returns the paths of the SVG and the PNG.

    Raises:
        ValueError: without a roof, or for a point that is not positive (it has no place on a log axis).
    """
    if not roofs:
        raise ValueError("a roofline needs at least one roof: measure the peaks first (titan peaks)")
    for point in points:
        if not (0 < point.intensity < math.inf and 0 < point.performance < math.inf):
            raise ValueError(f"point {point.label!r} at {point.intensity}, {point.performance}: both must be positive")
    drawing, axes = _canvas(8.0, 5.2)
    xs = [roof.ridge for roof in roofs] + [point.intensity for point in points]
    left, right = min(xs) / 8, max(xs) * 8
    axes.set(xscale="log", yscale="log", xlim=(left, right))
    for bandwidth in dict.fromkeys(roof.bandwidth for roof in roofs):
        _draw_slope(axes, bandwidth, left, max(roof.ridge for roof in roofs if roof.bandwidth == bandwidth))
    for index, roof in enumerate(roofs):
        _draw_ceiling(axes, roof, right, COLOURS[index % len(COLOURS)])
    for index, point in enumerate(points):
        colour, marker = COLOURS[(index + len(roofs)) % len(COLOURS)], MARKERS[index % len(MARKERS)]
        axes.plot(
            point.intensity, point.performance, marker, color=colour, markersize=8, markeredgecolor="black", zorder=5
        )
    ys = [roof.flops for roof in roofs] + [point.performance for point in points]
    axes.set_ylim(min(ys) / 8, max(ys) * 3)
    axes.set(xlabel="arithmetic intensity, FLOP/byte", ylabel="performance, FLOP/s", title=title)
    axes.grid(True, which="major", alpha=0.3)
    axes.legend(loc="lower right", fontsize=8)
    label_points(axes, [(point.label, point.intensity, point.performance) for point in points])
    return save(drawing, path, digest)


def _draw_slope(axes: Axes, bandwidth: float, left: float, ridge: float) -> None:
    """One line for a bandwidth, however many dtypes share it, up to the ridge of the fastest."""
    axes.plot([left, ridge], [left * bandwidth, ridge * bandwidth], color="black", linewidth=2)
    axes.annotate(
        f"{short(bandwidth)}B/s",
        (left * 1.3, left * 1.3 * bandwidth),
        xytext=(12, -6),
        textcoords="offset points",
        verticalalignment="top",
        fontsize=8,
    )


def _draw_ceiling(axes: Axes, roof: Roof, right: float, colour: str) -> None:
    label = f"{roof.name or 'roof'}: {short(roof.flops)}FLOP/s, ridge at {roof.ridge:.3g} FLOP/byte"
    axes.plot([roof.ridge, right], [roof.flops, roof.flops], color=colour, linewidth=2, label=label)
    axes.plot(roof.ridge, roof.flops, "|", color=colour, markersize=14, markeredgewidth=2)


def label_points(axes: Axes, labelled: Sequence[tuple[str, float, float]]) -> list[Bbox]:
    """Write a label near each (x, y) so that no two texts overlap and no point is hidden; returns the texts' boxes.

    Tries places on growing circles around the point and takes the first free one; a thin line leads to the point.
    """
    from matplotlib.transforms import Bbox

    figure = axes.get_figure()
    assert figure is not None
    figure.canvas.draw()
    renderer = figure.canvas.get_renderer()  # type: ignore[attr-defined]
    pixels = [tuple(map(float, axes.transData.transform((x, y)))) for _, x, y in labelled]
    taken = [text.get_window_extent(renderer) for text in axes.texts]
    taken += [Bbox.from_bounds(x - 6, y - 6, 12, 12) for x, y in pixels]
    taken += [Bbox.from_bounds(x - 3, y - 3, 6, 6) for line in axes.lines for x, y in _along(line)]
    legend = axes.get_legend()
    if legend is not None:
        taken.append(legend.get_window_extent(renderer))
    frame, placed = axes.get_window_extent(), []
    for (label, x, y), pixel in zip(labelled, pixels, strict=True):
        measured = axes.text(x, y, label, fontsize=8)
        width, height = measured.get_window_extent(renderer).size
        measured.remove()
        box = _free_place(pixel, width, height, taken, frame)
        scale = 72 / figure.dpi
        axes.annotate(
            label,
            (x, y),
            xytext=((box.x0 - pixel[0]) * scale, (box.y0 - pixel[1]) * scale),
            textcoords="offset points",
            verticalalignment="bottom",
            fontsize=8,
            zorder=6,
            arrowprops={"arrowstyle": "-", "linewidth": 0.6, "color": "grey", "shrinkA": 0, "shrinkB": 4},
        )
        taken.append(box)
        placed.append(box)
    return placed


def _along(line: Line2D) -> list[tuple[float, float]]:
    """Pixels on a line, near enough to each other that no text fits between them."""
    corners = [tuple(map(float, corner)) for corner in line.get_transform().transform(line.get_xydata())]
    pixels = []
    for (x0, y0), (x1, y1) in pairwise(corners):
        steps = max(1, int(math.hypot(x1 - x0, y1 - y0) / 8))
        pixels += [(x0 + (x1 - x0) * i / steps, y0 + (y1 - y0) * i / steps) for i in range(steps + 1)]
    return pixels


def _free_place(pixel: Sequence[float], width: float, height: float, taken: Sequence[Bbox], frame: Bbox) -> Bbox:
    """The nearest box of this size around a pixel that is in the frame and touches nothing; the last tried if none."""
    from matplotlib.transforms import Bbox

    for gap in range(8, 300, 8):
        for angle in range(45, 405, 30):
            x = pixel[0] + math.cos(math.radians(angle)) * (gap + width / 2) - width / 2
            y = pixel[1] + math.sin(math.radians(angle)) * (gap + height / 2) - height / 2
            box = Bbox.from_bounds(x, y, width, height)
            inside = frame.x0 <= x and x + width <= frame.x1 and frame.y0 <= y and y + height <= frame.y1
            if inside and not any(box.overlaps(other) for other in taken):
                return box
    return box


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
