"""The turn on a CPU: a benchmark beside phase 0, `transformers` and a compiler, and what the gates measure of it.

Every layer of a step turns its own q and k with the same cosines and sines, so those are timed apart. The cache write
is left out: it is the same `index_put_` for all.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from module0_profiling import timing
from module0_profiling.bench import Options, figure, ratio
from module0_profiling.course.gates import Measured
from module0_profiling.course.needs import absent
from module0_profiling.course.parts import Use, resolve
from module0_profiling.results import Figure
from module0_profiling.timing import interleave
from phase0_prototype.config import RopeConfig
from phase0_prototype.cpu_memory import keep_freed_memory
from phase0_prototype.rotary import apply_rope
from phase2_rope import rope
from phase2_rope.rotary import Rotary

TOKENS = (1, 8, 32, 128, 1024)
HEADS, KV_HEADS, HEAD_DIM = 32, 4, 64  # TinyLlama-1.1B
POSITIONS = 2048
ROUNDS = 7  # at least
WORK = 1 << 13  # tokens turned between two looks at the clock
Turn = Callable[[], object]


def cpu(options: Options) -> tuple[Figure, ...]:
    """Time, GB/s over the minimum (q and k read and written once), and ratios, by dtype and tokens of a step.

    `copy` reads and writes the minimum and computes nothing: the floor.
    """
    keep_freed_memory()  # as the engine does: a tensor of fresh pages would be charged to whoever makes one
    figures: list[Figure] = []
    for dtype in (torch.bfloat16, torch.float32)[: options.size(2, 1)]:
        for tokens in TOKENS[: options.size(len(TOKENS), 1)]:
            figures += _row(options, dtype, tokens)
    return tuple(figures)


class Operations(TorchDispatchMode):
    """Counts the operations inside a `with` that move numbers; views cost nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Called for every operation that reaches a device."""
        self.count += not func.is_view
        return func(*args, **(kwargs or {}))


def operations(use: Use) -> float:
    """Operations in which q and k of one activation are turned."""
    part = resolve("phase2_rope", "rope", use)
    q, k, _ = _activation(torch.bfloat16, 8)
    cos, sin = _quarter_turns(torch.bfloat16, 8)
    with Operations() as counted:
        part.rotate(q, k, cos, sin)
    return float(counted.count)


def speedup(use: Use) -> Measured:
    """Time of the framework's turn over that of this one: 128 tokens in float32."""
    keep_freed_memory()
    cos, sin = _quarter_turns(torch.float32, 128)
    subjects: dict[str, Turn] = {}
    for name, chosen in (("the framework", use.choose("phase2", "framework")), ("this", use)):
        part, (q, k, _) = resolve("phase2_rope", "rope", chosen), _activation(torch.float32, 128)
        subjects[name] = _repeated(partial(part.rotate, q, k, cos, sin), 50)
    found = interleave(subjects, rounds=9)
    times = {name: f"{1e6 * t.median / 50:.0f} us" for name, t in found.items()}
    value = timing.ratio(found["the framework"], found["this"])
    return Measured(value, f"{times['this']} against {times['the framework']}", found["this"].spread)


def _row(options: Options, dtype: torch.dtype, tokens: int) -> list[Figure]:
    name = f"{str(dtype).removeprefix('torch.')}, {tokens} tokens"
    calls = options.size(max(4, min(1000, WORK // tokens)), 1)

    subjects = {**_turns(dtype, tokens, compiled=not options.dry), **_tables(dtype, tokens)}
    rounds = options.size(max(ROUNDS, options.rounds), 1)
    timings = interleave({n: _repeated(turn, calls) for n, turn in subjects.items()}, rounds=rounds)
    times = {n: [s / calls for s in found.seconds] for n, found in timings.items()}
    least = tokens * HEAD_DIM * (2 * (HEADS + KV_HEADS) + 1) * dtype.itemsize  # one row of cos and sin a token
    figures: list[Figure] = []
    for n, seconds in times.items():
        figures.append(figure(f"{name}/{n}, time", [1e6 * s for s in seconds], "us"))
        if not n.startswith("cos and sin"):
            figures.append(figure(f"{name}/{n}, bandwidth", [least / s / 1e9 for s in seconds], "GB/s"))
            if n not in ("phase 2", "copy"):
                figures.append(ratio(f"{name}/over {n}", seconds, times["phase 2"]))
    tables = times["cos and sin of transformers"], times["cos and sin"]
    return [*figures, ratio(f"{name}/cos and sin over transformers", *tables)]


def _turns(dtype: torch.dtype, tokens: int, *, compiled: bool) -> dict[str, Turn]:
    """The subjects, each with an activation of its own, for ours is changed in place."""
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    cos, sin = _quarter_turns(dtype, tokens)
    wide = [torch.cat((side, side), dim=-1).transpose(0, 1) for side in (cos, sin)]  # [1, T, D], as transformers has it

    def as_transformers() -> list[Tensor]:
        return [x[None].transpose(1, 2) for x in _activation(dtype, tokens)[:2]]  # [1, H, T, D]

    q, k, _ = _activation(dtype, tokens)
    theirs = as_transformers()
    both = torch.randn(tokens, HEADS + 2 * KV_HEADS, HEAD_DIM).to(dtype)[:, : HEADS + KV_HEADS]
    place = torch.empty(both.shape, dtype=dtype)
    turns: dict[str, Turn] = {
        "phase 2": lambda: rope.rotate(q, k, cos, sin),
        "phase 0": lambda: apply_rope(both, cos, sin),
        "transformers": lambda: apply_rotary_pos_emb(*theirs, *wide),
        "copy": lambda: place.copy_(both),
    }
    if compiled and not absent("compiler"):
        torch._dynamo.reset()  # a shape of its own each time, not the general one
        formula = torch.compile(apply_rotary_pos_emb, fullgraph=True, dynamic=False)
        for_compiled = as_transformers()
        turns["torch.compile"] = lambda: formula(*for_compiled, *wide)
    return turns


def _tables(dtype: torch.dtype, tokens: int) -> dict[str, Turn]:
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    ours = Rotary(RopeConfig("default", 10000.0), HEAD_DIM, POSITIONS, dtype, torch.device("cpu"))
    config = LlamaConfig(hidden_size=HEADS * HEAD_DIM, num_attention_heads=HEADS, max_position_embeddings=POSITIONS)
    theirs, like = LlamaRotaryEmbedding(config), torch.empty(0, dtype=dtype)
    positions = torch.randperm(POSITIONS)[:tokens]
    batched = positions[None]
    return {
        "cos and sin": lambda: ours(positions),
        "cos and sin of transformers": lambda: theirs(like, batched),
    }


def _activation(dtype: torch.dtype, tokens: int) -> tuple[Tensor, ...]:
    """q, k and v as views of one product's output."""
    qkv = torch.randn(tokens, HEADS + 2 * KV_HEADS, HEAD_DIM).to(dtype)
    return qkv.split((HEADS, KV_HEADS, KV_HEADS), dim=1)


def _quarter_turns(dtype: torch.dtype, tokens: int) -> tuple[Tensor, Tensor]:
    """cos and sin [T, 1, R/2]. What is turned in place thousands of times keeps its size by quarter turns; by rounded
    angles it would grow, or fade to denormals, which are slow."""
    angle = torch.randint(4, (tokens, 1, HEAD_DIM // 2)) * (torch.pi / 2)
    return angle.cos().round().to(dtype), angle.sin().round().to(dtype)


def _repeated(turn: Turn, calls: int) -> Turn:
    @torch.inference_mode()
    def run() -> None:
        for _ in range(calls):
            turn()

    return run
