"""Decode attention on a CPU: a benchmark beside torch's attention on caches without pages, and what gates measure.

The yardstick is `scaled_dot_product_attention` on contiguous tensors of one length: what it would cost if there were no
pages. Layers take turns, as in a step, so that none finds its keys and values in the CPU's cache. A plan is made once a
step and serves all layers, so it is timed apart.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention as sdpa
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from module0_profiling.bench import Options, figure, ratio
from module0_profiling.course.gates import Measured
from module0_profiling.course.parts import Use, resolve
from module0_profiling.results import Figure
from module0_profiling.timing import interleave
from phase0_prototype.attention import AttentionSpec
from phase0_prototype.batch import Batch
from phase0_prototype.cpu_memory import keep_freed_memory
from phase0_prototype.request import Request
from phase0_prototype.sampling_params import SamplingParams
from phase0_prototype.step import ScheduledRequest, Step

ROOM = __name__.partition(".")[0]
HEADS, KV_HEADS, HEAD_DIM, PAGE = 32, 4, 64, 16  # TinyLlama-1.1B
SHAPES = ((1, 128), (1, 1024), (1, 4096), (8, 128), (8, 1024), (8, 4096), (32, 128), (32, 1024), (32, 4096))
LAYERS, COLD = 22, 64 << 20  # as many layers as the model has, or as hold so many bytes of keys and values
CPU = torch.device("cpu")
Attend = Callable[[], object]


@dataclass(frozen=True)
class Decode:
    """A step of decodes through some layers: their caches with pages, the same without, and the queries of all.

    Attributes:
        layers: keys and values with pages.
        plain: the same of one length, [B, N, Hkv, D]; empty where lengths differ.
    """

    spec: AttentionSpec
    q: Tensor
    batch: Batch
    layers: tuple[tuple[Tensor, Tensor], ...]
    plain: tuple[tuple[Tensor, Tensor], ...]

    @property
    def needed(self) -> int:
        """Bytes of the keys and values of all tokens in a layer."""
        return sum(self.batch.kv_lens) * 2 * KV_HEADS * HEAD_DIM * self.q.element_size()

    def paged(self, backend: Any) -> Attend:
        """The step through a backend, plan made."""
        plan = backend.plan(self.batch, frozenset({None}), PAGE)
        new = self.q[:, :KV_HEADS]  # decodes are read from the cache

        @torch.inference_mode()
        def attend() -> None:
            for kv in self.layers:
                backend.run(self.spec, self.q, new, new, kv, plan)

        return attend

    @torch.inference_mode()
    def contiguous(self) -> None:
        """The yardstick."""
        q = self.q.unflatten(1, (KV_HEADS, -1))  # [B, Hkv, G, D]
        for key, value in self.plain:
            sdpa(q, key.transpose(1, 2), value.transpose(1, 2), scale=self.spec.scale)


def decodes(lengths: Sequence[int], dtype: torch.dtype, *, permuted: bool = True) -> Decode:
    """One new token of each sequence; pages in no order, or neighbours."""
    spec = AttentionSpec(HEADS, KV_HEADS, HEAD_DIM, HEAD_DIM**-0.5)
    pages = [-(-length // PAGE) for length in lengths]
    places = list(range(sum(pages)))
    if permuted:
        random.Random(0).shuffle(places)
    left = iter(places)
    tables = [tuple(next(left) for _ in range(count)) for count in pages]
    steps = []
    for i, length in enumerate(lengths):
        request = Request(str(i), [1] * length, SamplingParams(), 0, (), 1)
        steps.append(ScheduledRequest(request, length - 1, 1))
    batch = Batch.build(Step(tuple(steps)), tables, PAGE, CPU)
    first = torch.randn(2, sum(pages), PAGE, KV_HEADS, HEAD_DIM).to(dtype)
    count = max(1, min(LAYERS, COLD // first.nbytes))
    stored = [first] + [first.clone() for _ in range(count - 1)]
    plain = []
    if len(set(lengths)) == 1:
        plain = [side[:, batch.block_tables].flatten(2, 3)[:, :, : lengths[0]].contiguous() for side in stored]
    q = torch.randn(len(lengths), HEADS, HEAD_DIM).to(dtype)
    return Decode(spec, q, batch, tuple((x[0], x[1]) for x in stored), tuple((x[0], x[1]) for x in plain))


def cpu_decode(options: Options) -> tuple[Figure, ...]:
    """Times of one layer, GB/s of keys and values, and ratios, by dtype, sequences and tokens of each.

    `copy` reads what attention must, page by page in order, and writes it to one place.
    """
    keep_freed_memory()  # as the engine does: a tensor of fresh pages would be charged to whoever makes one
    use = Use.parse("phase3=solution")
    figures: list[Figure] = []
    for dtype in (torch.bfloat16, torch.float32)[: options.size(2, 1)]:
        for sequences, length in SHAPES[: options.size(len(SHAPES), 1)]:
            figures += _row(options, use, f"{sequences} x {length}", [length] * sequences, dtype)
        figures += _row(options, use, "ragged", ragged(options.size(32, 2)), dtype)
    return tuple(figures)


def ragged(sequences: int) -> list[int]:
    """Lengths from 17 to 4096, short ones more often, as in traffic."""
    dice = random.Random(1)
    return [4096, 17, *(int(17 * (4096 / 17) ** dice.random()) for _ in range(sequences - 2))]


def decode_over_contiguous(use: Use) -> Measured:
    """Time over that of the yardstick: 32 sequences of 1,024 tokens in permuted pages, bfloat16.

    It is the processor time of one thread, which waits for no other: on a busy machine, threads that meet after every
    operation measure the neighbours.
    """
    keep_freed_memory()
    step = decodes([1024] * 32, torch.bfloat16)
    subjects: dict[str, Attend] = {"pages": step.paged(_backend(use)), "contiguous": step.contiguous}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        found = interleave(subjects, rounds=21, warmup=2, clock=_processor_time)
    finally:
        torch.set_num_threads(threads)
    ratios = [a / b for a, b in zip(found["pages"].seconds, found["contiguous"].seconds, strict=True)]
    times = {name: f"{1e3 * t.median / len(step.layers):.1f} ms" for name, t in found.items()}
    detail = f"{times['pages']} against {times['contiguous']} without pages"
    return Measured(statistics.median(ratios), detail, found["pages"].spread)


def padding_ratio(use: Use) -> Measured:
    """Bytes that are read of the cache over those that the decodes of a ragged batch need."""
    step = decodes(ragged(32), torch.bfloat16)
    run = step.paged(_backend(use))
    with CacheReads([side for kv in step.layers for side in kv]) as reads:
        run()
    read = reads.bytes / len(step.layers)
    return Measured(read / step.needed, f"{read / 2**20:.1f} MiB against {step.needed / 2**20:.1f} MiB")


class CacheReads(TorchDispatchMode):
    """Counts the bytes that operations inside a `with` read of a layer's cache: of an index what it picks, of any
    other operation all of the view that it is given."""

    def __init__(self, kv: Sequence[Tensor]) -> None:
        super().__init__()
        self.kept = {side.untyped_storage().data_ptr() for side in kv}
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Called for every operation that reaches a device."""
        out = func(*args, **(kwargs or {}))
        if not func.is_view:
            picks = func.overloadpacket in (torch.ops.aten.index, torch.ops.aten.index_select)
            for x in tree_leaves((args, kwargs)):
                if isinstance(x, Tensor) and x.untyped_storage().data_ptr() in self.kept:
                    self.bytes += out.nbytes if picks else x.nbytes
        return out


