"""What the paged kernels are compared with. A peer that is not here says why, and is not measured.

FlashInfer (arXiv 2501.01005) has several ways to compute a decode, and its own choice is not always the fastest one (on
Hopper, `auto` takes fa2 for 16-bit caches): so all of them are timed, and the best one is the peer.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from phase2_rope.rope_peers import flashinfer_why_not
from phase3_paged_attention.kv_format import FORMATS
from phase3_paged_attention.measures import torch_peers, vllm_peer
from phase3_paged_attention.measures.attention_inputs import KV, Case, Inputs
from phase3_paged_attention.measures.attention_steps import Launch, Prepared

NO_GPU = "needs an NVIDIA GPU"
WORKSPACE = 128 << 20  # bytes, as FlashInfer's documentation advises
FLASHINFER = "FlashInfer"  # begins the names of its variants
HEAD_DIMS = (64, 128, 256)
HOPPER = (9, 0)


@dataclass(frozen=True)
class Peer:
    """Attention by another project.

    Attributes:
        name: in figures.
        why_not: an empty text, or the reason why it cannot run here.
        suits: whether it computes such a case, a `Case` or a `LatentCase`.
        prepare: the inputs of a case -> what can be planned and launched.
    """

    name: str
    why_not: Callable[[], str]
    suits: Callable[[Any], bool]
    prepare: Callable[[Any], Prepared]


def fa3_why_not() -> str:
    """Why FlashInfer's kernels for Hopper cannot run."""
    why = flashinfer_why_not()
    if not why and torch.cuda.get_device_capability() != HOPPER:
        return "fa3 is for GPUs of compute capability 9.0"
    return why


def cudnn_why_not() -> str:
    """Why FlashInfer can't hand decodes to cuDNN."""
    why = flashinfer_why_not()
    if not why and importlib.util.find_spec("cudnn") is None:
        return "cuDNN's Python front end is not installed: pip install nvidia-cudnn-frontend"
    return why


