"""The paged kernel: right in Triton's interpreter against float64, whatever it is given, and what it compiles to.

Triton decides at its import whether it interprets, and the interpreter is silently wrong for bfloat16: so float32 and
float16 run in one process of their own, and bfloat16 is compiled. Under `IMPL` the cases of every kernel run, with the
implementation's own planner; tiles and ways to merge that only the solution has, and what it compiles to, do not.
"""

from __future__ import annotations

import importlib.util
import os

import pytest
import torch

from module0_profiling.course.parts import Use
from phase0_prototype.tests.interpreter import interpreted

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed (it is Linux only)"
)
compiles = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter compiles nothing")

INTERPRETED = """
import json, random, sys
import torch
from module0_profiling.course import parts
from module0_profiling.course.parts import Use
from phase0_prototype.attention import AttentionSpec
from phase3_paged_attention.kernels import reference
from phase3_paged_attention.kernels.tiles import Tile
torch.set_num_threads(1)
use, solution = Use.parse(sys.argv[1]), sys.argv[2] == "yes"
paged, plan_work = (parts.resolve("phase3_paged_attention", name, use) for name in ("kernels.paged", "work"))
plan_work, CPU = plan_work.plan_work, torch.device("cpu")
torch.use_deterministic_algorithms(True)  # torch.empty is NaN: what nobody writes is noticed
torch.manual_seed(0)
rng = random.Random(0)
NAN = float("nan")
found = {}

def sequence_lengths(kind):
    new = {"decode": [1, 1, 1], "mixed": [1, 7, 11, 1], "prompt": [19], "tree": [6, 1, 9]}[kind]
    old = [0 if kind == "prompt" else rng.choice([0, 3, 15, 16, 40, 97]) for _ in new]
    return new, [a + b for a, b in zip(new, old)]

def cache(dtype, lens, page, hkv, dim, per_token):
    # blocks in any order, unused entries of the table are any block, unused slots are NaN
    needed = [-(-n // page) for n in lens]
    blocks = sum(needed) + 3
    order = torch.randperm(blocks)
    table = torch.randint(0, blocks, (len(lens), max(needed) + 2), dtype=torch.int32)
    used = torch.zeros(blocks * page, dtype=torch.bool)
    for b, n in enumerate(lens):
        table[b, : needed[b]], order = order[: needed[b]], order[needed[b] :]
        used[(table[b, : needed[b], None] * page + torch.arange(page)).flatten()[:n]] = True
    unused = ~used.view(blocks, page)
    sides = [torch.randn(blocks, page, hkv, dim).to(dtype) for _ in range(2)]
    raw = [x.view(torch.uint8) if x.itemsize == 1 else x for x in sides]
    for x in raw:
        x[unused] = 0x7F if x.dtype == torch.uint8 else NAN  # in both 8-bit formats, 0x7F is NaN
    scales = []
    if sides[0].itemsize == 1:
        shape = (2, blocks, page, hkv) if per_token else (2, 1)
        scales = list(torch.rand(shape) + 0.5)
        for scale in scales if per_token else ():
            scale[unused] = NAN
    return (*sides, *scales), table

def check(name, dtype, kind="decode", hq=4, hkv=2, dim=16, page=16, tokens=1, window=None, cap=None, stored=None,
          per_token=False, last_block=None, programs=2, wide=False, fixed=False, block_n=16):
    new, lens = sequence_lengths(kind)
    if programs > 2:
        lens[0] += 150  # one long enough to be split
    kv, table = cache(stored or dtype, lens, page, hkv, dim, per_token)
    rows = sum(new)
    q = torch.randn(rows, hq + 2 * hkv, dim).to(dtype)[:, :hq]  # as the layer cuts it out of qkv
    starts = torch.tensor([0, *torch.tensor(new).cumsum(0)], dtype=torch.int32)
    visible = None
    if kind == "tree":
        visible = torch.randint(-(2**62), 2**62, (rows,))
        visible[-1] = -1
    tables = paged.Tables(starts, torch.tensor(lens, dtype=torch.int32), table, visible)
    out = torch.full((rows, hq, dim), NAN, dtype=dtype)
    options = {"scale": dim**-0.5, "window": window, "soft_cap": cap}
    if not solution:
        spec = AttentionSpec(hq, hkv, dim, **options, dtype=dtype)
        tokens = paged.tokens_of(spec, CPU, max(new))
        block_n = paged.block_n_of(spec, CPU, tokens)
    work = plan_work(new, lens, group=hq // hkv, kv_heads=hkv, window=window, programs=programs, block_n=block_n,
                     tokens=tokens, capacity=12 if fixed else None, device=CPU)
    if solution:
        paged._is_wide = lambda side: wide
        got = paged.launch(q, kv, tables, work, **options, out=out, tile=Tile(block_n, 1, 1), last_block=last_block)
    else:
        got = paged.attend(q, kv, tables, work, **options, out=out)
    assert got.data_ptr() == out.data_ptr() and not work.counters.any()
    exact = reference.attend(q.double(), kv, tables, **options)
    error = (got.double() - exact).abs().max() / exact.abs().max()
    assert name not in found
    found[name] = [error.nan_to_num(nan=1e9).item(), len(work.merges)]

half, full = torch.float16, torch.float32
formats = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}
check("decode", full)
check("decode, one head each, small pages", half, hq=3, hkv=3, page=3, dim=20)
check("prompt in a window", full, "prompt", tokens=16, window=5)
check("mixed", full, "mixed", tokens=8)
check("mixed, capped, in a window", full, "mixed", tokens=8, window=18, cap=1.5, block_n=32)
check("tree", full, "tree", tokens=8, hkv=1, block_n=32)
check("e4m3, many programs", half, stored=formats["e4m3"], programs=16, block_n=32)
check("e5m2 in float32, scale a token, 20 dims", full, "mixed", stored=formats["e5m2"], tokens=8, per_token=True,
      dim=20)
if solution:
    check("decode, 7 heads share one", full, hq=14, hkv=2, window=9, block_n=32)
    check("decode, 20 heads share one, 64 bits", full, hq=20, hkv=1, wide=True, block_n=32)
    check("prompt", half, "prompt", tokens=8)
    check("mixed, 3 heads share one", half, "mixed", hq=6, tokens=5, page=32, dim=48, block_n=32)
    check("tree in tiles of one token, in a window", full, "tree", tokens=1, hkv=1, window=11, block_n=32)
    for last_block in (False, True):
        check(f"split decode {last_block}", full, programs=16, last_block=last_block)
        check(f"split, mixed {last_block}", half, "mixed", tokens=8, programs=32, last_block=last_block)
        check(f"split, fixed lists {last_block}", full, programs=12, fixed=True, last_block=last_block, cap=2.0,
              block_n=32)
    check("split tree, merged by choice", full, "tree", tokens=16, programs=12, block_n=32)
    check("split, e5m2", half, stored=formats["e5m2"], programs=16, block_n=32)
    check("e4m3 in float32, scale a token, 20 dims", full, "mixed", stored=formats["e4m3"], tokens=8, per_token=True,
          dim=20)
    check("e4m3, scale a token, in a window, capped", half, "mixed", stored=formats["e4m3"], tokens=8, per_token=True,
          window=7, cap=3.0, block_n=32)

# every number of both formats, subnormals too, comes out as it is: one key, so V is the answer
for name, stored in formats.items() if solution else ():
    values = torch.arange(256, dtype=torch.uint8).view(stored)
    values = torch.where(values.float().isfinite(), values.float(), 0.0).to(stored).view(1, 1, 1, 256)
    tables = paged.Tables(*(torch.tensor(x, dtype=torch.int32) for x in ([0, 1], [1], [[0]])))
    work = plan_work([1], [1], group=1, kv_heads=1, window=None, programs=1, block_n=16, tokens=1,
                     device=CPU)
    got = paged.launch(torch.ones(1, 1, 256), (values, values, torch.ones(1), torch.full((1,), 0.5)), tables, work,
                       scale=1.0, tile=Tile(16, 1, 1))
    assert torch.equal(got.view(-1), values.float().view(-1) / 2), name
print(json.dumps(found))
"""


