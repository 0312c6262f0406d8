"""Latents in FP8, and the backend that attends to latents with the kernel: by itself, and in the whole engine.

The kernel runs in Triton's interpreter, in a process of its own; it says what torch's backend says of the same steps.
"""

from __future__ import annotations

import importlib.util
import itertools
from typing import Any

import pytest
import torch

from phase0_prototype.tests.checkpoints import SIZES, save
from phase0_prototype.tests.interpreter import interpreted
from phase2_rope.deepseek import LatentSpec
from phase2_rope.tests.deepseek_checkpoints import ATTENTION
from phase2_rope.tests.test_mla import definition, inputs
from phase3_paged_attention.latent_format import LARGEST, PackedLatents
from phase3_paged_attention.packed_latents import PackedLatentTorch, Unpacking

V3 = PackedLatents(512, 64)

# The format


def test_an_entry_of_deepseek_v3_has_656_bytes_where_flashmla_reads_them() -> None:
    latent, key = torch.zeros(1, 512), torch.zeros(1, 64)
    latent[0, 130], latent[0, 511], key[0, 0] = 7.0, -3.0, 1.5
    entry = V3.pack(latent, key)[0, 0]
    assert entry.shape == (656,)
    assert entry[:512].view(torch.float8_e4m3fn)[[130, 511]].float().tolist() == [LARGEST, -LARGEST]
    assert entry[512:528].view(torch.float32).tolist() == pytest.approx([1, 7 / LARGEST, 1, 3 / LARGEST])
    assert entry[528:].view(torch.bfloat16).tolist() == [1.5] + [0] * 63


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_numbers_come_back_within_half_a_step_of_e4m3(dtype: torch.dtype) -> None:
    how = PackedLatents(384, 16, dtype)
    generator = torch.Generator().manual_seed(1)
    spread = 10.0 ** (torch.randint(-4, 4, (50, 384), generator=generator))
    latent = (torch.randn(50, 384, generator=generator) * spread).to(dtype)
    key = torch.randn(50, 16, generator=generator).to(dtype)
    back = how.unpack(how.pack(latent, key)[:, 0])
    assert back.dtype == dtype and back.shape == (50, 400)
    exact = latent.double()
    largest = exact.unflatten(1, (3, 128)).abs().amax(2).repeat_interleave(128, dim=1)
    # half a step: 2^-4 of a normal number, 2^-10 of the scale below 2^-6 of it; then the model's own rounding
    bound = torch.maximum(exact.abs() * 2**-4, largest / LARGEST * 2**-10) * (1 + 2**-7) + exact.abs() * 2**-8
    assert ((back[:, :384].double() - exact).abs() <= bound).all()
    assert torch.equal(back[:, 384:], key if dtype.itemsize == 2 else key.bfloat16().float())


@pytest.mark.parametrize("size", [0.0, 1e-45, 1e-30, 1e38])
def test_groups_of_zeros_and_of_any_size_are_numbers(size: float) -> None:
    latent = torch.full((2, 512), size)
    latent[:, 128:] = 1.0  # a group of another size beside it
    back = V3.unpack(V3.pack(latent, torch.zeros(2, 64))[:, 0]).float()
    assert back[:, :128] == pytest.approx(latent[:, :128], rel=2**-4, abs=1e-37)
    assert (back[:, 128:512] == 1).all()


@pytest.mark.parametrize(("latent", "rope"), [(500, 64), (512, 63)])
def test_what_can_not_be_packed_is_refused(latent: int, rope: int) -> None:
    with pytest.raises(ValueError, match=f"{latent} \\+ {rope}"):
        PackedLatents(latent, rope)


# Torch's path

SPEC = LatentSpec(num_heads=3, latent=128, rope=8, nope=10, value=7, scale=0.3)


@pytest.mark.parametrize("blocks", [2, torch.tensor([3, 0, 2])])
def test_a_gather_unpacks_what_it_reads(blocks: Any) -> None:
    from phase1_memory.attention import tokens_of

    how = PackedLatents(128, 8, torch.float32)
    entries = torch.randn(5, 4, 1, 136)
    cache = how.pack(entries[..., 0, :128], entries[..., 0, 128:])
    whole = how.unpack(cache)
    assert Unpacking(cache, how).shape == whole.shape
    assert torch.equal(tokens_of(Unpacking(cache, how), blocks, 9), tokens_of(whole, blocks, 9))


