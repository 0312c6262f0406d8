"""The roofline against numbers worked out by hand: work, ceilings, points and the plot."""

from __future__ import annotations

import math

import pytest

from module0_profiling.hardware import Peaks
from module0_profiling.roofline import Point, Roof, Work, from_figures, plot, to_figures

A100 = Roof(flops=312e12, bandwidth=2.0e12)


def test_ridge_and_attainable_of_an_a100():
    assert A100.ridge == 156  # 312e12 / 2e12
    assert A100.attainable(Work(flops=1.0, bytes=1.0)) == 2.0e12  # on the slope
    assert A100.attainable(Work(flops=1000.0, bytes=1.0)) == 312e12  # on the flat


def test_time_floor_is_the_slower_of_the_two():
    assert A100.seconds(Work(flops=312e12, bytes=1e12)) == 1.0
    assert A100.seconds(Work(flops=1.0, bytes=4e12)) == 2.0
    assert A100.bound_by(Work(155, 1)) == "memory"
    assert A100.bound_by(Work(157, 1)) == "compute"


def test_intensity_without_traffic_is_infinite():
    assert Work(1, 0).intensity == math.inf


def test_work_adds_up_and_repeats():
    assert Work(2, 3) + Work(5, 7) == Work(7, 10)
    assert Work(2, 3) * 4 == Work(8, 12)
    assert (Work(2, 3) * 4).intensity == Work(2, 3).intensity


def test_points_and_roofs_survive_the_way_through_a_result():
    peaks = Peaks(2e12, 1.8e12, {"bfloat16": 312e12, "float32": 19.5e12})
    points = [Point("decode w/ cache", 1.0, 1.5e12), Point.measured("gemm", Work(2e12, 1e10), seconds=0.01)]
    figures = to_figures(points, peaks)
    again, roofs = from_figures({figure.name: figure.value for figure in figures})
    assert again == points
    assert again[1] == Point("gemm", 200.0, 2e14)
    assert roofs == [peaks.roof("bfloat16"), peaks.roof("float32")]


def test_plot_writes_both_formats_and_the_same_data_gives_the_same_file(tmp_path):
    peaks = Peaks(2e12, 1.8e12, {"bfloat16": 312e12, "float32": 19.5e12})
    points = [Point(f"kernel {i}", 1.0 + i / 100, 1.5e12) for i in range(3)]
    svg, png = plot(points, peaks, tmp_path / "a")
    assert png.read_bytes().startswith(b"\x89PNG")
    assert "<svg" in svg.read_text()
    assert svg.read_text() == plot(points, peaks, tmp_path / "b")[0].read_text()


def test_labels_of_points_in_one_place_do_not_overlap():
    from matplotlib.text import Text

    from module0_profiling.plots import _canvas, label_points

    drawing, axes = _canvas(8.0, 5.2)
    axes.set(xscale="log", yscale="log", xlim=(1, 1000), ylim=(1e9, 1e13))
    boxes = label_points(axes, [(f"a kernel with a long name {i}", 30.0, 1e11) for i in range(8)])
    drawing.canvas.draw()
    frame = axes.get_window_extent()
    texts = [Text.get_window_extent(text) for text in axes.texts]  # where they really are, without the leader lines
    for i, box in enumerate(boxes):
        assert frame.x0 <= box.x0 and box.x1 <= frame.x1 and frame.y0 <= box.y0 and box.y1 <= frame.y1
        assert not any(box.overlaps(other) for other in boxes[:i])
        assert texts[i].x0 == pytest.approx(box.x0, abs=2) and texts[i].y0 == pytest.approx(box.y0, abs=2)


def test_a_point_at_zero_has_no_place_on_a_log_axis(tmp_path):
    with pytest.raises(ValueError, match="'idle'"):
        plot([Point("idle", 1.0, 0.0)], Peaks(1e9, 1e9, {"float32": 1e12}), tmp_path / "a")