def test_every_kind_of_step_agrees_with_float64(use: Use) -> None:
    solution = use.of("phase3_paged_attention") == "solution"
    found = interpreted(INTERPRETED, str(use), "yes" if solution else "no")
    assert len(found) == 8 + 15 * solution
    errors = {name: error for name, (error, _) in found.items()}
    assert {name: error for name, error in errors.items() if not error < 2e-3} == {}
    exact = {"decode", "prompt in a window", "mixed", "tree", "e5m2 in float32, scale a token, 20 dims"}
    assert {name: errors[name] for name in exact if not errors[name] < 1e-6} == {}
    if solution:
        merged = {name for name, (_, merges) in found.items() if merges}
        assert {name for name in found if "split" in name} | {"e4m3, many programs"} <= merged


def test_the_reference_agrees_with_torch_attention_where_torch_can() -> None:
    from phase3_paged_attention.kernels.reference import dense, visible_keys

    torch.manual_seed(0)
    q, k, v = torch.randn(5, 6, 8).double(), torch.randn(12, 2, 8).double(), torch.randn(12, 2, 8).double()
    mask = visible_keys(5, 12, 4, torch.tensor([1, 2, 5, 8, -1]))
    expected = torch.nn.functional.scaled_dot_product_attention(
        q.transpose(0, 1), k.transpose(0, 1), v.transpose(0, 1), attn_mask=mask, scale=0.3, enable_gqa=True
    )
    torch.testing.assert_close(dense(q, k, v, mask, 0.3, None), expected.transpose(0, 1))
    assert mask[1].tolist() == [False] * 5 + [True] * 2 + [False, True] + [False] * 3  # window of 4, its own bit only
    assert dense(q, k, v, mask & False, 0.3, None).abs().max() == 0


