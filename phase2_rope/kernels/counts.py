"""Counts of a `rope.cu` that no machine changes: what it computes, and what it moves, run on the CPU.

Bytes are counted as the GPU moves them, in sectors of 32. `predicted_bytes` says the same from first principles.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from module0_profiling.cuda_on_cpu import Traffic, emulator
from phase0_prototype.kernels import ladder
from phase0_prototype.kernels.emulated import pointer
from phase0_prototype.kernels.operation import Call
from phase2_rope.kernels import rope

SECTOR = 32
PAGE = 4
BLOCKS = 6
WRITES = ("rope_fast", "kv_write")  # versions that write into the cache
SLACK = 1e-6  # float32 arithmetic on values of up to about 5


@dataclass(frozen=True)
class Case:
    """One launch: sizes, layout and type; `in_place` and `padding` (a last token that is none) where they matter."""

    tokens: int = 8
    q_heads: int = 8
    k_heads: int = 2
    dim: int = 128
    rotated: int = 128
    interleaved: bool = False
    dtype: torch.dtype = torch.bfloat16
    in_place: bool = True
    padding: bool = False

    @property
    def heads(self) -> int:
        """Heads that turn."""
        return self.q_heads + self.k_heads


@dataclass(frozen=True)
class Emulated:
    """What a launch wrote, (got, exact in float64) for each tensor, and what it did to memory."""

    results: tuple[tuple[Tensor, Tensor], ...]
    traffic: Traffic

    @property
    def moved(self) -> int:
        """Bytes of global memory, in whole sectors."""
        return SECTOR * (self.traffic.global_loads.transactions + self.traffic.global_stores.transactions)

    @property
    def requests(self) -> int:
        """Global memory instructions of whole warps."""
        return self.traffic.global_loads.requests + self.traffic.global_stores.requests


CASES = (  # of the gates for errors: every type and pairing, R < D, sizes without vectors, ragged blocks, few heads
    Case(5, 4, 2, 64, 64, dtype=torch.float32),
    Case(5, 4, 2, 64, 64, interleaved=True, padding=True),
    Case(9, 3, 1, 128, 128, dtype=torch.float16, in_place=False),
    Case(3, 2, 2, 80, 48, in_place=False, padding=True),
    Case(2, 5, 1, 20, 10, interleaved=True, dtype=torch.float32),
    Case(3, 2, 1, 20, 16),
    Case(6, 5, 2, 96, 96),
    Case(1, 4, 1, 64, 32, dtype=torch.float16),
)


def cos_sin_table(rows: int, rotated: int) -> Tensor:
    """A table of a plain RoPE, theta 10000: [rows, R] float32."""
    inv_freq = 10000.0 ** (-torch.arange(0, rotated, 2).float() / rotated)
    angles = torch.outer(torch.arange(rows).float(), inv_freq)
    return torch.cat((angles.cos(), angles.sin()), dim=1)


@dataclass(frozen=True)
class Inputs:
    """Random tensors of a case: q, k and v are slices of one activation."""

    activation: Tensor
    cos_sin: Tensor
    positions: Tensor
    slots: rope.Slots
    keys: Tensor
    values: Tensor
    case: Case

    @classmethod
    def of(cls, case: Case, device: str = "cpu") -> Inputs:
        """The same for the same case. Slots are distinct and in no order."""
        generator = torch.Generator().manual_seed(case.tokens * 1000 + case.dim)
        heads, rows = case.q_heads + 2 * case.k_heads, 64
        blocks = max(BLOCKS, -(-case.tokens // PAGE))
        x = torch.randn(case.tokens, heads, case.dim, generator=generator).to(case.dtype)
        slot = torch.randperm(blocks * PAGE, generator=generator)[: case.tokens]
        block, place = slot // PAGE, slot % PAGE
        if case.padding:
            block[-1] = -1
        keys = torch.zeros(blocks, PAGE, case.k_heads, case.dim, dtype=case.dtype)
        positions = torch.randint(0, rows, (case.tokens,), generator=generator)
        table = cos_sin_table(rows, case.rotated)
        tensors = [t.to(device) for t in (x, table, positions, block, place, keys)]
        x, table, positions, block, place, keys = tensors
        return cls(x, table, positions, (block, place), keys, keys.clone(), case)

    @property
    def qkv(self) -> tuple[Tensor, Tensor, Tensor]:
        """Slices of the activation."""
        q, k, v = self.activation.split((self.case.q_heads, self.case.k_heads, self.case.k_heads), dim=1)
        return q, k, v

    def double(self) -> Inputs:
        """The same numbers in float64, for the oracle."""
        wide = {name: getattr(self, name).double() for name in ("activation", "cos_sin", "keys", "values")}
        return replace(self, **wide)


def prepared(version: str, inputs: Inputs) -> tuple[Call, tuple[Tensor, ...]]:
    """(launch, tensors that it writes) of a version for these inputs."""
    q, k, v = inputs.qkv
    table, positions, interleaved = inputs.cos_sin, inputs.positions, inputs.case.interleaved
    if version in WRITES:
        where = (inputs.slots, inputs.keys, inputs.values)
        launch = rope.call_and_write(q, k, v, table, positions, *where, interleaved=interleaved)
        return launch, (inputs.keys, inputs.values) if version == "kv_write" else (q, inputs.keys, inputs.values)
    out = (q, k) if inputs.case.in_place else tuple(torch.full_like(x.contiguous(), float("nan")) for x in (q, k))
    launch = rope.call(q, k, table, positions, interleaved=interleaved, out_q=out[0], out_k=out[1])
    return launch, out


def exact(version: str, inputs: Inputs) -> tuple[Tensor, ...]:
    """What `prepared` should write, in float64."""
    wide = inputs.double()
    q, k, v = wide.qkv
    if version == "kv_write":
        block, place = (slot[wide.slots[0] >= 0] for slot in wide.slots)
        wide.keys[block, place], wide.values[block, place] = k[wide.slots[0] >= 0], v[wide.slots[0] >= 0]
        return wide.keys, wide.values
    if version in WRITES:
        rope.rotate_and_write(
            q, k, v, wide.cos_sin, wide.positions, wide.slots, wide.keys, wide.values,
            interleaved=wide.case.interleaved,
        )  # fmt: skip
        return q, wide.keys, wide.values
    rope.rotate(q, k, wide.cos_sin, wide.positions, interleaved=wide.case.interleaved)
    return q, k


def emulate(source: Path, version: str, case: Case, *, many_tokens: bool = False) -> Emulated:
    """Run a version on the CPU; with `many_tokens` in the grid that it has where tokens alone fill a GPU."""
    inputs = Inputs.of(case)
    expected = exact(version, inputs)
    call, written = prepared(version, inputs)
    found = ladder.find(source, version)
    args = [pointer(arg) if isinstance(arg, Tensor) else arg for arg in call.args]
    grid = found.grid(1 if many_tokens else call.rows, call.cols)
    traffic = emulator(source, call.defines).launch(version, grid, found.block, args)
    return Emulated(tuple(zip(written, expected, strict=True)), traffic)


def error(results: tuple[tuple[Tensor, Tensor], ...]) -> float:
    """Largest error over what float32 arithmetic and one rounding to the type allow; inf for NaN: right is <= 1."""
    worst = 0.0
    for got, expected in results:
        allowed = torch.finfo(got.dtype).eps / 2 * expected.abs() + SLACK
        off = ((got.double() - expected).abs() / allowed).nan_to_num(nan=float("inf"), posinf=float("inf"))
        worst = max(worst, float(off.max()) if off.numel() else 0.0)
    return worst


def worst_error(source: Path, version: str) -> float:
    """`error` over all cases; inf for an access out of bounds or not aligned."""
    worst = 0.0
    for case in CASES:
        run = emulate(source, version, case)
        broken = run.traffic.out_of_bounds or run.traffic.misaligned
        worst = max(worst, float("inf") if broken else error(run.results))
    return worst


def minimum_bytes(version: str, case: Case) -> int:
    """Bytes that must move: q and k in and out, a row of cos and sin, positions; and what the cache needs."""
    element = case.dtype.itemsize
    kv, slots = 2 * case.k_heads * case.dim * element, 16
    turn = 2 * case.heads * case.rotated * element + 4 * case.rotated + 8
    rest = 2 * case.k_heads * (case.dim - case.rotated) * element
    each = {"kv_write": 2 * kv + slots, "rope_fast": turn + rest + kv + slots}.get(version, turn)
    return case.tokens * each


def overhead(source: Path, version: str, case: Case) -> float:
    """Bytes moved over the minimum, for many tokens."""
    return emulate(source, version, case, many_tokens=True).moved / minimum_bytes(version, case)


def predicted_bytes(version: str, case: Case) -> int:
    """Bytes in whole sectors that a version moves for many tokens, where R = D and half a head fills warps.

    Data is used to the last byte, but interleaved scalars fetch each sector twice: once for x, once for y. A lane of
    the last versions needs 8 (4) neighbouring cos: two accesses to one sector; interleaved, to two sectors.
    """
    element, row = case.dtype.itemsize, 4 * case.rotated
    data = 2 * case.heads * case.rotated * element
    scalar = data * (2 if case.interleaved else 1)
    v = 2 * case.k_heads * case.dim * element
    warps, table = 8, row * (1 if case.interleaved else 2)
    each = {
        "rope_naive": scalar + case.heads * row + warps * SECTOR,  # every warp asks for the position
        "rope_shared": scalar + row + warps * SECTOR,
        "rope_vector": data + row + warps * SECTOR,
        "rope_tokens": data + table + SECTOR,
        "rope_fast": data + v + table + 3 * SECTOR,  # position, block, place
        "kv_write": 2 * v + 2 * SECTOR,
    }
    return case.tokens * each[version]


def requests_per_token(source: Path, version: str, case: Case) -> float:
    """Global memory instructions of whole warps for a token, for many tokens."""
    return emulate(source, version, case, many_tokens=True).requests / case.tokens


def threads_per_vector(source: Path, version: str, case: Case) -> float:
    """Threads of the grid for each pair of 16-byte vectors that there is to turn: 1 is a full block."""
    found = ladder.find(source, version)
    x, y = found.grid(1, case.tokens)
    vectors = case.tokens * case.heads * case.rotated * case.dtype.itemsize // 32
    return x * y * found.block[0] * found.block[1] / vectors


LAUNCHES = {"rope_tokens, kv_write": 2, "rope_fast": 1}
