"""What operations cost, against counters: torch's own FLOP counter, the sizes of real tensors, masks, simulations."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable
from fractions import Fraction
from typing import ClassVar

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from module0_profiling import attention_costs, costs
from module0_profiling.attention_costs import attention_decode, attention_prefill, cached_positions, visible_pairs
from module0_profiling.costs import Comm
from module0_profiling.number_formats import DTYPE_BYTES, WEIGHT_FORMATS, WeightFormat
from module0_profiling.roofline import Work

SMALL = st.integers(1, 12)


def matmul_flops(run: Callable[[], object]) -> int:
    """FLOPs of the matrix products that torch sees while `run` runs."""
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def moved(*tensors: Tensor) -> int:
    """Bytes of tensors, each touched once."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def causal_mask(tokens: int, prefix: int = 0, window: int | None = None) -> Tensor:
    """[T, P + T], position by position: a query sees itself and what came before, at most `window` of them."""
    mask = torch.zeros(tokens, prefix + tokens, dtype=torch.bool)
    for i, j in itertools.product(range(tokens), range(prefix + tokens)):
        mask[i, j] = j <= prefix + i and (window is None or prefix + i - j < window)
    return mask


# Linear layers.


@settings(deadline=None)
@given(rows=SMALL, d_in=SMALL, d_out=SMALL)
def test_linear_is_what_torch_counts_and_what_its_tensors_weigh(rows: int, d_in: int, d_out: int) -> None:
    x, layer = torch.ones(rows, d_in), nn.Linear(d_in, d_out, bias=False)
    work = costs.linear(rows, d_in, d_out, dtype_bytes=4)
    assert work.flops == matmul_flops(lambda: layer(x))
    assert work.bytes == moved(x, layer.weight, layer(x))


def test_batch_1_linear_does_one_flop_a_byte() -> None:
    work = costs.linear(1, 4096, 4096)  # 2 * 16.8M FLOPs over 33.6 MB of bf16 weights
    assert work == Work(33_554_432, 33_554_432 + 2 * 8192)
    assert work.intensity == pytest.approx(1.0, abs=1e-3)


def test_matmul_1024_in_float32_has_intensity_171() -> None:
    work = costs.linear(1024, 1024, 1024, dtype_bytes=4)
    assert work == Work(2 * 2**30, 3 * 4 * 2**20)
    assert work.intensity == pytest.approx(170.67, abs=0.01)  # n / 6


@settings(deadline=None)
@given(rows=SMALL, heads=SMALL, d_in=SMALL, d_out=SMALL)
def test_batched_linear_is_one_bmm(rows: int, heads: int, d_in: int, d_out: int) -> None:
    x, weight = torch.ones(heads, rows, d_in), torch.ones(heads, d_in, d_out)
    work = costs.batched_linear(rows, heads, d_in, d_out, dtype_bytes=4)
    assert work.flops == matmul_flops(lambda: x @ weight)
    assert work.bytes == moved(x, weight, x @ weight)


@pytest.mark.parametrize("name", WEIGHT_FORMATS)
def test_a_weight_format_changes_only_the_weights(name: str) -> None:
    stored = WEIGHT_FORMATS[name]
    plain, packed = costs.linear(3, 256, 384), costs.linear(3, 256, 384, weights=stored)
    assert packed.flops == plain.flops
    assert packed.bytes - stored.bytes(256, 384) == plain.bytes - 256 * 384 * 2 == 3 * (256 + 384) * 2


# Number formats.


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("float32", torch.float32),
        ("float16", torch.float16),
        ("bfloat16", torch.bfloat16),
        ("fp8", torch.float8_e4m3fn),
        ("int8", torch.int8),
    ],
)
def test_bytes_of_a_number_are_those_of_torch(name: str, dtype: torch.dtype) -> None:
    assert DTYPE_BYTES[name] == dtype.itemsize
    assert WEIGHT_FORMATS[name].bits == 8 * dtype.itemsize


