"""The Triton twin of the RoPE ladder: right in the interpreter, and what it compiles to.

Triton decides at its import whether it interprets, and the interpreter is silently wrong for bfloat16: so float32 and
float16 run in one process of their own, and bfloat16 is compiled.
"""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import pytest

from phase0_prototype.tests.interpreter import interpreted

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed (it is Linux only)"
)

INTERPRETED = """
import json
import torch
from phase2_rope.kernels import counts, rope, rope_triton
from phase2_rope.kernels.counts import Case, Inputs
torch.set_num_threads(1)
sizes = ((5, 4, 2, 64, 64), (3, 3, 1, 128, 128), (9, 2, 2, 80, 48), (2, 5, 1, 20, 10), (1, 4, 1, 64, 32))
found = {}
for dtype in (torch.float32, torch.float16):
    for size in sizes:
        for interleaved in (False, True):
            case = Case(*size, interleaved=interleaved, dtype=dtype, padding=size[0] > 1)
            name = f"{dtype} {size} {interleaved}"
            inputs = Inputs.of(case)
            exact = counts.exact("rope_tokens", inputs)
            q, k, v = inputs.qkv
            outs = tuple(torch.full_like(x.contiguous(), float("nan")) for x in (q, k))
            rope_triton.rotate_into(*outs, q, k, inputs.cos_sin, inputs.positions, interleaved=interleaved)
            found[name + " out of place"] = counts.error(tuple(zip(outs, exact)))
            rope_triton.rotate(q, k, inputs.cos_sin, inputs.positions, interleaved=interleaved)
            found[name + " in place"] = counts.error(tuple(zip((q, k), exact)))
            inputs = Inputs.of(case)
            exact, (q, k, v) = counts.exact("rope_fast", inputs), inputs.qkv
            before = k.clone()
            where = (inputs.slots, inputs.keys, inputs.values)
            rope_triton.rotate_and_write(q, k, v, inputs.cos_sin, inputs.positions, *where, interleaved=interleaved)
            found[name + " write"] = counts.error(tuple(zip((q, inputs.keys, inputs.values), exact)))
            assert torch.equal(k, before)
# many tokens: four a program, the last program ragged
case = Case(1027, 2, 1, 16, 16, dtype=torch.float32)
assert rope_triton.Tile.of(1027, 3, 16).tokens == 4
inputs = Inputs.of(case)
exact, (q, k, v) = counts.exact("rope_fast", inputs), inputs.qkv
where = (inputs.slots, inputs.keys, inputs.values)
rope_triton.rotate_and_write(q, k, v, inputs.cos_sin, inputs.positions, *where)
found["many tokens"] = counts.error(tuple(zip((q, inputs.keys, inputs.values), exact)))
# the slice that latent attention turns, and no tokens at all
q, k = torch.randn(3, 4, 24), torch.randn(3, 40)
table, positions = counts.cos_sin_table(20, 16), torch.tensor([19, 0, 5])
exact = (q.double()[..., 8:], k.double()[:, None, 24:])
rope.rotate(*exact, table.double(), positions, interleaved=True)
rope_triton.rotate(q[..., 8:], k[:, None, 24:], table, positions, interleaved=True)
found["slice"] = counts.error(tuple(zip((q[..., 8:], k[:, None, 24:]), exact)))
rope_triton.rotate(q[:0], q[:0], table, positions[:0])
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def errors() -> dict[str, float]:
    return interpreted(INTERPRETED)


def test_every_layout_agrees_with_float64(errors: dict[str, float]) -> None:
    assert len(errors) == 2 * 5 * 2 * 3 + 2
    assert {name: error for name, error in errors.items() if not error <= 1} == {}


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter compiles nothing")
def test_bfloat16_compiles_for_six_gpus_with_vectors_both_ways_and_without_spills(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from module0_profiling.static_report import ALL_ARCHS, report_triton
    from phase2_rope.kernels import rope_triton

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    reports = report_triton(rope_triton.AOT, ALL_ARCHS)
    assert len(reports) == 8 * 6
    for report in reports:
        where = f"{report.kernel} on {report.arch}"
        assert report.spill_bytes == 0, where
        assert report.mix.vector_loads > 0 and report.mix.vector_stores > 0, where
        assert 16 not in report.mix.global_widths, where  # no scalar of a head is moved alone
        assert report.occupancy.fraction >= 0.5, where


def test_few_tokens_are_dealt_out_along_the_heads() -> None:
    from phase2_rope.kernels.rope_triton import Tile

    assert Tile.of(1, 40, 128) == Tile(tokens=1, heads=16, groups=3, warps=4)
    assert Tile.of(65536, 40, 128) == Tile(tokens=4, heads=4, groups=1, warps=4)
    assert Tile.of(1, 3, 16).warps == 1  # fewer elements than threads: none is held twice
