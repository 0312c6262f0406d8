"""Builds of the paged kernel for the static report: what they cost is read from the code, no GPU is needed."""

from __future__ import annotations

from module0_profiling.triton_compile import TritonBuild
from phase3_paged_attention.kernels import merge
from phase3_paged_attention.kernels.paged import FEW_MERGES, PER_TENSOR, PER_TOKEN, PLAIN, block_m_of, width_of
from phase3_paged_attention.kernels.paged_triton import paged_kernel
from phase3_paged_attention.kernels.tiles import Tile, tile_of


def build(
    heads: int,
    kv_heads: int,
    dim: int,
    tokens: int,
    tile: Tile,
    *,
    stored: int = 0,
    scales: int = PLAIN,
    capped: bool = False,
    windowed: bool = False,
    visible: bool = False,
    last_block: bool = False,
) -> TritonBuild:
    """A build in bfloat16 for pages of 16, with splits; `stored` is a value of FORMATS, 0 as q."""
    block_m = block_m_of(tokens, heads // kv_heads)
    data = dict.fromkeys(("q_ptr", "keys_ptr", "values_ptr", "out_ptr"), "*bf16")
    if stored:
        data |= {"keys_ptr": "*u16", "values_ptr": "*u16"}
    data |= dict.fromkeys(("k_scale_ptr", "v_scale_ptr", "partial_ptr", "log2sum_ptr"), "*fp32")
    lists = ("items", "merges", "counters", "query_start", "seq_lens", "tables")
    data |= {**dict.fromkeys([f"{name}_ptr" for name in lists], "*i32"), "visible_ptr": "*i64"}
    strides = ("q_token", "q_head", "block_stride", "place_stride", "head_stride")
    counts = ("window", "merges", *strides, "scale_block", "scale_place", "scale_head", "table_stride")
    signature = {**data, "scale": "fp32", "cap": "fp32", **dict.fromkeys(counts, "i32")}
    constants = {
        "HQ": heads, "HKV": kv_heads, "D": dim, "WIDTH": width_of(dim, stored), "P": 16,
        "FORMAT": stored, "SCALES": scales, "CAPPED": capped, "WINDOWED": windowed, "VISIBLE": visible,
        "SPLIT": True, "LAST_BLOCK": last_block, "MERGES": FEW_MERGES, "WIDE": False,
        "TOKENS": tokens, "BLOCK_M": block_m, "BLOCK_N": tile.block_n,
    }  # fmt: skip
    variant = (" fp8" if stored else "") + ("", " scale", " scale/token")[scales]
    variant += " capped" * capped + " windowed" * windowed + " visible" * visible + " last block" * last_block
    label = f"paged {heads}/{kv_heads}x{dim}, {tokens} token{'s' * (tokens > 1)} x {tile.block_n}{variant}"
    return TritonBuild(label, paged_kernel, signature, constants, (*data, *strides), tile.warps, tile.stages)


SM_86 = (8, 6)  # the least shared memory: its tiles fit all GPUs


def _of(dim: int, tokens: int, stored: int = 0, scales: int = PLAIN, **variant: bool) -> TritonBuild:
    tile = tile_of(SM_86, dim, block_m_of(tokens, 8), 1 if stored else 2)
    return build(64, 8, dim, tokens, tile, stored=stored, scales=scales, **variant)


AOT = (
    *(_of(dim, 1, last_block=True) for dim in (64, 80, 128, 256)),
    _of(128, 1, 1, PER_TENSOR, last_block=True),
    _of(128, 1, 1, PER_TOKEN, last_block=True),
    *(_of(dim, 16) for dim in (64, 128)),
    _of(256, 8),
    _of(128, 16, 1, PER_TOKEN),
    _of(128, 16, capped=True, windowed=True),
    _of(128, 8, visible=True),
    merge.build(64, 8, 128, 1, 16),
)