@settings(deadline=None)
@given(d_in=st.integers(1, 400), d_out=st.integers(1, 400))
def test_quantised_weights_weigh_as_much_as_the_tensors_that_hold_them(d_in: int, d_out: int) -> None:
    """Scales laid out as tensors: one a channel, one a group of 128 inputs, one a block of 128 x 128."""
    weight = torch.empty(d_out, d_in, dtype=torch.int8)
    channel = torch.empty(d_out)
    assert WEIGHT_FORMATS["int8"].bytes(d_in, d_out) == moved(weight, channel)
    assert WEIGHT_FORMATS["fp8"].bytes(d_in, d_out) == moved(weight.to(torch.float8_e4m3fn), channel)

    groups = len(torch.arange(d_in).split(128))
    scales, zeros = torch.empty(d_out, groups, dtype=torch.bfloat16), torch.empty(d_out, groups, dtype=torch.int8)
    assert WEIGHT_FORMATS["int4"].bytes(d_in, d_out) == (moved(weight) + moved(zeros)) / 2 + moved(scales)

    blocks = torch.empty(len(torch.arange(d_out).split(128)), groups)
    assert WEIGHT_FORMATS["fp8-block"].bytes(d_in, d_out) == moved(weight, blocks)


def test_a_block_of_scales_goes_before_groups_and_channels() -> None:
    plain = WeightFormat("x", 8)
    assert plain.bytes(256, 512) == 256 * 512
    assert WeightFormat("x", 8, scale_bytes=1).bytes(256, 512) - plain.bytes(256, 512) == 512
    assert WeightFormat("x", 8, group=64, scale_bytes=1).bytes(256, 512) - plain.bytes(256, 512) == 512 * 4
    assert WeightFormat("x", 8, group=64, block=128, scale_bytes=1).bytes(256, 512) - plain.bytes(256, 512) == 2 * 4


# Operations between the products. FLOPs: written out one element at a time, as counted in each docstring.


class Counted:
    """A number that counts the operations it takes part in."""

    ops: ClassVar[Counter[str]] = Counter()

    def _did(self, name: str) -> Counted:
        Counted.ops[name] += 1
        return self

    def __add__(self, other: object) -> Counted:
        return self._did("+")

    def __sub__(self, other: object) -> Counted:
        return self._did("+")

    def __mul__(self, other: object) -> Counted:
        return self._did("*")

    def __truediv__(self, other: object) -> Counted:
        return self._did("/")

    def exp(self) -> Counted:
        return self._did("exp")


def counted(run: Callable[[], object]) -> int:
    Counted.ops = Counter()
    run()
    return Counted.ops.total()


def test_norm_squares_adds_scales_and_weights_each_element() -> None:
    rows, hidden = 3, 8

    def plain(extra: bool) -> None:
        for _ in range(rows):
            x, total, scale = [Counted() for _ in range(hidden)], Counted(), Counted()
            if extra:
                x = [a + Counted() for a in x]  # the residual
            for a in x:
                total = total + a * a
            for a in x:
                _ = a * scale * Counted()  # 1 / rms, the weight

    assert costs.norm(rows, hidden).flops == counted(lambda: plain(False))
    assert costs.norm(rows, hidden, residual=True).flops == counted(lambda: plain(True))