def test_torchs_backend_attends_to_what_a_packed_cache_says() -> None:
    from phase0_prototype.batch import Batch
    from phase0_prototype.request import Request
    from phase0_prototype.sampling_params import SamplingParams
    from phase0_prototype.step import ScheduledRequest, Step

    how, page, lengths = PackedLatents(128, 8, torch.float32), 4, [(5, 1), (9, 1), (6, 3), (0, 5)]
    cases = [inputs(SPEC, new, old + new, seed) for seed, (old, new) in enumerate(lengths)]
    up, cache = cases[0][2], how.pack(torch.full((20, page, 128), 1e4), torch.full((20, page, 8), -1e4))
    free, tables, exact, own = iter(torch.randperm(20).tolist()), [], [], []
    for (q, entries, _), (old, new) in zip(cases, lengths, strict=True):
        tables.append(tuple(itertools.islice(free, -(-(old + new) // page))))
        packed = how.pack(entries[:, :128], entries[:, 128:])
        for position, entry in enumerate(packed):
            cache[tables[-1][position // page], position % page] = entry
        exact.append(definition(SPEC, q, how.unpack(packed[:, 0]), up))
        own.append(how.unpack(packed[-new:, 0]))
    requests = [Request(str(i), [0] * sum(s), SamplingParams(), 0, (), 1) for i, s in enumerate(lengths)]
    step = Step(tuple(ScheduledRequest(r, *s) for r, s in zip(requests, lengths, strict=True)))
    batch = Batch.build(step, tables, page, torch.device("cpu"))
    q = torch.cat([case[0] for case in cases])
    for backend in (PackedLatentTorch(how), PackedLatentTorch(how).steady(16)):
        plan = backend.plan(batch, frozenset({None}), page)
        out = backend.run(SPEC, q, torch.cat(own), up, cache, plan)
        assert (out - torch.cat(exact)).abs().max() < 1e-5


# The kernel's backend

SCRIPT = """
import itertools, json, random, sys
from dataclasses import replace
from types import SimpleNamespace
import torch
torch.set_num_threads(1)
from module0_profiling.course.parts import Use, resolve
from phase0_prototype.attention import AttentionSpec
from phase0_prototype.batch import Batch
from phase0_prototype.step import ScheduledRequest, Step
from phase0_prototype.kv_spec import KVPart
from phase0_prototype.request import Request
from phase0_prototype.sampling_params import SamplingParams
from phase1_memory import engine as paged
from phase2_rope import mla as phase2, rope
from phase2_rope.deepseek import ARCHITECTURES, LatentSpec
from phase2_rope.layers import RopeLayers
from phase2_rope.llm import LLM
from phase2_rope.tests.test_mla import definition, inputs
from phase3_paged_attention.latent_attention import TritonLatentAttention
from phase3_paged_attention.latent_format import PackedLatents
from phase3_paged_attention.packed_latents import PackedLatentAttention, PackedLatentTorch
CPU, PAGE = torch.device("cpu"), 16
use = Use.parse(sys.argv[1])
mla, work = (resolve("phase3_paged_attention", part, use) for part in ("kernels.mla", "work"))

def made(spec, packed=False, dtype=torch.float32):
    asked = AttentionSpec(spec.num_heads, 1, spec.query, spec.scale, dtype=dtype,
                          kv_cache_dtype="fp8_e4m3" if packed else "auto")
    return TritonLatentAttention(asked, CPU, mla, work, spec)

def batch_of(lengths, pages, tables):
    requests = [Request(str(i), [0] * sum(s), SamplingParams(), 0, (), 1) for i, s in enumerate(lengths)]
    step = Step(tuple(ScheduledRequest(r, *s) for r, s in zip(requests, lengths)))
    return Batch.build(step, tables, PAGE, CPU)

def step(backend, spec, lengths, visible=None, through_tensors=False):
    # error of a step against the definition, and how many of its sequences were expanded
    how = backend.packed
    pages = [-(-sum(s) // PAGE) for s in lengths]
    places = list(range(2, 2 + sum(pages)))
    random.Random(3).shuffle(places)
    starts = [0, *itertools.accumulate(pages)]
    tables = [tuple(places[a:b]) for a, b in itertools.pairwise(starts)]
    cases = [inputs(spec, new, old + new, i) for i, (old, new) in enumerate(lengths)]
    shape, up, exact, own = (2 + sum(pages), PAGE, 1), cases[0][2], [], []
    if how:
        cache = torch.full((*shape, how.entry_bytes), 255, dtype=torch.uint8)
    else:
        cache = torch.full((*shape, spec.entry), torch.nan)
    for (q, entries, _), (old, new), table in zip(cases, lengths, tables):
        stored = entries.unsqueeze(1)
        if how:
            stored = how.pack(entries[:, : spec.latent], entries[:, spec.latent :])
            entries = how.unpack(stored[:, 0])
        for position, entry in enumerate(stored):
            cache[table[position // PAGE], position % PAGE] = entry
        exact.append(definition(spec, q, entries, up))
        own.append(entries[-new:])
    batch = batch_of(lengths, pages, tables)
    plan = backend.plan(batch, frozenset({None}), PAGE, visible)
    if through_tensors:
        plan = plan.with_tensors(tuple(t.clone() for t in plan.tensors))
    out = backend.run(spec, torch.cat([c[0] for c in cases]), torch.cat(own), up, cache, plan)
    error = (out - torch.cat(exact)).abs().max().nan_to_num(nan=torch.inf).item()
    return error, len(plan.sequences), plan.shape

SMALL = LatentSpec(num_heads=3, latent=20, rope=6, nope=10, value=7, scale=0.3)
WIDE = LatentSpec(num_heads=2, latent=128, rope=8, nope=10, value=7, scale=0.3)
assert phase2.absorbing_is_less(SMALL, 3, 60) and not phase2.absorbing_is_less(SMALL, 9, 9)
mixed = [(40, 1), (5, 1), (57, 3), (0, 9), (30, 2), (20, 30), (0, 1)]
found = {
    "all absorbed": step(made(SMALL), SMALL, [(40, 1), (0, 1), (57, 3)]),
    "both forms": step(made(SMALL), SMALL, mixed),
    "all expanded": step(made(SMALL), SMALL, [(0, 9), (20, 30)]),
    "packed": step(made(WIDE, packed=True), WIDE, mixed),
    "fixed": step(made(SMALL).steady(256), SMALL, [(40, 1), (200, 1)], through_tensors=True),
    "fixed, other lengths": step(made(SMALL).steady(256), SMALL, [(3, 1), (90, 1)], through_tensors=True),
}
trees = [(20, 4), (0, 9), (9, 1)]  # bits of a chain: what causality says anyway
chain = torch.tensor([(2 << i) - 1 for _, new in trees for i in range(new)])
found["chains as trees"] = step(made(SMALL), SMALL, trees, chain)
lonely = torch.tensor([1 << i for _, new in trees for i in range(new)])
found["lonely tokens"] = step(made(SMALL), SMALL, trees, lonely)

class Packed(RopeLayers):
    def how(self):
        return PackedLatents(self.config.latent.latent, self.config.latent.rope, self.dtype)
    def kv_spec(self):
        spec = super().kv_spec()
        return replace(spec, kept=(KVPart((1, self.how().entry_bytes), torch.uint8),))
    def attention(self, name, layer):
        return PackedLatentAttention(super().attention(name, layer), self.how())

class Engine(LLM):  # phase 2's, with another backend
    kind, packed = "torch", False
    def _build(self, config, use):
        def layers(model, dtype, *rest):
            how = PackedLatents(model.latent.latent, model.latent.rope, dtype) if self.packed else None
            backend = made(model.latent, self.packed, dtype) if self.kind == "triton" else None
            backend = backend or (PackedLatentTorch(how) if how else phase2.PagedLatentAttention())
            chosen = SimpleNamespace(PagedLatentAttention=lambda: backend)
            return (Packed if self.packed else RopeLayers)(model, dtype, *rest, rope=rope, mla=chosen)
        return paged.build(config, Use(), layers=layers, architectures=ARCHITECTURES)

def said(path, kind, packed=False, **settings):
    cls = type("One", (Engine,), {"kind": kind, "packed": packed})
    settings = {"max_num_batched_tokens": 16, "max_model_len": 64, **settings}
    llm = cls(path, dtype="float32", device="cpu", runner="eager", **settings)
    params = SamplingParams(temperature=0, max_tokens=4)
    prompts = [list(range(5, 25)), [7], list(range(40, 43))]
    return [o.outputs[0].token_ids for o in llm.generate(prompts, params, progress=False)]

runs = {}
plain, group = sys.argv[2:4]
squeezed = {"num_blocks": 5, "block_size": 16, "watermark": 0}
runs["plain"] = [said(plain, "torch"), said(plain, "triton"), said(plain, "triton", **squeezed)]
runs["packed"] = [said(group, "torch", True), said(group, "torch", True, max_num_batched_tokens=7),
                  said(group, "torch", True, **squeezed), said(group, "triton", True)]
print(json.dumps({"found": found, "runs": runs}))
"""
needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed (it is Linux only)"
)


@pytest.fixture(scope="module")
def said(use, deepseek, tmp_path_factory):
    sizes = {**SIZES, **ATTENTION, "kv_lora_rank": 128}
    grouped = save("DeepseekV3", sizes, tmp_path_factory.mktemp("grouped"), seed=11, attention="eager")
    return interpreted(SCRIPT, str(use), str(deepseek("v3").path), str(grouped.path))


@needs_triton
def test_any_step_is_the_definition_whatever_its_forms(said) -> None:
    found = {name: error for name, (error, _, _) in said["found"].items() if name != "lonely tokens"}
    assert len(found) == 7
    assert {name: error for name, error in found.items() if not error < 1e-5} == {}


@needs_triton
def test_long_prompts_are_expanded_and_decodes_short_chunks_and_trees_are_the_kernels(said) -> None:
    expanded = {name: count for name, (_, count, _) in said["found"].items()}
    assert expanded == {
        "all absorbed": 0, "both forms": 2, "all expanded": 2, "packed": 2,
        "fixed": 0, "fixed, other lengths": 0, "chains as trees": 0, "lonely tokens": 0,
    }  # fmt: skip


@needs_triton
def test_tokens_that_may_not_see_each_other_change_the_result(said) -> None:
    assert said["found"]["lonely tokens"][0] > 1e-2


@needs_triton
def test_steps_of_one_size_share_a_captured_step_whatever_their_lengths(said) -> None:
    shapes = {name: shape for name, (_, _, shape) in said["found"].items()}
    assert shapes["fixed"] == shapes["fixed, other lengths"] is not None
    assert shapes["both forms"] is None


@needs_triton
def test_the_engine_says_the_same_with_the_kernel_and_under_pressure(said) -> None:
    first, *others = said["runs"]["plain"]
    assert [len(tokens) for tokens in first] == [4, 4, 4]
    assert others == [first] * len(others)


@needs_triton
def test_a_packed_cache_says_the_same_in_chunks_under_pressure_and_by_the_kernel(said) -> None:
    first, *others = said["runs"]["packed"]
    assert len(others) == 3
    assert others == [first] * 3


@needs_triton
def test_without_a_gpu_or_the_interpreter_the_backend_says_so() -> None:
    from phase0_prototype.attention import AttentionSpec
    from phase3_paged_attention.kernels import mla
    from phase3_paged_attention.latent_attention import TritonLatentAttention

    spec = AttentionSpec(2, 1, 24, 0.2, dtype=torch.float16)
    backend = TritonLatentAttention(spec, torch.device("cpu"), mla, mla, SPEC)
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("TRITON_INTERPRET", raising=False)
        (reason,) = backend.why_not(spec, torch.device("cpu"))
    assert "need a GPU" in reason
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        assert backend.why_not(spec, torch.device("cpu")) == []
