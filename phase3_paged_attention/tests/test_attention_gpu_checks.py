"""The checks that a GPU must pass, and the benchmarks beside the peers, gone through on the CPU."""

from __future__ import annotations

import importlib
import importlib.util
import os
import subprocess
import sys
from dataclasses import replace
from itertools import combinations, product
from pathlib import Path

import pytest
import torch

from module0_profiling import rooms
from module0_profiling.bench_gpu import CheckFailed
from phase3_paged_attention import benchmark
from phase3_paged_attention.kernels import reference
from phase3_paged_attention.measures import (
    attention_errors,
    attention_peers,
    gpu_checks,
    mla_peers,
    torch_peers,
    vllm_peer,
)
from phase3_paged_attention.measures.attention_inputs import decode, extend, make
from phase3_paged_attention.work_list import Work

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed (it is Linux only)"
)
SMALL = {"dtype": torch.float32}
HEADS = (4, 2, 16)
DRY_RUN = """
from phase3_paged_attention.measures import gpu_cases, gpu_checks, mla_gpu_cases, tune_cases
from module0_profiling.bench import Options
from pathlib import Path
from rich.console import Console
import torch
torch.set_num_threads(1)
options = Options("cpu", 1, Path("."), Console(quiet=True), dry=True)
checked = {figure.name for figure in (*gpu_checks.attention("cpu", dry=True), *gpu_checks.kernels("cpu", dry=True))}
assert {"paged/error", "paged, split, merged by the last program/error", "latents/error"} <= checked, checked
assert {"rung split/error", "write fp8_e5m2/error"} <= checked, checked
kinds = {figure.name for figure in gpu_cases.decode_kinds(options)}
row = "B1 x 20, 4+2x16, page 16"
for name in (f"{row}, float16/ours over gather + unfused", f"{row}, float16/ours over rung split"):
    assert name in kinds, kinds
assert f"{row}, fp8_e4m3, float16/time over 16 bits" in kinds and "peaks/read" in kinds, kinds
cases = (gpu_cases.decodes, gpu_cases.prefill, gpu_cases.tree, mla_gpu_cases.mla, tune_cases.tune)
found = {figure.name for case in cases for figure in case(options)}
assert {"tree over causal/ours", "plan/ours", "decode/best", "not measured/vLLM Triton"} <= found, found
assert "B2 x 20, 4 heads, page 16, FP8, float16/ours, bandwidth" in found, found
"""


@needs_triton
def test_checks_and_benchmarks_run_dry():
    environment = {
        **os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(rooms.ROOT),
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", DRY_RUN], env=environment, capture_output=True, text=True, check=False, timeout=240
    )
    assert done.returncode == 0, done.stderr


def by_twin(wrong=lambda inputs, out: out):
    """The torch twin in the place of the kernels; `wrong` spoils what it computed."""

    def family(options):
        def run(inputs):
            spec = inputs.case.spec
            given = {"scale": spec.scale, "window": spec.window, "soft_cap": spec.soft_cap}
            return lambda: wrong(inputs, reference.attend(inputs.q, inputs.kv, inputs, **given))

        return run

    return family


def slightly(inputs, out):
    return out * (1 + (1e-4 if out.dtype == torch.float32 else 1e-2))


SPOILED = {
    "one number": lambda inputs, out: out.index_put_((torch.tensor(-1), torch.tensor(3)), out.new_tensor(9.0)),
    "a number that nobody wrote": lambda inputs, out: out.index_put_((torch.tensor(0),), out.new_tensor(float("nan"))),
    "all, slightly": slightly,
}


def test_a_right_kernel_passes(monkeypatch):
    monkeypatch.setattr(gpu_checks, "_family", by_twin())
    assert {figure.name for figure in gpu_checks.attention("cpu", dry=True)} == {f"{n}/error" for n in gpu_checks.WAYS}


@pytest.mark.parametrize("spoiled", SPOILED)
def test_a_wrong_kernel_fails_its_check_by_name(monkeypatch, spoiled):
    broken = "paged, split, merged by a launch"

    def family(options):
        return by_twin(SPOILED[spoiled] if options == gpu_checks.WAYS[broken] else lambda inputs, out: out)(options)

    monkeypatch.setattr(gpu_checks, "_family", family)
    with pytest.raises(CheckFailed, match=rf"^{broken} is off by \S+ times what is allowed at B"):
        gpu_checks.attention("cpu", dry=True)


def test_counters_that_are_not_zero_again_are_an_error(monkeypatch):
    inputs = make(extend(1, 9, 2, HEADS, **SMALL), "cpu")

    def into(left):
        def planned(out, inputs, **options):
            def launch():
                reference.attend(inputs.q, inputs.kv, inputs, scale=inputs.case.spec.scale, out=out)
                return (Work(*torch.zeros(2, 1, 6, dtype=torch.int32), torch.tensor([left]), 1, 0),)

            return launch

        return planned

    for left in (0, 1):
        monkeypatch.setattr(gpu_checks, "into", into(left))
        got = gpu_checks._family({})(inputs)().flatten(1)
        assert bool(got.isnan().all()) == bool(left)


