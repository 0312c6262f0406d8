"""The latent kernel: right in Triton's interpreter against float64, and what it compiles to.

Triton decides at its import whether it interprets, and the interpreter is silently wrong for bfloat16: so float32 and
float16 run in one process of their own, and bfloat16 is compiled.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator

import pytest

from module0_profiling.static_report import ALL_ARCHS, KernelReport
from phase0_prototype.tests.interpreter import interpreted

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed (it is Linux only)"
)
compiles = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter compiles nothing")

SCRIPT = """
import dataclasses, functools, json, random, sys
import torch
from module0_profiling.course import parts
from module0_profiling.course.parts import Use
from phase3_paged_attention.kernels import latent_tiles
from phase3_paged_attention.kernels.paged import Tables
from phase3_paged_attention.latent_format import PackedLatents
from phase3_paged_attention.work import plan_work
torch.set_num_threads(1)
use, solution = Use.parse(sys.argv[1]), sys.argv[2] == "yes"
mla = parts.resolve("phase3_paged_attention", "kernels.mla", use)
CPU, SCALE = torch.device("cpu"), 0.2

def definition(q, entries, latent, visible):
    # [new, H, L + R], [tokens, L + R] of one sequence, its new tokens last: float64, token by token
    q, entries = q.double(), entries.double()
    old, out = len(entries) - len(q), []
    for i, bits in enumerate(visible):
        seen = [*range(old), *(old + j for j in range(i + 1) if bits == -1 or (j < 64 and bits >> j & 1))]
        weights = torch.softmax(q[i] @ entries[seen].T * SCALE, dim=1)
        out.append(weights @ entries[seen, :latent])
    return torch.stack(out)

def tree(new):  # each token sees itself, and its parent's
    bits = []
    for j in range(new):
        parent = random.randrange(-1, j)
        bits.append(1 << j | (bits[parent] if parent >= 0 else 0))
    return [b - 2**64 if b >= 2**63 else b for b in bits]

