"""The decode ladder and the framework's kernel: right in Triton's interpreter, and what the rungs compile to.

Triton decides at its import whether it interprets, and the interpreter is silently wrong for bfloat16: so float32 and
float16 run in one process of their own, and bfloat16 is compiled.
"""

from __future__ import annotations

import importlib.util
import os

import pytest
import torch

from module0_profiling.static_report import KernelReport
from phase0_prototype.tests.interpreter import interpreted

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed (it is Linux only)"
)
compiles = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter compiles nothing")

DENSE = """
import json, math
import torch
torch.set_num_threads(1)
torch.manual_seed(0)
found = {}

def paged(lengths, page, hkv, dim, dtype):
    '''A cache of NaN with the sequences' keys and values in permuted pages, the tables, and both sides in order.'''
    pages = -(-max(lengths) // page)
    blocks = len(lengths) * pages + 1
    cache = torch.full((2, blocks, page, hkv, dim), float("nan"), dtype=dtype)
    tables = torch.randperm(blocks)[: len(lengths) * pages].view(-1, pages).int()
    sides = [torch.randn(2, n, hkv, dim).to(dtype) for n in lengths]
    for table, side in zip(tables, sides):
        for t in range(side.shape[1]):
            cache[:, table[t // page], t % page] = side[:, t]
    return cache, tables, sides

def error(got, exact):
    return ((got.double() - exact).abs().max() / exact.abs().max()).nan_to_num(nan=float("inf")).item()
"""

RUNGS = """
from phase3_paged_attention.kernels import decode_ladder as ladder
lengths = [1, 32, 41]  # one token, whole pages and tiles, a ragged last one
for dtype, hq, hkv, dim, page in (
    (torch.float32, 1, 1, 64, 16), (torch.float32, 6, 2, 80, 32), (torch.float32, 4, 1, 16, 16),
    (torch.float16, 8, 1, 32, 16), (torch.float32, 1, 1, 16, 3),
):
    cache, tables, sides = paged(lengths, page, hkv, dim, dtype)
    q = torch.randn(3, hq, dim).to(dtype)
    exact = []
    for one, side in zip(q, sides):
        k, v = side.double().repeat_interleave(hq // hkv, dim=2)
        weights = torch.softmax(torch.einsum("hd,shd->hs", one.double(), k) * 0.2, dim=1)
        exact.append(torch.einsum("hs,shd->hd", weights, v))
    wide = torch.cat((tables, tables), 1)[:, : tables.shape[1]]  # rows that do not follow one another
    for rung in ladder.RUNGS + (ladder.EXHIBITS if page == 16 else ()):
        got = ladder.run(rung, q, *cache, torch.tensor(lengths).int(), wide, 0.2, block_n=16, splits=4)
        found[f"{rung} {dtype} {hq}/{hkv}x{dim} page {page}"] = error(got, torch.stack(exact))
"""