def _row(options: Options, use: Use, name: str, lengths: list[int], dtype: torch.dtype) -> list[Figure]:
    row = f"{str(dtype).removeprefix('torch.')}, {name}"
    step = decodes(lengths, dtype)
    backend = _backend(use)
    place = torch.empty_like(step.layers[0][0])
    subjects: dict[str, Attend] = {
        "framework": step.paged(_backend(use.choose("phase3", "framework"))),
        "ours": step.paged(backend),
        "ours, neighbours": decodes(lengths, dtype, permuted=False).paged(backend),
        "copy": lambda: [place.copy_(side) for kv in step.layers for side in kv],
        "plan": lambda: [backend.plan(step.batch, frozenset({None}), PAGE) for _ in step.layers],
    }
    if step.plain:
        subjects["contiguous"] = step.contiguous
    timings = interleave(subjects, rounds=options.size(max(9, options.rounds), 1))
    times = {n: [s / len(step.layers) for s in found.seconds] for n, found in timings.items()}
    figures: list[Figure] = []
    for n, seconds in times.items():
        figures.append(figure(f"{row}/{n}, time", [1e3 * s for s in seconds], "ms"))
        if n != "plan":
            figures.append(figure(f"{row}/{n}, bandwidth", [step.needed / s / 1e9 for s in seconds], "GB/s"))
    figures.append(ratio(f"{row}/over the framework", times["framework"], times["ours"]))
    figures.append(ratio(f"{row}/share of a copy's bandwidth", times["copy"], times["ours"]))
    if "contiguous" in times:
        for n in ("ours", "ours, neighbours", "framework"):
            figures.append(ratio(f"{row}/{n}, time over contiguous", times[n], times["contiguous"]))
    return figures


def _backend(use: Use) -> Any:
    return resolve(ROOM, "torch_attention", use).PagedTorchAttention()


def _processor_time(run: Attend) -> float:
    before = time.thread_time()
    run()
    return time.thread_time() - before