def error(heads, latent, rope, page, lengths, dtype, *, packed=False, visible=False, programs=None, capacity=None,
          tiles=None, seed=0):
    torch.manual_seed(seed), random.seed(seed)
    how = PackedLatents(latent, rope, dtype) if packed else None
    total = sum(new for _, new in lengths)
    pages = [-(-(old + new) // page) for old, new in lengths]
    places = torch.randperm(sum(pages) + 3).tolist()
    shape = (sum(pages) + 3, page, 1)
    if packed:
        cache = torch.full((*shape, how.entry_bytes), 255, dtype=torch.uint8)  # e4m3, float32 and float16: no numbers
    else:
        cache = torch.full((*shape, latent + rope), torch.nan, dtype=dtype)
    tables = torch.full((len(lengths), max(pages) + 5), places[-1], dtype=torch.int32)[:, : max(pages) + 2]
    q = torch.randn(total, heads + 2, latent + rope + 8).to(dtype)[:, 1:-1, : latent + rope]  # a view
    bits, exact, at = [], [], 0
    for i, (old, new) in enumerate(lengths):
        own, places = places[: pages[i]], places[pages[i] :]
        tables[i, : pages[i]] = torch.tensor(own)
        entries = torch.randn(old + new, latent + rope).to(dtype)
        stored = entries.unsqueeze(1)
        if packed:
            stored = how.pack(entries[:, :latent], entries[:, latent:])
            entries = how.unpack(stored[:, 0])
        for position in range(old + new):
            cache[own[position // page], position % page] = stored[position]
        bits += tree(new) if visible and new > 1 else [-1] * new
        exact.append(definition(q[at : at + new], entries, latent, bits[at : at + new]))
        at += new
    starts = torch.tensor([0, *(new for _, new in lengths)]).cumsum(0).int()
    ends = torch.tensor([old + new for old, new in lengths]).int()
    where = Tables(starts, ends, tables, torch.tensor(bits) if visible else None)
    cut = mla.cut_for(heads, max(new for _, new in lengths), dtype, packed, CPU)
    if tiles:
        tile, group = latent_tiles.fitting(heads, cut.tokens, tiles)
        cut = dataclasses.replace(cut, group=group, head_tiles=heads // group, block_n=tile.keys)
    work = plan_work(
        [new for _, new in lengths], [sum(both) for both in lengths], group=cut.group, kv_heads=cut.head_tiles,
        window=None, programs=cut.programs if programs is None else programs * cut.head_tiles, block_n=cut.block_n,
        tokens=cut.tokens, capacity=capacity, device=CPU,
    )
    out = torch.full((total, heads, latent), torch.nan, dtype=dtype)
    run = functools.partial(mla.launch, tiles=tiles) if tiles else mla.attend_latents
    got = run(q, cache, where, work, scale=SCALE, latent=latent, rope=rope, out=out)
    exact = torch.cat(exact)
    assert got is out and out.isfinite().all()
    return ((out.double() - exact).abs().max() / exact.abs().max()).item(), int(work.slots)

MIXED = [(0, 1), (31, 1), (200, 1), (20, 3), (0, 5)]
F16, F32 = torch.float16, torch.float32
narrow = latent_tiles.LatentTile(16, 16, 1, 1, 8)
cases = {
    "mixed f32": ((4, 32, 8, 16, MIXED, F32), {}),
    "mixed f16": ((4, 32, 8, 16, MIXED, F16), {}),
    "odd sizes f32": ((3, 20, 6, 3, MIXED, F32), {}),
    "tree f32": ((4, 32, 8, 16, [(40, 7), (9, 1), (300, 20)], F32), {"visible": True}),
    "packed f32": ((2, 128, 8, 16, MIXED, F32), {"packed": True}),
    "packed f16": ((2, 128, 16, 16, MIXED, F16), {"packed": True}),
}
if solution:
    soft = tuple(dataclasses.replace(tile, hardware=False) for tile in latent_tiles.tiles_of(None, True))
    cases |= {
        "one program f32": ((16, 64, 16, 64, MIXED, F32), {"programs": 1}),
        "many splits f32": ((20, 32, 8, 16, [(700, 1), (64, 4)], F32), {"programs": 60, "tiles": (narrow,)}),
        "heads in parts f16": ((80, 64, 16, 16, [(40, 1), (300, 1)], F16), {}),
        "heads of 3 in parts of 1 f32": ((3, 32, 8, 16, [(70, 20)], F32), {"tiles": (narrow,)}),
        "captured f32": ((4, 32, 8, 16, [(200, 1), (3, 1)], F32), {"capacity": 17}),
        "longer tree than bits f32": ((2, 32, 8, 16, [(5, 64)], F32), {"visible": True}),
        "packed in three groups f16": ((2, 384, 8, 16, [(70, 1), (3, 2)], F16), {"packed": True}),
        "packed without the instruction f32": ((2, 128, 8, 16, MIXED, F32), {"packed": True, "tiles": soft}),
    }
found = {name: error(*sizes, **settings, seed=i) for i, (name, (sizes, settings)) in enumerate(cases.items())}
q = torch.zeros(1, 2, 40)
refused = []
for cache in (torch.zeros(2, 4, 1, 39), torch.zeros(2, 4, 1, 80)[..., :40]):
    try:
        mla.attend_latents(q, cache, None, None, scale=1.0, latent=32, rope=8)
    except ValueError as error_:
        refused.append(str(error_))
print(json.dumps({"found": found, "refused": refused}))
"""


@pytest.fixture(scope="module")
def said(use):
    return interpreted(SCRIPT, str(use), "yes" if use.of("phase3_paged_attention") == "solution" else "no")


def test_any_step_is_attention_in_float64_whatever_the_cut(said) -> None:
    assert len(said["found"]) >= 6
    for name, (error, _) in said["found"].items():
        assert error < (1e-3 if "f16" in name else 1e-6), name


def test_the_cases_have_what_they_are_named_for(said) -> None:
    if len(said["found"]) > 6:
        slots = {name: slots for name, (_, slots) in said["found"].items()}
        assert slots["one program f32"] == 0 < slots["mixed f32"]
        assert slots["many splits f32"] > 10


def test_a_cache_of_another_layout_is_refused(said) -> None:
    assert len(said["refused"]) == 2
    assert "39" in said["refused"][0] and "(320, 80, 80, 1)" in said["refused"][1]


# What it compiles to


@pytest.fixture(scope="module")
def reports(tmp_path_factory) -> Iterator[dict[str, list[KernelReport]]]:
    """128 heads on every architecture: in bfloat16, and in FP8 where an instruction converts it and where none does."""
    from module0_profiling.static_report import report_triton
    from phase3_paged_attention.kernels import latents_triton

    found: dict[str, list[KernelReport]] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
        for arch in ALL_ARCHS:
            number = int(arch.removeprefix("sm_"))
            builds = {build.label: build for build in latents_triton.builds_for((number // 10, number % 10))}
            wanted = [build for label, build in builds.items() if "128 heads" in label and label.endswith("stages")]
            assert [build.label[8:11] for build in wanted] == ["bf1", "FP8"]
            found[arch] = report_triton(wanted if arch in ("sm_80", "sm_90") else wanted[:1], (arch,))
        yield found  # with the cache still in place


@compiles
def test_tiles_of_128_heads_fit_every_gpu_without_spills_and_copy_in_the_background(reports) -> None:
    assert sum(len(of_arch) for of_arch in reports.values()) == 8
    for report in (report for of_arch in reports.values() for report in of_arch):
        where = f"{report.kernel}, {report.arch}"
        assert report.spill_bytes == 0, where
        assert report.occupancy.blocks >= 1, where
        assert report.mix.async_copies > 0, where


@compiles
def test_hopper_multiplies_from_shared_memory_with_two_tiles_there_beside_the_one_in_use(reports) -> None:
    """Read in its own round, the block table takes half of the stages: then there is one less."""
    queries, tile, report = 64 * 576 * 2, 32 * 576 * 2, reports["sm_90"][0]
    assert report.mix.wgmma > 0 == report.mix.mma
    assert queries + 3 * tile <= report.shared_bytes < queries + 4 * tile


@compiles
def test_the_case_has_the_build_and_the_ridge(reports) -> None:
    from phase3_paged_attention.measures.mla_kernel_cases import arithmetic, figures_of

    found = {figure.name: figure.value for figure in (*arithmetic(), *figures_of("sm_90", dry=True))}
    assert (found["bf16/bytes a token"], found["FP8/bytes a token"]) == (1152, 656)
    assert found["bf16/heads at the ridge"] == pytest.approx(97, abs=1)
    assert found["framework/bytes a token"] == 128 * 2 * (512 + 512 + 64)
    build = "bf16, 128 heads, 64x32, 8 warps, 3 stages, sm_90"
    assert found[f"{build}/registers"] == reports["sm_90"][0].registers
    assert (found[f"{build}/spills"], found[f"{build}/blocks on an SM"]) == (0, 1)


def test_rows_left_over_by_few_heads_are_filled_with_tokens() -> None:
    import torch

    from phase3_paged_attention.kernels import mla

    cpu = torch.device("cpu")
    cuts = {(h, n): mla.cut_for(h, n, torch.float16, False, cpu) for h in (5, 16, 96, 128) for n in (1, 3, 100)}
    assert {key: (cut.tokens, cut.group, cut.head_tiles) for key, cut in cuts.items()} == {
        (5, 1): (1, 5, 1), (5, 3): (4, 5, 1), (5, 100): (8, 5, 1),
        (16, 1): (1, 16, 1), (16, 3): (4, 16, 1), (16, 100): (4, 16, 1),
        (96, 1): (1, 48, 2), (96, 3): (1, 48, 2), (96, 100): (1, 48, 2),
        (128, 1): (1, 64, 2), (128, 3): (1, 64, 2), (128, 100): (1, 64, 2),
    }  # fmt: skip
