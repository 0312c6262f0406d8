"""Rooflines: no label covers a label, a line or a mark, wherever the points lie."""

from __future__ import annotations

import random
from itertools import combinations
from pathlib import Path

import pytest
from matplotlib.text import Text

from module0_profiling import lesson_plots
from module0_profiling.costs import linear
from module0_profiling.label_places import Box, Label, place
from module0_profiling.plots import COLOURS, roofline_drawing, roofline_plot
from module0_profiling.roofline import Point, Roof

A100 = Roof(312e12, 2.0e12, "bfloat16")
FP32 = Roof(19.5e12, 2.0e12, "float32")
LEVELS = (("L2", 5.1e12), ("shared memory", 19.5e12))


def points_on_the_roof(count: int) -> list[Point]:
    works = [linear(2**i, 4096, 4096) for i in range(count)]
    return [Point(f"linear, {2**i} rows", w.intensity, A100.attainable(w)) for i, w in enumerate(works)]


def points_at_random(seed: int) -> list[Point]:
    generator = random.Random(seed)
    intensity = 10 ** generator.uniform(-1, 3)
    wide = generator.choice((0.05, 1.0))  # all in one place, or all over the plot

    def near(value: float) -> float:
        return value * 10 ** generator.uniform(-wide, wide)

    names = [f"{'kernel with a name ' * generator.randint(1, 2)}{i}" for i in range(generator.randint(1, 12))]
    return [Point(name, near(intensity), near(1e12)) for name in names]


SETS = {
    "the lowest point on the roof": [Point("decode", 1.0, 2.0e12)],
    "all on the roof": points_on_the_roof(12),
    "all in one place": [Point(f"kernel {i}", 10.0, 1e12) for i in range(12)],
    "none": [],
    **{f"at random {seed}": points_at_random(seed) for seed in range(6)},
}


@pytest.mark.parametrize("points", SETS.values(), ids=SETS.keys())
def test_no_two_labels_touch_and_none_leaves_the_frame_or_covers_a_mark(points: list[Point]) -> None:
    drawing, boxes = roofline_drawing(points, [A100, FP32], title="test", levels=LEVELS)
    drawing.canvas.draw()
    axes = drawing.axes[0]
    assert len(boxes) == len(points) + 3  # two levels and the DRAM
    texts = [Text.get_window_extent(text) for text in axes.texts]  # where they really stand
    assert [text.get_text() for text in axes.texts][:3] == ["DRAM 2 TB/s", "L2 5.1 TB/s", "shared memory 19.5 TB/s"]
    frame, legend = axes.get_window_extent(), axes.get_legend().get_window_extent()
    marks = [axes.transData.transform((p.intensity, p.performance)) for p in points]
    for text in texts:
        assert frame.x0 <= text.x0 and text.x1 <= frame.x1 and frame.y0 <= text.y0 and text.y1 <= frame.y1
        assert not text.overlaps(legend)
        assert not any(text.x0 <= x <= text.x1 and text.y0 <= y <= text.y1 for x, y in marks)
        for line in axes.lines:
            (x0, y0), (x1, y1) = axes.transData.transform(line.get_xydata()[[0, -1]])
            for t in range(201):
                x, y = x0 + (x1 - x0) * t / 200, y0 + (y1 - y0) * t / 200
                assert not (text.x0 < x < text.x1 and text.y0 < y < text.y1), line.get_label()
    for one, other in combinations(texts, 2):
        assert not one.overlaps(other)


def test_labels_that_do_not_fit_are_counted_below_the_axis() -> None:
    points = [Point("a kernel with a name that nobody should ever give to any kernel " * 2, 10.0, 1e12)] * 160
    drawing, boxes = roofline_drawing(points, [A100])
    assert f"no room for {161 - len(boxes)} labels, of a kernel" in drawing.axes[0].get_xlabel()
    assert len(boxes) > 20 and not any(one.overlaps(other) for one, other in combinations(boxes, 2))


def test_places_are_clear_of_what_is_taken_and_the_same_every_time() -> None:
    frame, taken = Box(0, 0, 300, 200), [Box(90, 90, 110, 110)]
    labels = [Label(80, 12, [(100, 100)]) for _ in range(10)]
    boxes = place(labels, taken, frame)
    assert boxes == place(labels, taken, frame)
    found = [box for box in boxes if box is not None]
    assert len(found) == 10 and all(frame.holds(box) for box in found)
    assert not any(one.overlaps(other) for one, other in combinations([*found, *taken], 2))


def test_a_label_without_room_gets_none() -> None:
    assert place([Label(80, 12, [(10, 10)])], [], Box(0, 0, 60, 60)) == [None]
    assert place([Label(20, 20, [(25, 25)])] * 2, [], Box(0, 0, 45, 30))[1] is None


def test_levels_are_further_slopes_and_their_numbers_are_checked(tmp_path: Path) -> None:
    one, _ = roofline_drawing([], [A100])
    three, _ = roofline_drawing([], [A100], levels=LEVELS)
    assert len(three.axes[0].lines) == len(one.axes[0].lines) + 2
    with pytest.raises(ValueError, match="memory level 'L2' at 0 bytes/s"):
        roofline_plot([], [A100], tmp_path / "a", levels=(("L2", 0),))
    with pytest.raises(ValueError, match="at least one roof"):
        roofline_plot([], [], tmp_path / "a")


def test_each_dtype_has_its_ridge_in_a_colour_of_okabe_and_ito() -> None:
    drawing, _ = roofline_drawing([], [A100, FP32])
    ridges = [line for line in drawing.axes[0].lines if line.get_marker() == "|"]
    assert [float(line.get_xdata()[0]) for line in ridges] == [156, 9.75]
    assert [line.get_color() for line in ridges] == list(COLOURS[:2])
    labels = [text.get_text() for text in drawing.axes[0].get_legend().get_texts()]
    assert labels[0] == "bfloat16: 312 TFLOP/s, ridge at 156 FLOP/byte"


@pytest.mark.parametrize("sheet", [lesson_plots.RTX_4090, lesson_plots.H200], ids=lambda s: s.name)
def test_the_lessons_rooflines_are_drawn_alike_every_time(tmp_path: Path, sheet: lesson_plots.Datasheet) -> None:
    svg, png = lesson_plots.draw(sheet, tmp_path / "a")
    again, again_png = lesson_plots.draw(sheet, tmp_path / "b")
    assert svg.read_bytes() == again.read_bytes() and png.read_bytes() == again_png.read_bytes()
    assert "nothing measured" in svg.read_text() or "datasheet" in svg.read_text()


def test_the_lessons_operations_lie_where_the_lesson_says() -> None:
    works = lesson_plots.operations()
    roofs = {roof.name: roof for roof in lesson_plots.RTX_4090.roofs}
    bound = {name: roofs["bfloat16"].bound_by(work) for name, work in works.items()}
    assert bound["linear, 1 row"] == bound["linear, 32 rows"] == bound["attention decode, 4k"] == "memory"
    assert bound["linear, 2048 rows"] == bound["attention prefill, 4k"] == "compute"
    assert works["attention decode, 4k"].intensity == pytest.approx(8, rel=0.01)  # 8 queries share each key
    assert roofs["bfloat16"].ridge == pytest.approx(164, abs=1)
