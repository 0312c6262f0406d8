"""vLLM's Triton kernel for all of attention, `unified_attention`: the one of the installed package, or its file alone.

The file is vllm/v1/attention/ops/triton_unified_attention.py of vLLM (Apache-2.0); it is never part of this repository.
What it imports from vLLM is a logger, the platform's FP8 type and Triton, which are put in place of its imports.
"""

from __future__ import annotations

import importlib
import importlib.util
import re
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from module0_profiling import rooms
from phase3_paged_attention.measures.attention_inputs import KV, Case, Inputs
from phase3_paged_attention.measures.attention_steps import Launch, Prepared

SOURCE = rooms.ROOT / "build" / "peers" / "vllm" / "triton_unified_attention.py"
MISSING = f"vllm is not installed, and {SOURCE.relative_to(rooms.ROOT)} is not there"
MODULES = ("vllm.v1.attention.ops.triton_unified_attention", "vllm.attention.ops.triton_unified_attention")
SEGMENTS = 16  # a long sequence of a small batch is split into so many
SMALL_GRID = 128  # programs below which it splits: vLLM's MIN_LAUNCH_GRID_SIZE_2D
STANDING_IN = '''"""{name} of vLLM, with what it imports from there put in place."""
import enum
import logging
from types import SimpleNamespace

import torch
import triton
import triton.language as tl

init_logger = logging.getLogger
current_platform = SimpleNamespace(
    fp8_dtype=lambda: torch.float8_e4m3fn, is_rocm=lambda: False, is_xpu=lambda: False, is_cuda=lambda: True
)
is_batch_invariant = vllm_is_batch_invariant = False


class KVQuantMode(enum.IntEnum):
    NONE = 0

'''
_IMPORT = re.compile(
    r"^(?:from vllm[.\w]* import (?:\([^)]*\)|[^\n]*)|import (?:torch|vllm[.\w]*)[^\n]*)\n", re.MULTILINE
)


def why_not() -> str:
    """Why vLLM's kernel cannot run."""
    if not torch.cuda.is_available():
        return "needs an NVIDIA GPU"
    if not SOURCE.is_file() and importlib.util.find_spec("vllm") is None:
        return MISSING
    try:
        _attention()
    except Exception as error:  # a newer file needs more of vLLM, or vLLM another torch
        return f"vLLM's kernel does not load: {type(error).__name__}: {error}".splitlines()[0]
    return ""


def suits(case: Case) -> bool:
    """What it computes with arguments that all versions have."""
    return case.kv_format == "auto" and not case.tree


def standalone(source: str, name: str = SOURCE.name) -> str:
    """The file without vLLM. Raises ValueError where it has no `unified_attention`."""
    if "\ndef unified_attention(" not in source:
        raise ValueError(f"{name} has no function unified_attention")
    return STANDING_IN.format(name=name) + _IMPORT.sub("", source)


def prepare(inputs: Inputs) -> Prepared:
    """As vLLM's backend calls it: split for small batches of decodes, with buffers made beforehand."""
    attend, case = _attention(), inputs.case
    most = SMALL_GRID // case.kv_heads
    padded = 1 << (case.dim - 1).bit_length()
    sums = torch.empty(most, case.heads, SEGMENTS, padded, dtype=torch.float32, device=inputs.q.device)
    top, total = (torch.empty(most, case.heads, SEGMENTS, dtype=torch.float32, device=inputs.q.device) for _ in "mt")
    window = (-1 if case.window is None else case.window - 1, 0)
    given: dict[str, Any] = {
        "cu_seqlens_q": inputs.query_start, "max_seqlen_q": max(case.new), "seqused_k": inputs.seq_lens,
        "max_seqlen_k": max(case.lengths), "softmax_scale": case.spec.scale, "causal": True, "window_size": window,
        "block_table": inputs.block_tables, "softcap": case.soft_cap or 0, "q_descale": None, "k_descale": None,
        "v_descale": None, "seq_threshold_3D": most, "num_par_softmax_segments": SEGMENTS,
        "softmax_segm_output": sums, "softmax_segm_max": top, "softmax_segm_expsum": total,
    }  # fmt: skip

    def bind(q: Tensor, kv: KV) -> Launch:
        query = q.contiguous()
        out = torch.empty_like(query)

        def launch() -> Tensor:
            attend(q=query, k=kv[0], v=kv[1], out=out, **given)
            return out

        return launch

    return Prepared(lambda: None, bind)


@lru_cache(maxsize=1)
def _attention() -> Any:
    if not SOURCE.is_file():
        for name in MODULES:
            try:
                return importlib.import_module(name).unified_attention
            except ModuleNotFoundError:
                continue
        raise ModuleNotFoundError(f"vllm has no {MODULES[0]}")
    folder = SOURCE.parent / "built"
    folder.mkdir(exist_ok=True)
    path = folder / "titan_unified_attention.py"
    path.write_text(standalone(SOURCE.read_text()))  # Triton reads a kernel's text from its file
    spec = importlib.util.spec_from_file_location("titan_unified_attention", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.unified_attention
