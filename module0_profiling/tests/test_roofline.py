"""The roofline against numbers worked out by hand and models whose size is public."""

from __future__ import annotations

import math

import pytest

from module0_profiling.hardware import Peaks
from module0_profiling.roofline import (
    Dims,
    Point,
    Roof,
    Work,
    attention_decode,
    attention_prefill,
    decode_step,
    from_figures,
    linear,
    norm,
    plot,
    prefill_step,
    silu_mul,
    step_seconds,
    to_figures,
    total,
)

A100 = Roof(flops=312e12, bandwidth=2.0e12)
TINYLLAMA = Dims(hidden=2048, intermediate=5632, layers=22, heads=32, kv_heads=4, head_dim=64, vocab=32000)


def test_ridge_and_attainable_of_an_a100():
    assert A100.ridge == 156  # 312e12 / 2e12
    assert A100.attainable(Work(flops=1.0, bytes=1.0)) == 2.0e12  # on the slope
    assert A100.attainable(Work(flops=1000.0, bytes=1.0)) == 312e12  # on the flat


def test_time_floor_is_the_slower_of_the_two():
    assert A100.seconds(Work(flops=312e12, bytes=1e12)) == 1.0
    assert A100.seconds(Work(flops=1.0, bytes=4e12)) == 2.0
    assert A100.bound_by(Work(155, 1)) == "memory"
    assert A100.bound_by(Work(157, 1)) == "compute"


def test_batch_1_linear_does_one_flop_a_byte():
    work = linear(1, 4096, 4096)  # 2 * 16.8M FLOPs over 33.6 MB of bf16 weights
    assert work.flops == 33_554_432
    assert work.bytes == 33_554_432 + 2 * 8192
    assert work.intensity == pytest.approx(1.0, abs=1e-3)


def test_matmul_1024_in_float32_has_intensity_171():
    work = linear(1024, 1024, 1024, dtype_bytes=4)
    assert work == Work(2 * 2**30, 3 * 4 * 2**20)
    assert work.intensity == pytest.approx(170.67, abs=0.01)  # n / 6


def test_int4_weights_shrink_only_the_weights():
    assert linear(1, 4096, 4096, weight_bytes=0.5).bytes == 4096 * 4096 / 2 + 2 * 8192


def test_intensity_without_traffic_is_infinite():
    assert Work(1, 0).intensity == math.inf


def test_decode_attention_reads_each_key_and_value_once():
    work = attention_decode(batch=64, context=8192, heads=32, kv_heads=8, head_dim=128)
    cache = 64 * 8192 * 2 * 8 * 128 * 2  # 2.15 GB, as in "64 x 8k KV" of a Llama-3-8B layer
    assert cache == 2_147_483_648
    assert work.bytes == cache + 64 * 2 * 32 * 128 * 2  # and the queries and outputs
    assert work.flops == 4 * 64 * 8192 * 32 * 128


def test_causal_prefill_counts_pairs_as_a_loop_would():
    tokens, prefix = 7, 5
    pairs = sum(1 for i in range(tokens) for j in range(prefix + tokens) if j <= prefix + i)
    work = attention_prefill(2, tokens, heads=4, kv_heads=2, head_dim=8, dtype_bytes=4, prefix=prefix)
    assert work.flops == 2 * pairs * 4 * 8 * 4  # sequences x pairs x heads x D x 4
    assert work.bytes == 2 * 4 * (2 * tokens * 4 * 8 + 2 * (prefix + tokens) * 2 * 8)


def test_elementwise_operations_move_what_they_must():
    assert norm(10, 64, 2).bytes == 2 * (2 * 10 * 64 + 64)
    assert norm(10, 64, 2, residual=True).bytes == 2 * (4 * 10 * 64 + 64)
    assert silu_mul(10, 64, 2).bytes == 3 * 10 * 64 * 2


def test_decode_step_reads_the_weights_of_a_1_1b_model_once():
    works = dict(decode_step(TINYLLAMA, batch=1, context=1))
    weights = sum(works[name].bytes for name in ("qkv", "o_proj", "gate_up", "down", "lm_head"))
    parameters = 1_100_048_384  # TinyLlama's published count
    without = 32000 * 2048 + 45 * 2048  # the embedding is a gather; norms are counted apart
    assert weights == pytest.approx(2 * (parameters - without), rel=2e-3)  # and small activations
    assert total(works.items()).flops == pytest.approx(2 * (parameters - without), rel=2e-3)


def test_decode_floor_at_31_gb_a_second_is_14_tokens_a_second():
    floor = step_seconds(decode_step(TINYLLAMA, batch=1, context=128), Roof(flops=2.5e12, bandwidth=31e9))
    assert 1 / floor == pytest.approx(15, abs=1)


def test_cache_traffic_grows_with_batch_and_context_and_weights_do_not():
    small, large = dict(decode_step(TINYLLAMA, 1, 1000)), dict(decode_step(TINYLLAMA, 8, 2000))
    assert large["attention"].bytes == pytest.approx(16 * small["attention"].bytes, rel=0.01)
    assert large["gate_up"].bytes == pytest.approx(small["gate_up"].bytes, rel=0.01)


def test_prefill_of_one_token_is_a_decode_at_context_one():
    assert prefill_step(TINYLLAMA, 3, 1) == decode_step(TINYLLAMA, 3, 1)


def test_prefill_computes_logits_for_the_last_token_of_each_prompt_only():
    prefill, decode = dict(prefill_step(TINYLLAMA, 2, 100)), dict(decode_step(TINYLLAMA, 2, 100))
    assert prefill["lm_head"] == decode["lm_head"]
    assert prefill["down"].flops == 100 * decode["down"].flops


def test_prefill_is_compute_bound_where_decode_is_memory_bound():
    assert A100.bound_by(total(decode_step(TINYLLAMA, 1, 512))) == "memory"
    assert A100.bound_by(total(prefill_step(TINYLLAMA, 1, 1024))) == "compute"


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