def pages_of(inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    """FlashInfer's tables on the host, int32: where a sequence's pages begin [B+1], pages, tokens of the last [B]."""
    case = inputs.case
    lengths = torch.tensor(case.lengths, dtype=torch.int32)
    counts = (lengths + case.page - 1) // case.page
    tables = inputs.block_tables.cpu()
    used = tables[torch.arange(tables.shape[1]) < counts[:, None]]
    begins = torch.cat((torch.zeros(1), counts.cumsum(0))).int()
    return begins, used, lengths - (counts - 1) * case.page


def suits(case: Case) -> bool:
    """What FlashInfer has kernels for: 16-bit queries, and no scale for each token and head."""
    per_token = case.kv_format != "auto" and FORMATS[case.kv_format].per_token
    return case.dim in HEAD_DIMS and case.dtype.itemsize == 2 and not per_token


def options(inputs: Inputs) -> dict[str, Any]:
    """Arguments that `plan` of both wrappers takes."""
    case, spec = inputs.case, inputs.case.spec
    return {
        "sm_scale": spec.scale,
        "window_left": -1 if spec.window is None else spec.window - 1,
        "logits_soft_cap": spec.soft_cap or 0.0,
        "q_data_type": case.dtype,
        "kv_data_type": inputs.kv[0].dtype,
    }


def decode_wrapper(backend: str, tensor_cores: bool) -> Callable[[Inputs], Prepared]:
    """`BatchDecodeWithPagedKVCacheWrapper`."""

    def prepare(inputs: Inputs) -> Prepared:
        case = inputs.case
        made: Any = importlib.import_module("flashinfer").BatchDecodeWithPagedKVCacheWrapper(
            _workspace(inputs), "NHD", use_tensor_cores=tensor_cores, backend=backend
        )
        given = (*pages_of(inputs), case.heads, case.kv_heads, case.dim, case.page)
        return _planned(made, lambda: made.plan(*given, **options(inputs)))

    return prepare


def prefill_wrapper(backend: str, masked: bool = False) -> Callable[[Inputs], Prepared]:
    """`BatchPrefillWithPagedKVCacheWrapper`, causal or with a mask of its own for every pair of tokens."""

    def prepare(inputs: Inputs) -> Prepared:
        case = inputs.case
        made: Any = importlib.import_module("flashinfer").BatchPrefillWithPagedKVCacheWrapper(
            _workspace(inputs), "NHD", backend=backend
        )
        given = (inputs.query_start.cpu(), *pages_of(inputs), case.heads, case.kv_heads, case.dim, case.page)
        mask = {"custom_mask": _mask(inputs)} if masked else {"causal": True}
        return _planned(made, lambda: made.plan(*given, **mask, **options(inputs)))

    return prepare


def _planned(wrapper: Any, plan: Callable[[], object]) -> Prepared:
    plan()

    def bind(q: Tensor, kv: KV) -> Launch:
        query, cache = q.contiguous(), kv[:2]
        if len(kv) == 2:
            return lambda: wrapper.run(query, cache)
        scales = {"k_scale": float(kv[2]), "v_scale": float(kv[3])}
        return lambda: wrapper.run(query, cache, **scales)

    return Prepared(plan, bind)


def _workspace(inputs: Inputs) -> Tensor:
    return torch.zeros(WORKSPACE, dtype=torch.uint8, device=inputs.q.device)


def _mask(inputs: Inputs) -> Tensor:
    """Which token each new one may see, [new, length] of every sequence one after the other, flat bool."""
    from phase3_paged_attention.kernels.reference import visible_keys

    case, device, begin, parts = inputs.case, inputs.q.device, 0, []
    for new, length in zip(case.new, case.lengths, strict=True):
        bits = None if inputs.visible is None else inputs.visible[begin : begin + new]
        parts.append(visible_keys(new, length, case.window, bits, device))
        begin += new
    return torch.cat([part.flatten() for part in parts])


def _decodes(case: Case) -> bool:
    return suits(case) and case.is_decode and not case.tree


def _causal(case: Case) -> bool:
    return suits(case) and not case.tree


def _same_type(case: Case) -> bool:
    return _causal(case) and case.kv_format == "auto"  # fa3 wants queries in FP8 where the cache is


def _same_type_decode(case: Case) -> bool:
    return _same_type(case) and case.is_decode


def _trees(case: Case) -> bool:
    return suits(case) and case.tree


def first_line(error: Exception) -> str:
    """Of its message, or its type where it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


PEERS = (
    Peer("FlashInfer, CUDA cores", flashinfer_why_not, _decodes, decode_wrapper("fa2", False)),
    Peer("FlashInfer, fa2 decode", flashinfer_why_not, _decodes, decode_wrapper("fa2", True)),
    Peer("FlashInfer, fa3 decode", fa3_why_not, _same_type_decode, decode_wrapper("fa3", True)),
    Peer("FlashInfer, cuDNN decode", cudnn_why_not, _same_type_decode, decode_wrapper("cudnn", True)),
    Peer("FlashInfer, fa2", flashinfer_why_not, _causal, prefill_wrapper("fa2")),
    Peer("FlashInfer, fa3", fa3_why_not, _same_type, prefill_wrapper("fa3")),
    Peer("FlashInfer, fa2 mask", flashinfer_why_not, _trees, prefill_wrapper("fa2", masked=True)),
    Peer("vLLM Triton", vllm_peer.why_not, vllm_peer.suits, vllm_peer.prepare),
    Peer("SDPA, contiguous", torch_peers.no_reason, torch_peers.plain, torch_peers.contiguous),
    Peer("SDPA cuDNN, contiguous", torch_peers.needs_gpu, torch_peers.plain, torch_peers.cudnn),
    Peer("gather + SDPA", torch_peers.no_reason, torch_peers.plain, torch_peers.gathered),
    Peer("gather + unfused", torch_peers.no_reason, torch_peers.decodes, torch_peers.unfused),
    Peer("varlen_attn", torch_peers.varlen_why_not, torch_peers.varlen_suits, torch_peers.varlen),
)