def test_rope_rotates_each_pair_with_four_products_and_two_sums() -> None:
    rows, heads, kv_heads, head_dim = 2, 4, 2, 6

    def rotate() -> None:
        for _ in range(rows * (heads + kv_heads) * (head_dim // 2)):
            a, b, cos, sin = (Counted() for _ in range(4))
            _ = a * cos - b * sin, a * sin + b * cos

    assert costs.rope(rows, heads, kv_heads, head_dim).flops == counted(rotate)


def test_silu_mul_does_five_operations_an_element() -> None:
    def gate() -> None:
        for _ in range(3 * 8):
            g, up = Counted(), Counted()
            _ = g / (g.exp() + 1) * up

    assert costs.silu_mul(3, 8).flops == counted(gate) + 3 * 8  # and the sign inside of the exponent


@settings(deadline=None)
@given(rows=SMALL, hidden=SMALL, dtype=st.sampled_from([torch.float32, torch.bfloat16]))
def test_elementwise_operations_move_their_tensors_once(rows: int, hidden: int, dtype: torch.dtype) -> None:
    size, x = dtype.itemsize, torch.empty(rows, hidden, dtype=dtype)
    weight = x.new_empty(hidden)
    assert costs.norm(rows, hidden, size).bytes == moved(x, x, weight)
    assert costs.norm(rows, hidden, size, residual=True).bytes == moved(x, x, x, x, weight)
    assert costs.embedding(rows, hidden, size) == Work(0, moved(x, x))
    assert costs.silu_mul(rows, hidden, size).bytes == moved(x, x, x)  # gate, up, the product
    logits = x.float()
    assert costs.sampling(rows, hidden) == Work(logits.numel(), moved(logits))  # greedy: one comparison each
    assert costs.sampling(rows, hidden, passes=3).bytes == moved(logits, logits, logits)


@settings(deadline=None)
@given(rows=SMALL, heads=SMALL, kv_heads=SMALL, half=SMALL)
def test_rope_and_the_write_to_the_cache_move_queries_keys_and_values_once(
    rows: int, heads: int, kv_heads: int, half: int
) -> None:
    q, k = torch.empty(rows, heads, 2 * half).bfloat16(), torch.empty(rows, kv_heads, 2 * half).bfloat16()
    cos = torch.empty(rows, half)
    assert costs.rope(rows, heads, kv_heads, 2 * half, 2).bytes == moved(q, q, k, k, cos, cos)
    v, fp8 = torch.empty_like(k), k.to(torch.float8_e4m3fn)
    assert costs.kv_write(rows, kv_heads, 2 * half, 2) == Work(0, moved(k, v, k, v))
    assert costs.kv_write(rows, kv_heads, 2 * half, 2, kv_bytes=1) == Work(0, moved(k, v, fp8, fp8))


# Attention.


@settings(deadline=None)
@given(tokens=st.integers(1, 20), prefix=st.integers(0, 20), window=st.none() | st.integers(1, 45))
def test_pairs_and_positions_are_those_of_the_mask(tokens: int, prefix: int, window: int | None) -> None:
    mask = causal_mask(tokens, prefix, window)
    assert visible_pairs(tokens, prefix, window) == mask.sum()
    assert cached_positions(tokens, prefix, window) == mask.any(0).sum()  # columns that some query needs


def test_a_sliding_window_has_the_width_that_transformers_gives_it() -> None:
    from transformers.masking_utils import sliding_window_causal_mask_function

    queries, keys = torch.arange(10)[:, None], torch.arange(10)
    mask = sliding_window_causal_mask_function(4)(0, 0, queries, keys)
    assert visible_pairs(10, window=4) == mask.sum()
    assert visible_pairs(3, prefix=7, window=4) == mask[7:].sum()


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (4, 1)], ids=["MHA", "GQA", "MQA"])
@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize(("tokens", "prefix"), [(7, 0), (7, 5), (1, 11)], ids=["prefill", "chunk", "decode"])
def test_attention_is_a_query_at_a_time_over_what_it_sees(
    heads: int, kv_heads: int, window: int | None, tokens: int, prefix: int
) -> None:
    batch, head_dim = 2, 8
    mask = causal_mask(tokens, prefix, window)
    q = torch.ones(batch, heads, tokens, head_dim)
    k, v = (torch.ones(batch, kv_heads, prefix + tokens, head_dim) for _ in range(2))

    def attend() -> None:
        for i in range(tokens):
            keys, values = (x[:, :, mask[i]].repeat_interleave(heads // kv_heads, 1) for x in (k, v))
            scores = torch.matmul(q[:, :, i : i + 1], keys.transpose(2, 3))
            torch.matmul(scores.softmax(-1), values)

    work = attention_prefill(batch, tokens, heads, kv_heads, head_dim, 4, prefix=prefix, window=window)
    assert work.flops == matmul_flops(attend)
    needed = mask.any(0)
    assert work.bytes == moved(q, q, k[:, :, needed], v[:, :, needed])  # Q, the output, K, V


def test_causal_attention_is_a_bit_more_than_half_of_what_torch_counts_for_sdpa() -> None:
    q = torch.ones(2, 4, 64, 8, device="meta")
    in_full = matmul_flops(lambda: nn.functional.scaled_dot_product_attention(q, q, q, is_causal=True))
    assert attention_prefill(2, 64, 4, 4, 8).flops == in_full * 65 / (2 * 64)


def test_decode_attention_reads_each_key_and_value_once() -> None:
    work = attention_decode(batch=64, context=8192, heads=32, kv_heads=8, head_dim=128)
    cache = 64 * 8192 * 2 * 8 * 128 * 2  # 2.15 GB, as in "64 x 8k KV" of a Llama-3-8B layer
    assert cache == 2_147_483_648
    assert work.bytes == cache + 64 * 2 * 32 * 128 * 2  # and the queries and outputs
    assert work.flops == 4 * 64 * 8192 * 32 * 128


@settings(deadline=None)
@given(batch=SMALL, tokens=SMALL, prefix=st.integers(0, 9), window=st.none() | st.integers(1, 9))
def test_chunks_of_a_prefill_add_up_to_its_arithmetic(batch: int, tokens: int, prefix: int, window: int | None) -> None:
    whole = attention_prefill(batch, prefix + tokens, 4, 2, 8, window=window)
    first = attention_prefill(batch, prefix, 4, 2, 8, window=window)
    rest = attention_prefill(batch, tokens, 4, 2, 8, prefix=prefix, window=window)
    steps = [attention_decode(batch, prefix + i + 1, 4, 2, 8, window=window) for i in range(tokens)]
    assert first.flops + rest.flops == whole.flops
    assert sum(step.flops for step in steps) == rest.flops


def test_a_quantised_cache_shrinks_keys_and_values_only() -> None:
    wide, narrow = (attention_decode(3, 100, 8, 2, 16, kv_bytes=size) for size in (None, 1))
    assert wide.flops == narrow.flops
    assert wide.bytes - narrow.bytes == 3 * 100 * 2 * 2 * 16  # one byte of two for each number
    wide, narrow = (attention_costs.mla_absorbed(3, 1, 8, 32, 4, prefix=99, kv_bytes=size) for size in (None, 1))
    assert wide.bytes - narrow.bytes == 3 * 100 * (32 + 4)


# Multi-head latent attention: H heads, P nope, R rope, V value and L latent numbers.

H, P, R, V, L = 4, 8, 4, 6, 16


@pytest.mark.parametrize(("tokens", "prefix"), [(5, 0), (5, 3), (1, 7)], ids=["prefill", "chunk", "decode"])
def test_both_ways_of_mla_cost_what_their_einsums_cost_and_agree(tokens: int, prefix: int) -> None:
    """The attention of DeepSeek-V2 (arXiv 2405.04434) on random numbers, a query at a time over what it sees."""
    batch, positions, mask = 2, prefix + tokens, causal_mask(tokens, prefix)
    torch.manual_seed(0)
    q_nope, q_rope = torch.randn(batch, tokens, H, P), torch.randn(batch, tokens, H, R)
    latent, k_rope = torch.randn(batch, positions, L), torch.randn(batch, positions, R)
    w_uk, w_uv = torch.randn(L, H, P), torch.randn(L, H, V)

    def scale(scores: Tensor) -> Tensor:
        return (scores / (P + R) ** 0.5).softmax(-1)

    def absorb() -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        query = torch.cat([torch.einsum("bthp,lhp->bthl", q_nope, w_uk), q_rope], -1)  # [B, T, H, L + R]
        return query, lambda out: torch.einsum("bthl,lhv->bthv", out, w_uv)

    def attend_absorbed(query: Tensor) -> Tensor:
        cache, rows = torch.cat([latent, k_rope], -1), []
        for i in range(tokens):
            seen = cache[:, mask[i]]
            rows.append(scale(query[:, i] @ seen.mT) @ seen[..., :L])  # [B, H, L]
        return torch.stack(rows, 1)

    def expand() -> tuple[Tensor, Tensor]:
        both = latent @ torch.cat([w_uk, w_uv], -1).reshape(L, H * (P + V))
        keys, values = both.view(batch, positions, H, P + V).split([P, V], -1)
        return torch.cat([keys, k_rope[:, :, None].expand(-1, -1, H, -1)], -1), values

    def attend_expanded(keys: Tensor, values: Tensor) -> Tensor:
        query, rows = torch.cat([q_nope, q_rope], -1), []
        for i in range(tokens):
            k, v = (x[:, mask[i]].transpose(1, 2) for x in (keys, values))  # [B, H, S, P + R], [B, H, S, V]
            rows.append((scale(query[:, i, :, None] @ k.mT) @ v)[:, :, 0])
        return torch.stack(rows, 1)

    query, project = absorb()
    inner = attend_absorbed(query)
    keys, values = expand()
    torch.testing.assert_close(project(inner), attend_expanded(keys, values), rtol=1e-3, atol=1e-4)

    absorbed = attention_costs.mla_absorbed(batch, tokens, H, L, R, 4, prefix=prefix)
    assert absorbed.flops == matmul_flops(lambda: attend_absorbed(query))
    assert absorbed.bytes == moved(query, inner, latent, k_rope)
    into, out = costs.batched_linear(batch * tokens, H, P, L, 4), costs.batched_linear(batch * tokens, H, L, V, 4)
    assert into.flops == matmul_flops(absorb)
    assert out.flops == matmul_flops(lambda: project(inner))
    assert into.bytes == moved(q_nope, w_uk, query[..., :L])
    assert out.bytes == moved(inner, w_uv, project(inner))

    expanded = attention_costs.mla_expanded(batch, tokens, H, P, R, V, 4, prefix=prefix)
    assert expanded.flops == matmul_flops(lambda: attend_expanded(keys, values))
    assert expanded.bytes == moved(q_nope, q_rope, keys[..., :P], k_rope, values, project(inner))
    assert costs.linear(batch * positions, L, H * (P + V), 4).flops == matmul_flops(expand)


# Mixture of experts.


def expected_distinct(tokens: int, experts: int, top_k: int) -> Fraction:
    """Exactly, from every way in which so many tokens can choose k different experts each."""
    choices = list(itertools.combinations(range(experts), top_k))
    ways = [len(set(itertools.chain(*way))) for way in itertools.product(choices, repeat=tokens)]
    return Fraction(sum(ways), len(ways))


@pytest.mark.parametrize(("experts", "top_k"), [(1, 1), (3, 1), (3, 2), (4, 2), (4, 3), (4, 4)])
@pytest.mark.parametrize("tokens", [1, 2, 3, 4])
def test_distinct_experts_is_the_mean_over_all_choices(tokens: int, experts: int, top_k: int) -> None:
    exact = float(expected_distinct(tokens, experts, top_k))
    assert costs.distinct_experts(tokens, experts, top_k) == pytest.approx(exact, rel=1e-12)


@pytest.mark.parametrize(("tokens", "experts", "top_k"), [(16, 8, 2), (32, 128, 8), (64, 256, 8)])
def test_distinct_experts_of_real_models_as_a_simulation_finds_it(tokens: int, experts: int, top_k: int) -> None:
    chosen = np.random.default_rng(0).random((400, tokens, experts)).argpartition(top_k, -1)[..., :top_k]
    seen = np.zeros((400, experts), bool)
    seen[np.arange(400)[:, None], chosen.reshape(400, -1)] = True
    found = seen.sum(1)
    margin = 4 * found.std() / math.sqrt(400)
    assert costs.distinct_experts(tokens, experts, top_k) == pytest.approx(found.mean(), abs=margin)


def test_no_token_touches_no_expert_and_many_touch_all() -> None:
    assert costs.distinct_experts(0, 8, 2) == 0
    assert costs.distinct_experts(1, 128, 8) == pytest.approx(8)
    assert costs.distinct_experts(10**5, 128, 8) == 128


@settings(deadline=None)
@given(rows=SMALL, hidden=SMALL, count=st.integers(2, 9))
def test_a_router_is_a_linear_layer_and_a_softmax_in_float32(rows: int, hidden: int, count: int) -> None:
    x, layer = torch.ones(rows, hidden).bfloat16(), nn.Linear(hidden, count, bias=False).bfloat16()
    scores = layer(x).float()
    work = costs.router(rows, hidden, count)
    assert work.flops == matmul_flops(lambda: layer(x)) + 5 * scores.numel()
    assert work.bytes == moved(x, layer.weight, layer(x), scores, scores)


@pytest.mark.parametrize(("rows", "top_k"), [(1, 2), (5, 5)], ids=["one token", "all experts"])
def test_experts_cost_what_their_products_cost(rows: int, top_k: int) -> None:
    """Two cases in which the number of experts that are touched is certain."""
    hidden, width, count = 6, 10, 5
    x = torch.ones(rows, hidden)
    gate_up, down = torch.ones(count, hidden, 2 * width), torch.ones(count, width, hidden)
    traffic: list[Tensor] = []

    def run() -> None:
        for row, expert in itertools.product(range(rows), range(top_k)):
            both = x[row : row + 1] @ gate_up[expert]
            inner = both[:, :width] * both[:, width:]
            out = inner @ down[expert]
            traffic.extend([x[row], both, both, inner, inner, out])  # read, written, read, written, read, written

    flops = matmul_flops(run)
    work = costs.experts(rows, hidden, width, count, top_k, dtype_bytes=4)
    assert work.flops == flops + 5 * rows * top_k * width  # and silu_mul
    assert work.bytes == pytest.approx(moved(*traffic, gate_up[:top_k], down[:top_k]))


def test_quantised_experts_read_fewer_bytes_and_the_same_activations() -> None:
    wide, narrow = (costs.experts(1, 256, 128, 8, 2, 2, WEIGHT_FORMATS[name]) for name in ("bfloat16", "fp8"))
    weights = 2 * 3 * 256 * 128
    assert wide.bytes - narrow.bytes == pytest.approx(weights - 2 * 4 * (2 * 128 + 256))  # less the scales
    assert wide.flops == narrow.flops


# Between devices.


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 8])
def test_a_ring_all_reduce_sends_as_many_bytes_from_each_device(ranks: int) -> None:
    """The ring itself: reduce-scatter, then all-gather, each device sending one chunk a round to its neighbour."""
    numbers = np.random.default_rng(0).integers(0, 100, (ranks, 24))
    held = [list(np.split(row.copy(), ranks)) for row in numbers]  # [rank][chunk]
    sent = [0] * ranks
    for phase, turn in itertools.product(("reduce", "gather"), range(ranks - 1)):
        shift = 0 if phase == "reduce" else 1
        chunks = [(rank - turn + shift) % ranks for rank in range(ranks)]
        messages = [held[rank][chunk].copy() for rank, chunk in enumerate(chunks)]
        for rank, (chunk, message) in enumerate(zip(chunks, messages, strict=True)):
            target = held[(rank + 1) % ranks]
            target[chunk] = target[chunk] + message if phase == "reduce" else message
            sent[rank] += 2 * len(message)  # bfloat16
    assert all((np.concatenate(chunks) == numbers.sum(0)).all() for chunks in held)
    assert sent == [costs.all_reduce(24, ranks, 2).bytes] * ranks


@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
def test_all_to_all_sends_what_does_not_stay(ranks: int) -> None:
    """Every k-subset of the experts is chosen once, so that the load is even; a copy goes out for each expert."""
    experts, top_k, hidden = 8, 2, 5
    choices = list(itertools.combinations(range(experts), top_k))
    owner = [expert * ranks // experts for expert in range(experts)]
    for device in range(ranks):
        sent = sum(hidden * 2 for chosen in choices for expert in chosen if owner[expert] != device)
        assert sent == costs.all_to_all(len(choices), hidden, top_k, ranks, 2).bytes


def test_a_link_takes_bytes_over_bandwidth() -> None:
    assert Comm(450e9).seconds(450e9) == 1.0
    assert costs.all_reduce(1e6, 1) == Comm(0)
