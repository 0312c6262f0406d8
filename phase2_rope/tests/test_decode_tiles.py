"""The two decode loops: right in Triton's interpreter, and what their tiles compile to.

Triton decides at its import whether it interprets, and the interpreter is silently wrong for bfloat16: so float32 and
float16 run in one process of their own, and bfloat16 is compiled.
"""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import pytest

from module0_profiling.static_report import KernelReport
from phase0_prototype.tests.interpreter import interpreted

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed (it is Linux only)"
)
compiles = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter compiles nothing")

INTERPRETED = """
import json
import torch
from phase2_rope.kernels import decode_tiles
torch.set_num_threads(1)
torch.manual_seed(0)
found = {}

def attend(q, keys, values, scale):  # [H, N], [S, H, N], [S, H, M] of one sequence
    q, keys, values = q.double(), keys.double(), values.double()
    weights = torch.softmax(torch.einsum("hn,shn->hs", q, keys) * scale, dim=1)
    return torch.einsum("hs,shm->hm", weights, values)

def error(got, exact):
    exact = torch.stack(exact)
    return ((got.double() - exact).abs().max() / exact.abs().max()).nan_to_num(nan=float("inf")).item()

lengths = torch.tensor([1, 33, 64, 70], dtype=torch.int32)  # one key, a ragged tile, whole tiles, a ragged last one
for dtype in (torch.float32, torch.float16):
    for hq, hkv in ((2, 2), (8, 2), (16, 1)):
        q, keys, values = (torch.randn(4, *shape, 32).to(dtype) for shape in ((hq,), (75, hkv), (75, hkv)))
        exact = []
        for i, n in enumerate(lengths.tolist()):
            repeated = (x[i, :n].repeat_interleave(hq // hkv, dim=1) for x in (keys, values))
            exact.append(attend(q[i], *repeated, 32**-0.5))
            keys[i, n:] = values[i, n:] = float("nan")  # what no token wrote is not read
        found[f"gqa {dtype} {hq} {hkv}"] = error(decode_tiles.gqa(q, keys, values, lengths, block_n=32), exact)
    for heads in (16, 24, 5):
        q, cache = torch.randn(4, heads, 80).to(dtype), torch.randn(4, 75, 80).to(dtype)
        exact = []
        for i, n in enumerate(lengths.tolist()):
            rows = cache[i, :n, None].expand(-1, heads, -1)
            exact.append(attend(q[i], rows, rows[..., :64], 0.2))
            cache[i, n:] = float("nan")
        for once, padded in ((True, False), (False, False), (True, True)):
            variant = {"once": once, "padded": padded, "block_h": 16, "block_n": 32}
            found[f"mla {dtype} {heads} {once} {padded}"] = error(
                decode_tiles.mla(q, cache, lengths, 0.2, rope=16, **variant), exact
            )
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def errors() -> dict[str, float]:
    return interpreted(INTERPRETED)


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, KernelReport]:
    """By name: the two tiles of the course, the latent one loaded twice, and the smallest without and with stages."""
    from module0_profiling.static_report import report_triton
    from phase2_rope.kernels.decode_tiles import GQA_TILE, MLA_TILE, Tile

    tiles = {
        "gqa": GQA_TILE,
        "mla": MLA_TILE,
        "twice": Tile("MLA", 64, 32, 8, 2, once=False),
        "16x32, 1 stage": Tile("MLA", 16, 32, 4, 1),
        "16x32, 2 stages": Tile("MLA", 16, 32, 4, 2),
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
        return {name: report_triton([tile.build()], ("sm_90",))[0] for name, tile in tiles.items()}


def test_both_loops_agree_with_float64_and_read_no_key_behind_the_last(errors: dict[str, float]) -> None:
    assert len(errors) == 2 * (3 + 3 * 3)
    for name, error in errors.items():
        assert error < (1e-3 if "float16" in name else 1e-6), name


@compiles
@pytest.mark.parametrize("name", ["gqa", "mla"])
def test_the_chosen_tiles_fit_hopper_without_spills_and_copy_in_the_background(
    reports: dict[str, KernelReport], name: str
) -> None:
    report = reports[name]
    assert report.spill_bytes == 0
    assert report.occupancy.blocks >= 1
    assert report.mix.async_copies > 0


@compiles
def test_only_the_tile_of_64_heads_is_tall_enough_for_wgmma(reports: dict[str, KernelReport]) -> None:
    assert reports["gqa"].mix.mma > 0 == reports["gqa"].mix.wgmma
    assert reports["mla"].mix.wgmma > 0 == reports["mla"].mix.mma


@compiles
def test_shared_memory_of_the_latent_tile_is_its_queries_and_its_stages(reports: dict[str, KernelReport]) -> None:
    queries, stage, again = 64 * 576 * 2, 32 * 576 * 2, 32 * 512 * 2
    assert queries + 2 * stage <= reports["mla"].shared_bytes < queries + 3 * stage
    assert reports["twice"].shared_bytes - reports["mla"].shared_bytes == 2 * again


@compiles
def test_without_stages_a_tile_for_mma_lies_in_shared_memory_in_two_layouts(reports: dict[str, KernelReport]) -> None:
    """Fewer stages, more memory: one copy transposed as K, one as it is as V."""
    assert reports["16x32, 1 stage"].shared_bytes > 2 * 32 * 512 * 2 > reports["16x32, 2 stages"].shared_bytes


@compiles
def test_the_case_has_the_kinds_of_tiles_by_arithmetic_and_both_builds(tmp_path: Path) -> None:
    from rich.console import Console

    from module0_profiling.bench import Options
    from phase2_rope.decode_tile_cases import tiles

    found = {f.name: f.value for f in tiles(Options("cpu", 1, tmp_path, Console(quiet=True), dry=True))}
    assert found["MLA, 64 rows/sums in the register file"] == 50
    assert found["MLA, 64 rows/FLOPs a byte"] == pytest.approx(64 * 1088 / 576)
    assert found["MLA, 64 rows/keys that fit, sm_120"] == (99 * 1024 - 64 * 1152) // 1152
    assert found["GQA, 16 rows/FLOPs a byte"] == 8
    assert found["MLA 64x32, 8 warps, 2 stages, sm_90/blocks on an SM"] == 1


@compiles
def test_a_build_that_became_a_trap_is_no_kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The sums of 128 heads fill the tensor memory of sm_100, the scores find no room, and Triton raises nothing."""
    from module0_profiling.gpu_tools import CompileError
    from module0_profiling.triton_compile import compile_triton
    from phase2_rope.kernels.decode_tiles import Tile

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    tallest = Tile("MLA", 128, 16, 8, 2).build()
    with pytest.raises(CompileError, match=r"sm_100.*became a trap"):
        compile_triton(tallest, "sm_100")
    assert compile_triton(tallest, "sm_90")[1] > 0
