"""What PyTorch itself brings for attention on a paged cache, as peers of the kernels.

`scaled_dot_product_attention` knows no block tables. So it runs on contiguous caches, which an engine does not have (a
lower bound), and on pages that are gathered first. Its unfused form is what models were written in: gather, repeat the
heads, product, softmax in float32, product.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention as sdpa

from phase3_paged_attention.measures.attention_inputs import KV, Case, Inputs
from phase3_paged_attention.measures.attention_steps import Launch, Prepared

VARLEN_PAGES = 256  # flash-attention 2, which varlen_attn calls, reads pages of a multiple of this


def no_reason() -> str:
    """It always runs."""
    return ""


def needs_gpu() -> str:
    """It runs on every NVIDIA GPU."""
    return "" if torch.cuda.is_available() else "needs an NVIDIA GPU"


def plain(case: Case) -> bool:
    """Whether the case is one that needs no mask but the causal one, and no numbers of other types."""
    return case.is_even and case.kv_format == "auto" and case.window is None and case.soft_cap is None and not case.tree


def decodes(case: Case) -> bool:
    """The same, of one new token a sequence."""
    return plain(case) and case.is_decode


def contiguous(inputs: Inputs, backend: str | None = None) -> Prepared:
    """SDPA on a contiguous copy of the cache, made beforehand.

    Args:
        inputs: the step.
        backend: a name of `torch.nn.attention.SDPBackend`; None: as torch chooses.
    """
    attend = _sdpa(inputs.case, backend)

    def bind(q: Tensor, kv: KV) -> Launch:
        key, value = (_gathered(side, inputs).contiguous() for side in kv)
        query = _queries(q, inputs.case).contiguous()
        return lambda: attend(query, key, value)

    return Prepared(lambda: None, bind)


def cudnn(inputs: Inputs) -> Prepared:
    """`contiguous` by cuDNN."""
    return contiguous(inputs, "CUDNN_ATTENTION")


def gathered(inputs: Inputs) -> Prepared:
    """Gather the pages, then SDPA."""
    attend = _sdpa(inputs.case, None)

    def bind(q: Tensor, kv: KV) -> Launch:
        query = _queries(q, inputs.case)
        return lambda: attend(query, _gathered(kv[0], inputs), _gathered(kv[1], inputs))

    return Prepared(lambda: None, bind)


def unfused(inputs: Inputs) -> Prepared:
    """Gather, `repeat_interleave`, and two products around a softmax in float32: transformers' eager attention."""
    case = inputs.case

    def bind(q: Tensor, kv: KV) -> Launch:
        query = _queries(q, case)

        def attend() -> Tensor:
            key, value = (_gathered(side, inputs).repeat_interleave(case.heads // case.kv_heads, 1) for side in kv)
            scores = query @ key.transpose(2, 3) * case.spec.scale  # [B, Hq, 1, S]
            weights = torch.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
            return _rows(weights @ value)

        return attend

    return Prepared(lambda: None, bind)


def varlen_why_not() -> str:
    """Why `torch.nn.attention.varlen` can't read pages here."""
    if why := needs_gpu():
        return why
    try:
        attend = importlib.import_module("torch.nn.attention.varlen").varlen_attn
    except (ImportError, AttributeError):
        return f"torch {torch.__version__} has no torch.nn.attention.varlen"
    if "block_table" not in inspect.signature(attend).parameters:
        return f"varlen_attn of torch {torch.__version__} has no block_table"
    return ""


def varlen_suits(case: Case) -> bool:
    """Pages that its kernel reads."""
    return case.page % VARLEN_PAGES == 0 and case.kv_format == "auto" and not (case.tree or case.soft_cap)


def varlen(inputs: Inputs) -> Prepared:
    """`varlen_attn` with a block table."""
    attend: Any = importlib.import_module("torch.nn.attention.varlen").varlen_attn
    case = inputs.case
    window = (-1 if case.window is None else case.window - 1, 0)

    def bind(q: Tensor, kv: KV) -> Launch:
        query = q.contiguous()
        given = (query, *kv, inputs.query_start, None, max(case.new), max(case.lengths))
        options = {"scale": case.spec.scale, "window_size": window, "enable_gqa": True}
        return lambda: attend(*given, **options, seqused_k=inputs.seq_lens, block_table=inputs.block_tables)

    return Prepared(lambda: None, bind)


def _sdpa(case: Case, backend: str | None) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Attention of [B, Hq, T, D] queries that are the last of [B, Hkv, S, D] keys, as rows [B * T, Hq * D]."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.nn.attention.bias import causal_lower_right

    new, length = case.new[0], case.lengths[0]
    options: dict[str, Any] = {"scale": case.spec.scale, "enable_gqa": case.heads != case.kv_heads}
    if 1 < new == length:
        options["is_causal"] = True
    elif new > 1:
        options["attn_mask"] = causal_lower_right(new, length)

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        if backend is None:
            return _rows(sdpa(query, key, value, **options))
        with sdpa_kernel(getattr(SDPBackend, backend)):
            return _rows(sdpa(query, key, value, **options))

    return attend


def _queries(q: Tensor, case: Case) -> Tensor:
    """[T, Hq, D] -> [B, Hq, T / B, D]."""
    return q.unflatten(0, (len(case.new), case.new[0])).transpose(1, 2)


def _gathered(side: Tensor, inputs: Inputs) -> Tensor:
    """Keys or values of all sequences, [B, Hkv, S, D], for lengths that are alike."""
    length = inputs.case.lengths[0]
    used = inputs.block_tables[:, : -(-length // side.shape[1])]
    return side[used].flatten(1, 2)[:, :length].transpose(1, 2)


def _rows(attended: Tensor) -> Tensor:
    """[B, Hq, T, D] -> [B * T, Hq * D]."""
    return attended.transpose(1, 2).flatten(0, 1).flatten(1)