def test_every_two_choices_meet_in_a_case():
    rows = gpu_checks.pairwise()
    assert rows == gpu_checks.pairwise() and len(rows) < 40

    def chosen(case):
        return {
            **{name: getattr(case, name) for name in ("dtype", "dim", "page", "kv_format", "window", "soft_cap")},
            "heads": (case.heads, case.kv_heads), "lengths": (case.new, case.lengths),
        }  # fmt: skip

    for one, two in combinations(gpu_checks.CHOICES, 2):
        met = {(chosen(case)[one], chosen(case)[two]) for case in rows}
        assert met == set(product(gpu_checks.CHOICES[one], gpu_checks.CHOICES[two]))


EVEN = (decode(2, 21, HEADS, **SMALL), extend(2, 21, 5, HEADS, **SMALL), extend(1, 9, 9, HEADS, **SMALL))


@pytest.mark.parametrize("case", EVEN, ids=str)
def test_torchs_peers_compute_the_same(case):
    inputs = make(case, "cpu", poisoned=True)
    expected = attention_errors.exact(inputs)
    allowed = attention_errors.allowed(inputs, expected)
    ways = (torch_peers.contiguous, torch_peers.gathered, *([torch_peers.unfused] if case.is_decode else []))
    for prepare in ways:
        got = prepare(inputs).bind(inputs.q, inputs.kv)()
        assert attention_errors.error(got, expected, allowed) <= 1, prepare.__name__


def test_flashinfers_tables_say_where_the_tokens_are():
    case = replace(decode(3, 33, HEADS, page=16, **SMALL), lengths=(33, 5, 32))
    inputs = make(case, "cpu")
    begins, pages, last = attention_peers.pages_of(inputs)
    assert begins.tolist() == [0, 3, 4, 6] and last.tolist() == [1, 5, 16]
    for b in range(3):
        mine = pages[begins[b] : begins[b + 1]]
        assert mine.tolist() == inputs.block_tables[b, : len(mine)].tolist()
    assert {part.dtype for part in (begins, pages, last)} == {torch.int32}


def test_flashinfers_mask_is_one_bit_a_pair():
    inputs = make(extend(2, 12, 5, HEADS, tree=True, **SMALL), "cpu")
    mask = attention_peers._mask(inputs).view(2, 5, 12)
    assert mask[:, :, :7].all()
    for b, i, j in product(range(2), range(5), range(5)):
        assert mask[b, i, 7 + j] == bool(int(inputs.visible[5 * b + i]) >> j & 1)


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what is missing without a GPU")
def test_peers_that_cannot_run_say_why():
    reasons = {peer.name: peer.why_not() for peer in (*attention_peers.PEERS, *mla_peers.PEERS)}
    for name in ("SDPA, contiguous", "gather + SDPA", "gather + unfused"):
        assert reasons.pop(name) == ""
    assert set(reasons.values()) == {"needs an NVIDIA GPU"} and len(reasons) > 8


def test_without_their_packages_peers_name_the_remedy(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(vllm_peer, "SOURCE", Path("/nowhere/triton_unified_attention.py"))
    reasons = {peer.name: peer.why_not() for peer in attention_peers.PEERS}
    assert reasons["FlashInfer, fa3"] == "flashinfer is not installed: pip install flashinfer-python"
    assert "build/peers/vllm/triton_unified_attention.py is not there" in reasons["vLLM Triton"]


def test_vllms_file_stands_alone():
    text = '"""Attention."""\nimport torch\n\nfrom vllm.logger import init_logger\n'
    text += "from vllm.platforms import current_platform\n"
    text += "from vllm.triton_utils import (\n    tl,\n    triton,\n)\n\nfloat8 = current_platform.fp8_dtype()\n"
    text += "\ndef unified_attention(q):\n    return float8\n"
    alone = vllm_peer.standalone(text)
    assert "vllm." not in alone
    if importlib.util.find_spec("triton") is not None:
        names: dict = {}
        exec(compile(alone, "alone", "exec"), names)
        assert names["unified_attention"](None) == torch.float8_e4m3fn
    with pytest.raises(ValueError, match="no function unified_attention"):
        vllm_peer.standalone("import torch\n")


def test_the_benchmark_describes_every_case_and_finds_it():
    for name in benchmark.CASES:
        assert f"    {name}" in benchmark.__doc__ or f", {name}" in benchmark.__doc__, name
    assert {case.name for case in (*benchmark.GPU_CHECKS, *benchmark.GPU_CASES)} <= set(benchmark.CASES)
    checks = {check.name for check in benchmark.GPU_CHECKS}
    assert {case.check for case in benchmark.GPU_CASES} <= checks
    for case in benchmark.CASES.values():
        where = dict(zip(case.__code__.co_freevars, (c.cell_contents for c in case.__closure__ or ()), strict=True))
        if where:
            module = importlib.import_module(f"{benchmark.ROOM}.measures.{where['module']}")
            assert callable(getattr(module, where["function"]))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU here")
def test_every_kernel_is_right_on_this_gpu():
    assert gpu_checks.attention("cuda") and gpu_checks.kernels("cuda")
