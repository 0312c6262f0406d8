"""What the RoPE ladder moves, counted on the CPU, against first principles; and what the compiler made of it."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from module0_profiling.course.needs import absent
from module0_profiling.course.parts import Use
from module0_profiling.gpu_tools import find_nvrtc
from module0_profiling.static_report import ALL_ARCHS, KernelReport, report_cuda
from phase0_prototype.kernels import ladder
from phase2_rope.kernels import counts, gates, rope
from phase2_rope.kernels.counts import Case

VERSIONS = tuple(version.name for version in ladder.read(rope.SOURCE))
FRAMEWORK = Path(rope.__file__).parent.parent / "framework" / "kernels" / "rope.cu"
CASES = (
    Case(),
    Case(interleaved=True),
    Case(dtype=torch.float32),
    Case(dtype=torch.float16, dim=64, rotated=64, tokens=7),
    Case(q_heads=3, k_heads=1, dtype=torch.float32, interleaved=True),
)
needs_compiler = pytest.mark.skipif(absent("compiler") is not None, reason=str(absent("compiler")))
needs_nvrtc = pytest.mark.skipif(
    find_nvrtc() is None and shutil.which("nvcc") is None, reason="no NVRTC and no nvcc: pip install nvidia-cuda-nvrtc"
)


@needs_compiler
@pytest.mark.parametrize("name", VERSIONS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_version_moves_the_bytes_that_were_predicted(name: str, case: Case) -> None:
    run = counts.emulate(rope.SOURCE, name, case, many_tokens=True)
    assert run.moved == counts.predicted_bytes(name, case)
    assert run.moved >= counts.minimum_bytes(name, case)


@needs_compiler
def test_cos_and_sin_cost_one_row_a_token_instead_of_one_a_head() -> None:
    row, case = 4 * 128, Case()
    data = case.tokens * 2 * case.heads * case.rotated * 2
    table = {
        name: (counts.emulate(rope.SOURCE, name, case, many_tokens=True).moved - data) / case.tokens / row
        for name in VERSIONS[:4]
    }
    assert table["rope_naive"] == pytest.approx(case.heads, abs=0.6)  # and 8 warps ask for the position
    assert table["rope_shared"] == table["rope_vector"] == pytest.approx(1, abs=0.6)
    assert table["rope_tokens"] == pytest.approx(2, abs=0.1)  # twice, by two accesses of one lane to one sector


@needs_compiler
def test_each_step_needs_fewer_instructions() -> None:
    needed = [counts.requests_per_token(rope.SOURCE, name, Case()) for name in VERSIONS[:4]]
    assert needed == [128, 92, 24, 17]


@needs_compiler
def test_one_launch_moves_k_once_and_two_launches_twice() -> None:
    case = Case(q_heads=8, k_heads=8)
    fused, turn, write = (
        counts.emulate(rope.SOURCE, name, case, many_tokens=True).moved
        for name in ("rope_fast", "rope_tokens", "kv_write")
    )
    k_again = case.tokens * 2 * case.k_heads * case.dim * 2
    assert turn + write - fused == k_again
    assert counts.LAUNCHES == {"rope_tokens, kv_write": 2, "rope_fast": 1}


@needs_compiler
def test_a_split_over_blocks_reads_cos_and_sin_once_for_each() -> None:
    case = replace(Case(), q_heads=16, k_heads=8)
    groups = rope.head_groups(case.tokens, case.heads, case.rotated, 2, vectors=True)
    split = counts.emulate(rope.SOURCE, "rope_tokens", case).moved
    whole = counts.emulate(rope.SOURCE, "rope_tokens", case, many_tokens=True).moved
    assert groups == 6  # a warp holds 4 heads at once
    assert split - whole == case.tokens * (groups - 1) * (2 * 4 * case.rotated + counts.SECTOR)


def test_few_tokens_are_dealt_out_to_more_blocks_and_many_are_not() -> None:
    groups = [rope.head_groups(tokens, 40, 128, 2, vectors=True) for tokens in (1, 64, 512, 4096, 65536)]
    assert groups == [10, 10, 8, 1, 1]


def test_few_heads_still_fill_a_block() -> None:
    few = gates.FEW_HEADS
    assert counts.threads_per_vector(rope.SOURCE, "rope_vector", few) == 256 / 12
    assert counts.threads_per_vector(rope.SOURCE, "rope_tokens", few) == 32 / 12


@needs_nvrtc
@pytest.mark.parametrize("macro", rope.SCALARS.values())
def test_no_version_spills_on_any_gpu_and_the_last_ones_use_128_bits_both_ways(macro: str) -> None:
    reports: dict[tuple[str, str], KernelReport] = {
        (r.kernel, r.arch): r for r in report_cuda(rope.SOURCE, ALL_ARCHS, defines=(macro,))
    }
    assert len(reports) == len(VERSIONS) * len(ALL_ARCHS) == 36
    for (name, arch), report in reports.items():
        assert report.spill_bytes == 0, f"{name} on {arch}"
        assert report.threads == ladder.find(rope.SOURCE, name).block[0]
        wide = name not in ("rope_naive", "rope_shared")
        assert (report.mix.vector_loads > 0) == wide and (report.mix.vector_stores > 0) == wide, f"{name} on {arch}"
        assert report.occupancy.fraction >= 0.4, f"{name} on {arch}"


@needs_compiler
@needs_nvrtc
def test_the_gates_tell_the_framework_from_the_last_steps() -> None:
    measures = (gates.rope_overhead, gates.rope_requests, gates.rope_threads, gates.write_overhead)
    ours, theirs = (
        [measure(Use.parse(f"phase2={which}")) for measure in measures] for which in ("solution", "framework")
    )
    assert ours == [pytest.approx(1.095, abs=1e-3), 17, pytest.approx(8 / 3), pytest.approx(1.087, abs=1e-3)]
    assert theirs == [pytest.approx(1.861, abs=1e-3), 128, pytest.approx(64 / 3), pytest.approx(1.993, abs=1e-3)]
    assert gates.write_requests(Use.parse("phase2=framework")) > 8 * gates.write_requests(Use.parse("phase2=solution"))
    assert gates.rope_spills(Use.parse("phase2=solution")) == 0


@needs_compiler
@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("rope_tokens", "if (t >= tokens) return;\n    const Token token = ROPE", "const Token token = ROPE"),
        ("rope_fast", "    if (block < 0) k.heads = v.heads = 0;\n", ""),
        ("rope_tokens", "lane / chunks >= rows || ", ""),
        ("rope_fast", "h * half / 2 + chunk * n", "h * half + chunk * n"),
        ("rope_shared", "    __syncthreads();\n", ""),
        ("rope_tokens", "copy_rest(token, 0, rotated, dim, vectors, b", "copy_rest(token, 0, dim, dim, vectors, b"),
    ],
    ids=["ragged tokens", "padding", "two lanes rest", "interleaved table", "barrier", "what is not turned"],
)  # fmt: skip
def test_a_planted_bug_is_caught(tmp_path: Path, name: str, old: str, new: str) -> None:
    text = rope.SOURCE.read_text()
    assert old in text
    broken = tmp_path / "rope.cu"
    broken.write_text(text.replace(old, new))
    assert counts.worst_error(broken, name) > 1
