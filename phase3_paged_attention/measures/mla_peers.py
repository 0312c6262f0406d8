"""What the kernel for latents is compared with: FlashInfer's, and PyTorch on gathered entries."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention as sdpa

from phase3_paged_attention.measures.attention_peers import WORKSPACE as BYTES
from phase3_paged_attention.measures.attention_peers import Peer, fa3_why_not, flashinfer_why_not
from phase3_paged_attention.measures.attention_steps import Launch, Prepared
from phase3_paged_attention.measures.mla_inputs import LatentCase, LatentInputs
from phase3_paged_attention.measures.torch_peers import no_reason

LARGEST = 448.0  # of e4m3
PIECE = 1024  # blocks that are quantised at once
NORMAL = 5.0  # about the largest of many random numbers


def flashinfer(backend: str) -> Callable[[LatentInputs], Prepared]:
    """`BatchMLAPagedAttentionWrapper`. Its cache in FP8 has one scale for all and rotary keys in FP8 too."""

    def prepare(inputs: LatentInputs) -> Prepared:
        case, library = inputs.case, importlib.import_module("flashinfer.mla")
        workspace = torch.zeros(BYTES, dtype=torch.uint8, device=inputs.q.device)
        wrapper: Any = library.BatchMLAPagedAttentionWrapper(workspace, backend=backend)
        metadata = library.MLAPlanMetadata.csr(inputs.query_start.cpu(), *_pages_of(inputs))
        options = {
            "metadata": metadata, "num_heads": case.heads, "head_dim_ckv": case.latent, "head_dim_kpe": case.rope,
            "page_size": case.page, "causal": max(case.new) > 1, "sm_scale": case.scale, "q_data_type": case.dtype,
            "kv_data_type": torch.float8_e4m3fn if case.packed else case.dtype,
            "query_layout": "split", "kv_cache_layout": "split",
        }  # fmt: skip
        wrapper.plan(**options)
        scales = {"ckv_scale": NORMAL / LARGEST, "kpe_scale": NORMAL / LARGEST} if case.packed else {}

        def bind(q: Tensor, kv: tuple[Tensor, ...]) -> Launch:
            query = tuple(part.contiguous() for part in q.split((case.latent, case.rope), dim=-1))
            cache = _quantised(kv[0], case) if case.packed else _split(kv[0], case)
            return lambda: wrapper.run(query=query, kv_cache=cache, **scales)

        return Prepared(lambda: wrapper.plan(**options), bind)

    return prepare


def gathered(inputs: LatentInputs) -> Prepared:
    """Gather the entries, then SDPA with one key head: what phase 2 does."""
    case, length = inputs.case, inputs.case.lengths[0]
    used = inputs.block_tables[:, : -(-length // case.page)]

    def bind(q: Tensor, kv: tuple[Tensor, ...]) -> Launch:
        query = q.unsqueeze(1)  # [B, 1, H, L + R]

        def launch() -> Tensor:
            entries = kv[0][used].flatten(1, 2)[:, :length].transpose(1, 2)  # [B, 1, S, L + R]
            return sdpa(query, entries, entries[..., : case.latent], scale=case.scale)[:, 0]

        return launch

    return Prepared(lambda: None, bind)


def _pages_of(inputs: LatentInputs) -> tuple[Tensor, Tensor, Tensor]:
    """Where each sequence's pages begin [B+1], pages, tokens [B]; int32 on the host."""
    lengths, tables = inputs.seq_lens.cpu(), inputs.block_tables.cpu()
    counts = (lengths + inputs.case.page - 1) // inputs.case.page
    begins = torch.cat((torch.zeros(1), counts.cumsum(0))).int()
    return begins, tables[torch.arange(tables.shape[1]) < counts[:, None]], lengths


def _split(cache: Tensor, case: LatentCase) -> tuple[Tensor, ...]:
    """Latents [blocks, P, L] and rotary keys [blocks, P, R], each without gaps, as FlashInfer likes them best."""
    return tuple(part.contiguous() for part in cache[:, :, 0].split((case.latent, case.rope), dim=-1))


def _quantised(cache: Tensor, case: LatentCase) -> tuple[Tensor, ...]:
    """The same of packed entries, in e4m3 with FlashInfer's scales."""
    made: tuple[list[Tensor], list[Tensor]] = ([], [])
    for part in cache.split(PIECE):
        for side, numbers in zip(made, _split(case.format.unpack(part), case), strict=True):
            scaled = numbers.float().mul_(LARGEST / NORMAL).clamp_(-LARGEST, LARGEST)
            side.append(scaled.to(torch.float8_e4m3fn).view(torch.uint8))  # uint8: FP8 can't be concatenated everywhere
    return tuple(torch.cat(side).view(torch.float8_e4m3fn) for side in made)


def _causal(case: LatentCase) -> bool:
    return not case.tree


def _plain(case: LatentCase) -> bool:
    return len(set(case.lengths)) == 1 and max(case.new) == 1 and not case.packed


PEERS = (
    Peer("FlashInfer, fa3", fa3_why_not, _causal, flashinfer("fa3")),
    Peer("FlashInfer, fa2", flashinfer_why_not, _causal, flashinfer("fa2")),
    Peer("gather + SDPA", no_reason, _plain, gathered),
)
