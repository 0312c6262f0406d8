"""The checks that a GPU must pass, and the benchmark beside the peers, gone through on the CPU."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from module0_profiling.bench_gpu import CheckFailed
from module0_profiling.course.needs import absent
from phase2_rope import gpu_checks, kernel_cases, rope_peers
from phase2_rope.kernels import counts, rope
from phase2_rope.kernels.counts import Case, Inputs

needs_compiler = pytest.mark.skipif(absent("compiler") is not None, reason=str(absent("compiler")))

DRY_RUN = """
from phase2_rope import gpu_checks, kernel_cases
names = {figure.name for figure in gpu_checks.check("cpu", dry=True)}
assert {"rope_fast/error", "kv_write/error", "triton, write/error", "torch eager/difference"} <= names, names
rows = {figure.name for figure in kernel_cases.timed("cpu", 1, dry=True)}
assert "3 tokens, 2+1x16/rope_fast, x rope_tokens, kv_write" in rows, rows
assert {"3 tokens, 2+1x16/triton, time", "copy", "not measured/vLLM"} <= rows, rows
"""


@needs_compiler
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed (it is Linux only)")
def test_checks_and_benchmark_run_dry() -> None:
    root = Path(__file__).parent.parent.parent
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(root)}
    done = subprocess.run(
        [sys.executable, "-c", DRY_RUN], env=environment, capture_output=True, text=True, check=False, timeout=240
    )
    assert done.returncode == 0, done.stderr


@needs_compiler
@pytest.mark.parametrize("broken", ["rope_tokens", "kv_write"])
def test_a_wrong_kernel_fails_its_check_by_name(monkeypatch: pytest.MonkeyPatch, broken: str) -> None:
    def wrong(inputs: Inputs) -> tuple[Tensor, ...]:
        call, written = counts.prepared(broken, inputs)
        rope.prepare(broken, call)()
        written[0].view(-1)[1] += 0.05  # one element of the first tensor
        return written

    right = gpu_checks.kernels()
    monkeypatch.setattr(gpu_checks, "kernels", lambda: {"rope_naive": right["rope_naive"], broken: wrong})
    # Out of place results are contiguous, so that the element can be reached.
    monkeypatch.setattr(gpu_checks, "DRY_SIZES", (Case(3, 2, 1, 16, 16, in_place=False),))
    with pytest.raises(CheckFailed, match=f"{broken} is off by .* at Case"):
        gpu_checks.check("cpu", dry=True)


@needs_compiler
def test_elements_that_no_thread_wrote_are_seen() -> None:
    case = Case(3, 2, 1, 16, 16, in_place=False)
    worst, where = gpu_checks.worst_of(
        "rope_naive", lambda inputs: counts.prepared("rope_naive", inputs)[1], "cpu", [case]
    )
    assert worst == float("inf") and where == str(case)


def test_a_peer_that_turns_other_pairs_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    eager = next(peer for peer in rope_peers.PEERS if peer.name == "torch eager")
    assert gpu_checks.peer_error(eager, "cpu", dry=True) < gpu_checks.PEER_TOLERANCE
    monkeypatch.setattr(rope_peers, "apply_rotary_pos_emb", lambda q, k, cos, sin: (q * cos, k * cos))
    assert gpu_checks.peer_error(eager, "cpu", dry=True) > 2 * gpu_checks.PEER_TOLERANCE


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what is missing without a GPU")
def test_peers_that_cannot_run_say_why() -> None:
    reasons = {peer.name: peer.why_not() for peer in rope_peers.PEERS}
    assert reasons.pop("torch eager") == ""
    assert set(reasons.values()) == {"needs an NVIDIA GPU"}


def test_without_their_packages_peers_name_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(rope_peers, "VLLM_SOURCE", Path("/nowhere/pos_encoding_kernels.cu"))
    reasons = {peer.name: peer.why_not() for peer in rope_peers.PEERS}
    assert reasons["FlashInfer"] == "flashinfer is not installed: pip install flashinfer-python"
    assert reasons["Liger"] == "liger-kernel is not installed: pip install liger-kernel"
    assert "build/peers/vllm/pos_encoding_kernels.cu with its headers is not there" in reasons["vLLM"]


@pytest.mark.parametrize(
    ("declared", "call"),
    [
        ("torch::Tensor& key, int64_t n, torch::Tensor& cos_sin, bool neox", "k.value(), head_size, cos_sin, neox)"),
        (
            "std::optional<torch::Tensor> key,  // may be none\n  int64_t n, torch::Tensor& cos_sin, bool neox,\n"
            "  int64_t rope_dim_offset, bool inverse",
            "k, head_size, cos_sin, neox, 0, false)",
        ),
    ],
)  # fmt: skip
def test_the_binding_fits_both_versions_of_vllms_function(declared: str, call: str) -> None:
    text = rope_peers.binding(
        f"void rotary_embedding(torch::Tensor& positions, torch::Tensor& query, {declared}) {{\n}}"
    )
    assert f"rotary_embedding(positions, q, {call};" in text
    assert "//" not in text.split("void rotary_embedding")[1].split(";")[0]
    with pytest.raises(ValueError, match="no function rotary_embedding"):
        rope_peers.binding("int main() {}")


def test_the_static_case_covers_every_kernel_on_six_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if reason := absent("nvrtc"):
        pytest.skip(reason)
    if os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("the interpreter compiles nothing")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    if importlib.util.find_spec("triton") is not None:
        from phase2_rope.kernels import rope_triton

        monkeypatch.setattr(rope_triton, "AOT", rope_triton.AOT[:2])  # test_rope_triton compiles all
    figures = {figure.name: figure.value for figure in kernel_cases.static()}
    for arch in ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120"):
        for name in ("rope_naive", "rope_fast", "kv_write", "triton rope 32+8x128 write"):
            if name.startswith("triton") and importlib.util.find_spec("triton") is None:
                continue
            assert figures[f"{name}, {arch}/spills"] == 0 and figures[f"{name}, {arch}/occupancy"] >= 40


def test_the_ncu_command_names_every_kernel() -> None:
    command = kernel_cases.ncu_command()
    assert command.startswith("ncu --kernel-name 'regex:rope_naive|rope_shared|")
    assert command.endswith("-m phase2_rope.benchmark rope --no-record --rounds 1")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU here")
def test_every_kernel_is_right_on_this_gpu() -> None:
    assert gpu_checks.check("cuda")