FRAMEWORK = """
from phase3_paged_attention.framework import work
from phase3_paged_attention.framework.kernels import paged as kernel
new, lengths, hq, hkv = [1, 3], [20, 18], 2, 1  # a decode, and three tokens behind 15
rows = [range(19, 20), range(15, 18)]  # their positions
start = torch.tensor([0, 1, 4], dtype=torch.int32)
for name, window, cap, bits, scaled in (
    ("plain", None, None, None, None), ("window and cap", 7, 1.5, None, None),
    ("tree", None, None, [-1, 0b001, 0b010, 0b101], None), ("FP8, one scale", None, None, None, "tensor"),
    ("FP8, a scale a token", 7, None, None, "token"),
):
    cache, tables, sides = paged(lengths, 16, hkv, 20, torch.float32)
    scales = ()
    if scaled:
        shape = cache.shape[1:4] if scaled == "token" else (1,)
        scales = (torch.rand(shape) + 0.5, torch.rand(shape) + 0.5)
        cache = cache.to(torch.float8_e4m3fn)
        for b, n in enumerate(lengths):
            for side, scale in enumerate(scales):
                of = scale[tables[b].long()].flatten(0, 1)[:n, :, None] if scaled == "token" else scale
                sides[b][side] = cache[side, tables[b].long()].flatten(0, 1)[:n].float() * of
        if scaled == "token":
            unused = cache[0].float().isnan().all(-1)
            for scale in scales:
                scale[unused] = float("nan")
    q = torch.randn(4, 2 * hq, 20)[:, ::2]
    visible = None if bits is None else torch.tensor(bits)
    exact = []
    for b, side in enumerate(sides):
        k, v = side.double().repeat_interleave(hq // hkv, dim=2)
        for position in rows[b]:
            token = len(exact)
            scores = torch.einsum("hd,shd->hs", q[token].double(), k) * 0.3
            scores = scores if cap is None else cap * torch.tanh(scores / cap)
            for s in range(lengths[b]):
                hidden = s > position or (window is not None and s <= position - window)
                j = s - rows[b].start
                if hidden or (bits is not None and bits[token] != -1 and j >= 0 and not bits[token] >> j & 1):
                    scores[:, s] = -math.inf
            exact.append(torch.einsum("hs,shd->hd", torch.softmax(scores, 1), v).flatten())
    step = kernel.Tables(start, torch.tensor(lengths).int(), tables, visible)
    plan = work.plan_work(new, lengths, group=2, kv_heads=hkv, window=window, programs=8, block_n=16, tokens=2,
                          capacity=4, device=torch.device("cpu"))
    got = kernel.attend(q, (*cache, *scales), step, plan, scale=0.3, window=window, soft_cap=cap)
    found["framework " + name] = error(got, torch.stack(exact))
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def errors() -> dict[str, float]:
    return interpreted(DENSE + RUNGS + FRAMEWORK)


def test_every_rung_agrees_with_float64_and_reads_nothing_behind_a_sequence(errors: dict[str, float]) -> None:
    rungs = {name: error for name, error in errors.items() if not name.startswith("framework")}
    assert len(rungs) == 5 * 5 + 3 * 2
    for name, error in rungs.items():
        assert error < (1e-3 if "float16" in name else 1e-6), name


def test_the_framework_agrees_with_float64_for_windows_caps_trees_and_fp8(errors: dict[str, float]) -> None:
    framework = {name: error for name, error in errors.items() if name.startswith("framework")}
    assert len(framework) == 5
    for name, error in framework.items():
        assert error < 1e-6, name


def test_the_framework_plans_one_item_a_tile_that_reads_what_its_tokens_see() -> None:
    from phase3_paged_attention.framework.work import plan_work

    sizes = {"group": 4, "kv_heads": 2, "programs": 64, "block_n": 16, "tokens": 4, "device": torch.device("cpu")}
    work = plan_work([1, 6], [100, 10], window=None, capacity=5, **sizes)
    ends = [(0, 0, 0, 100, -1, 1), (1, 0, 0, 8, -1, 1), (1, 4, 0, 10, -1, 1)]
    assert work.items.tolist() == [list(item) for item in (*ends, (-1,) * 6, (-1,) * 6)]
    assert work.items.dtype == torch.int32 and work.merges.shape == (0, 4) and work.slots == 0
    windowed = plan_work([6], [10], window=3, sequences=[7], **sizes)
    assert windowed.items.tolist() == [[7, 0, 2, 8, -1, 1], [7, 4, 6, 10, -1, 1]]


@pytest.mark.parametrize("where", ["q", "values"])
def test_a_tensor_with_gaps_is_refused_by_name(where: str) -> None:
    from phase3_paged_attention.kernels import decode_ladder

    tensors = {"q": torch.zeros(1, 2, 16), "keys": torch.zeros(1, 16, 2, 16), "values": torch.zeros(1, 16, 2, 16)}
    tensors[where] = tensors[where].repeat_interleave(2, dim=-1)[..., ::2]
    with pytest.raises(ValueError, match=f"{where} must be contiguous"):
        decode_ladder.run("packed", *tensors.values(), torch.ones(1).int(), torch.zeros(1, 1).int(), 1.0)
    with pytest.raises(ValueError, match="there are naive, online, tiled, packed, split"):
        decode_ladder.run("fastest", *tensors.values(), torch.ones(1).int(), torch.zeros(1, 1).int(), 1.0)


def test_ranges_fill_a_gpu_and_none_is_shorter_than_a_tile() -> None:
    from phase3_paged_attention.kernels.decode_ladder import MAX_SPLITS, PROGRAMS, splits_of

    assert splits_of(64, 8, 8192, 64) == 1  # 512 programs already
    assert splits_of(4, 8, 8192, 64) == PROGRAMS // 32
    assert splits_of(1, 8, 100, 64) == 2
    assert splits_of(1, 1, 10**6, 64) == MAX_SPLITS


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, KernelReport]:
    """For Hopper: all rungs with heads of 128, the exhibits, the merge. `packed` also for Ampere."""
    from module0_profiling.static_report import report_triton
    from phase3_paged_attention.kernels import decode_ladder as ladder

    builds = {rung: ladder.build(rung, 128) for rung in (*ladder.RUNGS, *ladder.EXHIBITS)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
        found = {name: report_triton([build], ("sm_90",))[0] for name, build in builds.items()}
        found |= {r.arch: r for r in report_triton([builds["packed"]], ("sm_80",))}
        return {**found, "merge": report_triton([ladder.build_merge(128)], ("sm_90",))[0]}


@compiles
def test_the_ladder_compiles_without_spills_and_moves_16_bytes_at_a_time(reports: dict[str, KernelReport]) -> None:
    assert len(reports) == 5 + 2 + 1 + 1
    for name, report in reports.items():
        assert report.spill_bytes == 0, name
        assert report.occupancy.blocks >= 2, name
        assert name == "page_gather" or report.mix.vector_loads > 0, name


@compiles
def test_only_rungs_on_tensor_cores_copy_in_the_background(reports: dict[str, KernelReport]) -> None:
    """Triton's pipeline is for operands of products: what is multiplied and summed waits in registers."""
    for name in ("packed", "split", "sm_80"):
        assert reports[name].mix.async_copies > 0 < reports[name].mix.mma, name
    for name in ("naive", "online", "tiled"):
        assert reports[name].mix.async_copies == 0 == reports[name].mix.mma, name


@compiles
def test_a_reshape_of_addresses_costs_the_copies_and_one_of_rows_does_not(reports: dict[str, KernelReport]) -> None:
    rows, addresses, packed = (reports[name] for name in ("page_rows", "page_gather", "packed"))
    assert addresses.mix.async_copies == 0 and addresses.mix.global_widths[16][0] >= 64
    assert addresses.registers > packed.registers
    assert rows.mix.async_copies > 0 and rows.mix.vector_loads >= packed.mix.vector_loads
    assert rows.registers <= packed.registers and rows.mix.shared_loads < packed.mix.shared_loads