@pytest.fixture
def of_the_solution(use: Use) -> None:
    if use.of("phase3_paged_attention") != "solution":
        pytest.skip("other kernels have other builds and tiles, or none")


@compiles
@pytest.mark.usefixtures("of_the_solution")
def test_bfloat16_compiles_without_spills_and_copies_two_tiles_ahead(
    tmp_path: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    from module0_profiling.static_report import report_triton
    from phase3_paged_attention.kernels import paged_builds
    from phase3_paged_attention.kernels.tiles import tile_of

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    for arch, tokens, stored in (("sm_90", 1, 0), ("sm_80", 1, 1), ("sm_90", 16, 0)):
        number = int(arch.removeprefix("sm_"))
        tile = tile_of((number // 10, number % 10), 128, 8 * max(2, tokens), 1 if stored else 2)
        build = paged_builds.build(64, 8, 128, tokens, tile, stored=stored, scales=stored, last_block=tokens == 1)
        (report,) = report_triton([build], (arch,))
        where = f"{report.kernel} on {report.arch}"
        assert report.spill_bytes == 0, where
        assert report.occupancy.blocks >= tile.blocks, where  # it fits, and as often as the planner is told
        # Two tiles of K and V are on their way while one is multiplied, in copies of 16 bytes; the table is not copied.
        side = tile.block_n * 128 * (1 if stored else 2)
        assert report.shared_bytes >= 2 * 2 * side, where
        copies, loops = 3 * 2 * side // (16 * 32 * tile.warps), 1 if tokens == 1 else 2
        merging = report.mix.async_copies - loops * copies
        assert merging > 0 if tokens == 1 else merging == 0, where


@pytest.mark.usefixtures("of_the_solution")
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the table is for GPUs")
def test_every_head_has_a_tile_on_every_gpu() -> None:
    from phase3_paged_attention.kernels.tiles import most_rows, rows_of, tile_of

    for capability in ((8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0), (13, 0)):
        for dim in (16, 64, 80, 96, 128, 192, 256):
            for query_len in (1, 2, 5, 1000):
                for stored, query in ((2, 2), (1, 2), (4, 4), (1, 4)):
                    rows = rows_of(8, query_len, dim, query)
                    assert 16 <= rows <= most_rows(dim, query)
                    tile = tile_of(capability, dim, rows, stored, query)
                    assert tile.block_n >= 16 and tile.warps >= 4
    assert rows_of(80, 3, 256) == 80  # the heads of a token are never torn apart
