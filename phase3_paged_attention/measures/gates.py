"""The measures of the gates that need no GPU: each takes a `Use` and returns the number that is graded.

Kernels are asked in Triton's interpreter (kernel_gates.py, write_gates.py, engine_gates.py) or compiled (launched.py),
in a process of their own; one process answers all gates of a task.
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from typing import Any

from module0_profiling.course import parts
from module0_profiling.course.gates import Measured
from module0_profiling.course.parts import Use
from phase3_paged_attention.measures.interpreted import ROOM, in_process

QUALITY_CHARACTERS = 2000  # of held-out text
QUALITY_FORMATS = ("fp8_e4m3", "fp8_per_token_head")
KERNELS, WRITES, COMPILED, ENGINE = (
    f"{ROOM}.measures.{name}" for name in ("kernel_gates", "write_gates", "launched", "engine_gates")
)


def paged_error(use: Use) -> Measured:
    """Largest error of the paged kernel over what its type allows, splits, windows, caps, trees and FP8 included."""
    return _error(_asked(KERNELS, "paged", use))


def decode_bytes(use: Use) -> Measured:
    """Bytes of K and V that a decode asks for, over those needed."""
    return Measured(_asked(KERNELS, "paged", use)["decode"], "60 tokens each, 4 query heads share a KV head")


def bytes_over_unfused(use: Use) -> Measured:
    """All bytes of a decode over those that PyTorch's operations move."""
    found = _asked(KERNELS, "paged", use)
    return Measured(found["unfused"], f"the least is {found['unfused by the model']:.3f}")


def prompt_bytes(use: Use) -> Measured:
    """Bytes of K and V that a prompt asks for, over those of tiles with 128 rows."""
    return Measured(_asked(KERNELS, "paged", use)["prompt"], "32 tokens of 4 heads")


def busiest_item(use: Use) -> Measured:
    """Bytes of K and V that the busiest item of a long sequence reads, over an even share of four programs."""
    return Measured(_asked(KERNELS, "paged", use)["busiest"], "512 tokens, planner and kernel together")


def paged_spills(use: Use) -> Measured:
    """Bytes that the paged kernel spills on sm_80, sm_90 and sm_120."""
    found = _asked(COMPILED, "spills", use, interpret=False)
    spilling = ", ".join(name for name, size in found.items() if size)
    return Measured(float(sum(found.values())), spilling or f"{len(found)} builds")


def other_tokens(use: Use) -> Measured:
    """Tokens that the engine says otherwise with these kernels than with the torch backend."""
    found = _asked(ENGINE, "tokens", use)
    return Measured(found["other"], f"{found['tokens']} tokens by {found['backend']}")


def write_error(use: Use) -> Measured:
    """Largest error of the quantised write on a GPU's path, over what half a step of the format allows."""
    return _error(_asked(WRITES, "write", use))


def write_bytes(use: Use) -> Measured:
    """Bytes that the quantised write moves over the fewest possible."""
    found = _asked(WRITES, "write", use)
    return Measured(found["bytes"], f"{found['operations']} operations of torch")


def quality_loss(use: Use) -> Measured:
    """Percent of perplexity that an FP8 cache costs titan-tiny on text that it never saw; the worse format."""
    from phase0_prototype.quality import read_held_out
    from phase3_paged_attention.measures.kv_quality import losses, worse_by

    longest = max(read_held_out(), key=lambda document: len(document.text))
    document = replace(longest, text=longest.text[:QUALITY_CHARACTERS])
    found = losses([document], QUALITY_CHARACTERS, QUALITY_FORMATS, use=str(use.complete()))
    exact = found.pop("auto")
    worse = {kind: worse_by(loss, exact) for kind, loss in found.items()}
    said = ", ".join(f"{kind} {percent:+.2f} %" for kind, percent in worse.items())
    return Measured(max(worse.values()), f"{exact.tokens:,} tokens: {said}")


def latents_error(use: Use) -> Measured:
    """Largest error of the latent kernel over what its type allows."""
    return _error(_asked(KERNELS, "latents", use))


def latents_bytes(use: Use) -> Measured:
    """Bytes of the cache that a decode with 16 heads asks for, over each entry once."""
    found = _asked(KERNELS, "latents", use)
    return Measured(found["decode"], f"{found['a token']:,.0f} bytes a cached token")


def _error(found: dict[str, Any]) -> Measured:
    return Measured(found["error"], found.get("step", ""))


def _asked(module: str, what: str, use: Use, *, interpret: bool = True) -> dict[str, Any]:
    use = use.complete()
    files = [parts.path(ROOM, part, use) for part in parts.available(ROOM)]
    stamps = tuple((str(file), file.stat().st_mtime_ns) for file in files)
    return _answers(module, what, str(use), interpret, stamps)


@lru_cache
def _answers(module: str, what: str, use: str, interpret: bool, stamps: tuple[Any, ...]) -> dict[str, Any]:
    """Kept until a part changes: gates of a task ask the same."""
    return in_process(module, what, use, interpret=interpret)
