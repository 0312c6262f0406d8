"""The CUDA ladders of phase 0, run on the CPU: right at every size, and moving exactly what the lesson says.

The oracle is numpy in float64. The counts come from the addresses that the kernels touch, not from a formula.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from module0_profiling.gpu_tools import MissingTool, find_host_compiler
from phase0_prototype.kernels import coalescing, counts, ladder, matmul, occupancy

FRAMEWORK = Path(counts.__file__).parent.parent / "framework" / "kernels"
TRANSPOSES = [v.name for v in ladder.read(coalescing.SOURCE)]
PRODUCTS = [(s, v.name) for s in (matmul.SOURCE, occupancy.SOURCE) for v in ladder.read(s)]


def _compiler_reason() -> str:
    try:
        find_host_compiler()
    except MissingTool as error:
        return str(error)
    return ""


pytestmark = pytest.mark.skipif(bool(_compiler_reason()), reason=_compiler_reason() or "a compiler is here")


def _matrix(rows: int, cols: int) -> np.ndarray:
    return np.random.default_rng(rows + 31 * cols).standard_normal((rows, cols), dtype=np.float32)


@pytest.mark.parametrize("name", TRANSPOSES)
@pytest.mark.parametrize("shape", [(64, 32), (33, 70), (44, 30), (1, 5)])
def test_every_transpose_is_exact_at_any_size(name: str, shape: tuple[int, int]) -> None:
    matrix = _matrix(*shape)
    run = counts.emulate_transpose(coalescing.SOURCE, name, matrix)
    np.testing.assert_array_equal(run.result, matrix.T)
    assert (run.traffic.out_of_bounds, run.traffic.misaligned) == (0, 0)


@pytest.mark.parametrize(("source", "name"), PRODUCTS, ids=[name for _, name in PRODUCTS])
@pytest.mark.parametrize("size", [(128, 128, 16), (37, 70, 21), (2, 129, 9)])
def test_every_product_agrees_with_float64_at_any_size(source: Path, name: str, size: tuple[int, int, int]) -> None:
    m, n, k = size
    a, b = _matrix(m, k), _matrix(k, n)
    run = counts.emulate_matmul(source, name, a, b)
    np.testing.assert_allclose(run.result, a.astype(np.float64) @ b.astype(np.float64), atol=2e-5)
    assert (run.traffic.out_of_bounds, run.traffic.misaligned) == (0, 0)


@pytest.mark.parametrize("name", TRANSPOSES)
def test_transpose_moves_the_sectors_that_were_predicted(name: str) -> None:
    traffic = counts.emulate_transpose(coalescing.SOURCE, name, _matrix(64, 96)).traffic
    measured = (traffic.global_loads.transactions, traffic.global_stores.transactions)
    assert measured == coalescing.predicted_sectors(name, 64, 96)


def test_padding_the_tile_removes_every_bank_conflict() -> None:
    # A column of a 32-wide tile lies in one bank: its reads take 32 passes, its writes one, so 31/2 extra on average.
    assert counts.bank_conflicts(coalescing.SOURCE, "transpose_tiled") == 31 / 2
    assert counts.bank_conflicts(coalescing.SOURCE, "transpose_padded") == 0
    assert counts.bank_conflicts(coalescing.SOURCE, "transpose_fast") == 0


def test_vectors_need_a_quarter_of_the_memory_instructions() -> None:
    scalar = counts.transpose_requests(coalescing.SOURCE, "transpose_padded")
    assert counts.transpose_requests(coalescing.SOURCE, "transpose_fast") == scalar / 4


@pytest.mark.parametrize("version", ladder.read(matmul.SOURCE), ids=lambda v: v.name)
@pytest.mark.parametrize("size", [(128, 128, 32), (37, 70, 21)])
def test_matmul_loads_what_was_predicted(version: ladder.Version, size: tuple[int, int, int]) -> None:
    m, n, k = size
    traffic = counts.emulate_matmul(matmul.SOURCE, version.name, _matrix(m, k), _matrix(k, n)).traffic
    assert traffic.global_loads.bytes == 4 * matmul.predicted_loads(version, m, n, k)
    assert traffic.global_stores.bytes == 4 * m * n


def test_tiling_divides_the_global_loads_by_ten_and_more() -> None:
    assert counts.global_load_reduction(matmul.SOURCE, "matmul_naive") == 1
    assert counts.global_load_reduction(matmul.SOURCE, "matmul_tiled") == 32
    assert counts.global_load_reduction(matmul.SOURCE, "matmul_fast") == 128


def test_coalescing_saves_sectors_and_not_loads() -> None:
    a, b = _matrix(64, 32), _matrix(32, 64)
    naive = counts.emulate_matmul(matmul.SOURCE, "matmul_naive", a, b).traffic.global_loads
    coalesced = counts.emulate_matmul(matmul.SOURCE, "matmul_coalesced", a, b).traffic.global_loads
    assert naive.accesses == coalesced.accesses
    assert naive.transactions > 6 * coalesced.transactions


def test_only_the_last_matmul_reads_vectors_without_bank_conflicts() -> None:
    a, b = _matrix(128, 16), _matrix(16, 128)
    conflicts = {
        name: counts.emulate_matmul(matmul.SOURCE, name, a, b).traffic.bank_conflicts
        for name in ("matmul_registers_2d", "matmul_vectorised", "matmul_fast")
    }
    assert conflicts["matmul_fast"] == 0
    assert conflicts["matmul_vectorised"] > 0 and conflicts["matmul_registers_2d"] > 0


def test_sums_in_registers_make_each_read_of_shared_memory_count() -> None:
    reuse = {n: counts.multiply_adds_per_shared_read(occupancy.SOURCE, n) for s, n in PRODUCTS if s == occupancy.SOURCE}
    assert reuse["occupancy_tile16"] == 0.5
    assert reuse["occupancy_fast"] == 2
    assert reuse["occupancy_tile128"] == 4


def test_the_framework_is_right_and_fails_the_counts() -> None:
    assert counts.transpose_error(FRAMEWORK / "coalescing.cu") == 0
    assert counts.sector_overhead(FRAMEWORK / "coalescing.cu") == 4.5
    assert counts.matmul_error(FRAMEWORK / "matmul.cu") < 1e-4
    assert counts.global_load_reduction(FRAMEWORK / "matmul.cu") == 1
    assert counts.matmul_error(FRAMEWORK / "occupancy.cu", "occupancy_fast") < 1e-4
    assert counts.multiply_adds_per_shared_read(FRAMEWORK / "occupancy.cu") == 0.5


@pytest.mark.parametrize(
    ("file", "old", "new"),
    [
        ("coalescing.cu", "r0 + y < rows && c0 + x < cols", "r0 + y < rows"),
        ("matmul.cu", "    __syncthreads();  // one barrier", "    //"),
        ("matmul.cu", "row < rows && col < cols ? matrix[row * cols + col] : 0.0f", "matrix[row * cols + col]"),
        ("matmul.cu", "        __syncthreads();  // nobody overwrites a tile that someone still reads\n", ""),
        ("occupancy.cu", "row0 + a_row < m && ", ""),
    ],
    ids=[
        "edge of the transpose",
        "barrier before reading",
        "edge of the matrices",
        "barrier before writing",
        "edge row",
    ],
)
def test_a_planted_bug_is_caught(tmp_path: Path, file: str, old: str, new: str) -> None:
    text = (coalescing.SOURCE.parent / file).read_text()
    assert old in text
    broken = tmp_path / file
    broken.write_text(text.replace(old, new))
    if file == "coalescing.cu":
        assert counts.transpose_error(broken, "transpose_padded") > 0
    elif file == "occupancy.cu":
        assert not counts.matmul_error(broken, "occupancy_fast") < 1e-4
    else:
        names = ("matmul_tiled", "matmul_fast")
        assert any(not counts.matmul_error(broken, name) < 1e-4 for name in names)


def test_an_unknown_version_is_one_line_that_lists_the_known() -> None:
    with pytest.raises(ValueError, match="has no kernel 'transpose_best': it has transpose_naive, "):
        ladder.find(coalescing.SOURCE, "transpose_best")
