"""What the gates of tasks 2.3 and 2.4 measure: work of latent attention, counted and timed, on a CPU."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from module0_profiling.course.gates import Measured
from module0_profiling.course.parts import Use, resolve
from module0_profiling.timing import interleave, ratio
from phase0_prototype.batch import Batch
from phase0_prototype.prefill_attention import causal_mask
from phase0_prototype.request import Request
from phase0_prototype.sampling_params import SamplingParams
from phase0_prototype.step import ScheduledRequest, Step
from phase2_rope import mla
from phase2_rope.deepseek import LatentSpec
from phase2_rope.expanded import expanded

V2_LITE = LatentSpec(num_heads=16, latent=512, rope=64, nope=128, value=128, scale=192**-0.5)
SMALL = LatentSpec(num_heads=4, latent=128, rope=16, nope=32, value=32, scale=48**-0.5)
PAGE = 16
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Work:
    """One call of a backend on a cache of random entries.

    Attributes:
        sequences: (tokens in the cache before, new tokens), decodes first.
    """

    spec: LatentSpec
    sequences: tuple[tuple[int, int], ...]
    dtype: torch.dtype = torch.float32
    device: torch.device = CPU

    def call(self, part: ModuleType) -> Callable[[], Tensor]:
        """A function that attends with the backend of this module."""
        spec, pages = self.spec, [-(-sum(s) // PAGE) for s in self.sequences]
        generator = torch.Generator().manual_seed(0)

        def noise(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator).to(self.device, self.dtype)

        order = torch.randperm(sum(pages), generator=generator).tolist()  # blocks in no order
        tables = [tuple(order.pop() for _ in range(count)) for count in pages]
        requests = [Request(str(i), [0] * sum(s), SamplingParams(), 0, (), 1) for i, s in enumerate(self.sequences)]
        step = Step(tuple(ScheduledRequest(r, *s) for r, s in zip(requests, self.sequences, strict=True)))
        backend: Any = part.PagedLatentAttention()
        plan = backend.plan(Batch.build(step, tables, PAGE, self.device), frozenset({None}), PAGE)
        tokens = sum(new for _, new in self.sequences)
        cache = noise(sum(pages), PAGE, 1, spec.entry)
        q, entry = noise(tokens, spec.num_heads, spec.query), noise(tokens, spec.entry)
        up = noise(spec.num_heads, spec.nope + spec.value, spec.latent) * spec.latent**-0.5

        def run() -> Tensor:
            with torch.inference_mode():
                made: Tensor = backend.run(spec, q, entry, up, cache, plan)
            return made

        return run


def flops(run: Callable[[], object]) -> float:
    """FLOPs of matrix products in a call, as torch counts them: of all pairs of query and key, masked or not."""
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        run()
    return float(counter.get_total_flops())


def decode_flops(use: Use) -> Measured:
    """FLOPs of four decodes behind 256 tokens each, over those that the absorbed form needs."""
    work = Work(SMALL, ((256, 1),) * 4)
    spec, counted = SMALL, flops(work.call(resolve("phase2_rope", "mla", use)))
    a_token = spec.num_heads * 2 * spec.latent * (spec.nope + spec.value)
    a_pair = spec.num_heads * 2 * (spec.entry + spec.latent)
    needed = 4 * (a_token + 257 * a_pair)
    return Measured(counted / needed, f"{counted / 1e6:.1f} MFLOP, {needed / 1e6:.1f} needed")


def lesser_form(use: Use) -> Measured:
    """FLOPs over those of the lesser form: worst of a short chunk behind a long text, a long one, and a prompt."""
    part, worst, said = resolve("phase2_rope", "mla", use), 0.0, ""
    for before, new in ((500, 8), (500, 20), (200, 100), (0, 128)):
        counted = flops(Work(SMALL, ((before, new),)).call(part))
        least = min(_form_flops(before, new))
        if counted / least > worst:
            worst, said = (
                counted / least,
                f"{new} tokens behind {before}: {counted / 1e6:.0f} MFLOP for {least / 1e6:.0f}",
            )
    return Measured(worst, said)


def decode_speedup(use: Use) -> Measured:
    """Time of the framework's attention over this one's: four decodes behind 1,024 tokens, V2-Lite's heads."""
    return _against_framework(use, ((1024, 1),) * 4)


def chunk_speedup(use: Use) -> Measured:
    """Time of the framework's attention over this one's: eight tokens behind 2,048, V2-Lite's heads."""
    return _against_framework(use, ((2048, 8),))


def _form_flops(before: int, new: int) -> list[float]:
    q, entries = torch.zeros(new, SMALL.num_heads, SMALL.query), torch.zeros(before + new, SMALL.entry)
    up = torch.zeros(SMALL.num_heads, SMALL.nope + SMALL.value, SMALL.latent)
    mask = causal_mask(new, before + new, None, CPU)
    return [flops(lambda form=form: form(SMALL, q, entries, up, mask)) for form in (mla.absorbed, expanded)]  # type: ignore[misc]


def _against_framework(use: Use, sequences: Sequence[tuple[int, int]]) -> Measured:
    work = Work(V2_LITE, tuple(sequences))
    parts = {"framework": use.choose("phase2", "framework"), "this": use}
    calls = {name: work.call(resolve("phase2_rope", "mla", chosen)) for name, chosen in parts.items()}
    timings = interleave(calls, rounds=5, device="cpu")
    slow, fast = timings["framework"], timings["this"]
    detail = f"{slow.median * 1e3:.1f} ms against {fast.median * 1e3:.2f} ms"
    return Measured(ratio(slow, fast), detail, max(slow.spread, fast.spread))
