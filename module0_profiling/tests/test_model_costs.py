"""What a model costs, against transformers: parameters, products as torch counts them, the cache; and errors."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from module0_profiling import model_costs
from module0_profiling.attention_costs import visible_pairs
from module0_profiling.model_costs import (
    Formats,
    Operation,
    decode_step,
    kv_bytes,
    kv_bytes_per_token,
    last_rows_only,
    parameters,
    prefill_step,
    step,
    step_seconds,
    total,
    weight_bytes,
)
from module0_profiling.model_shape import ARCHITECTURES, ModelError, ModelShape, load_shape, shard
from module0_profiling.number_formats import WEIGHT_FORMATS, WeightFormat
from module0_profiling.published_models import PUBLISHED
from module0_profiling.roofline import Roof

TYPES = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
    "MixtralForCausalLM": "mixtral",
    "Qwen3MoeForCausalLM": "qwen3_moe",
    "DeepseekV2ForCausalLM": "deepseek_v2",
    "DeepseekV3ForCausalLM": "deepseek_v3",
    "Gemma2ForCausalLM": "gemma2",
}
"""What transformers calls the architectures that we support."""

SIZES = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
LATENT = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 6,
    "n_routed_experts": 4,
    "n_shared_experts": 2,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
}
SMALL: Mapping[str, Mapping[str, Any]] = {
    "LlamaForCausalLM": {},
    "MistralForCausalLM": {"head_dim": 16, "sliding_window": None},
    "Qwen2ForCausalLM": {},
    "Qwen3ForCausalLM": {"head_dim": 16},
    "MixtralForCausalLM": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "Qwen3MoeForCausalLM": {
        "head_dim": 16,
        "num_experts": 5,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 24,
        "mlp_only_layers": [1],
    },
    "DeepseekV2ForCausalLM": {**LATENT, "q_lora_rank": None},  # as V2-Lite: queries in one step
    "DeepseekV3ForCausalLM": {**LATENT, "q_lora_rank": 24},
    "Gemma2ForCausalLM": {"head_dim": 16},
}


def small(architecture: str, **changes: Any) -> dict[str, Any]:
    return {"architectures": [architecture], **SIZES, **SMALL[architecture], **changes}


def config_of(raw: Mapping[str, Any]) -> Any:
    from transformers import AutoConfig

    return AutoConfig.for_model(
        TYPES[raw["architectures"][0]], **{key: value for key, value in raw.items() if key != "architectures"}
    )


def model_of(raw: Mapping[str, Any], device: str = "meta") -> nn.Module:
    """The model that transformers builds from the same fields."""
    from transformers import AutoModelForCausalLM

    with torch.device(device):
        return AutoModelForCausalLM.from_config(
            config_of(raw), attn_implementation="eager", experts_implementation="eager"
        ).eval()


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Threads that wait for each other are slower than small products."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@cache
def published(name: str) -> nn.Module:
    return model_of(PUBLISHED[name])


def held(model: nn.Module) -> dict[str, torch.Tensor]:
    """Everything that a checkpoint stores: parameters, and the router's bias, which transformers keeps as a buffer."""
    found = dict(model.named_parameters())  # a tied head is there once
    return found | {name: b for name, b in model.named_buffers() if name.endswith("e_score_correction_bias")}


# Parameters.


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_model_has_the_parameters_of_transformers(name: str) -> None:
    assert parameters(load_shape(name)) == sum(tensor.numel() for tensor in held(published(name)).values())


@pytest.mark.parametrize(
    ("name", "published_total"),
    [
        ("tinyllama-1.1b", 1_100_048_384),
        ("llama3-8b", 8_030_261_248),
        ("llama3-70b", 70_553_706_496),
        ("llama3-405b", 405_853_388_800),
        ("mixtral-8x7b", 46_702_792_704),
        ("qwen3-30b-a3b", 30_532_122_624),
        ("qwen3-235b-a22b", 235_093_634_560),
        ("deepseek-v3", 671_026_419_200),  # with 58 x 256 of the router's biases, without the MTP module
    ],
)
def test_parameters_are_those_that_the_hub_says(name: str, published_total: int) -> None:
    assert parameters(load_shape(name)) == published_total


@pytest.mark.parametrize(
    ("name", "billions"),
    [("mixtral-8x7b", 12.9), ("qwen3-30b-a3b", 3.3), ("qwen3-235b-a22b", 22), ("deepseek-v3", 37)],
)
def test_active_parameters_are_about_those_of_the_model_cards(name: str, billions: float) -> None:
    assert parameters(load_shape(name), active=True) / 1e9 == pytest.approx(billions, rel=0.02)


@pytest.mark.parametrize("name", ["mixtral-8x7b", "qwen3-30b-a3b", "qwen3-235b-a22b", "deepseek-v3"])
def test_inactive_are_the_experts_that_a_token_does_not_choose(name: str) -> None:
    shape = load_shape(name)
    assert shape.moe is not None
    routed = sum(p.numel() for n, p in published(name).named_parameters() if ".experts." in n)
    idle = routed * (shape.moe.experts - shape.moe.top_k) // shape.moe.experts
    assert parameters(shape) - parameters(shape, active=True) == idle


def test_a_dense_model_is_active_in_all_its_parameters() -> None:
    shape = load_shape("llama3-8b")
    assert parameters(shape) == parameters(shape, active=True)


def test_our_own_model_has_the_numbers_that_its_file_stores() -> None:
    directory = Path(__file__).parents[2] / "phase0_prototype" / "models" / "titan-tiny"
    data = (directory / "model.safetensors").read_bytes()
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    sizes = [torch.Size(row["shape"]).numel() for name, row in header.items() if name != "__metadata__"]
    assert parameters(load_shape("titan-tiny")) == sum(sizes) == 6_557_952
    assert load_shape(directory) == load_shape("titan-tiny")


@settings(max_examples=60, deadline=None)
@given(data=st.data(), architecture=st.sampled_from(list(TYPES)))
def test_any_small_model_has_the_parameters_and_bytes_of_transformers(data: st.DataObject, architecture: str) -> None:
    kv_heads = data.draw(st.sampled_from([1, 2, 4]), "kv heads")
    changes: dict[str, Any] = {
        "num_hidden_layers": data.draw(st.integers(1, 4), "layers"),
        "vocab_size": data.draw(st.integers(8, 99), "vocab"),
        "intermediate_size": data.draw(st.integers(1, 50), "intermediate"),
        "tie_word_embeddings": data.draw(st.booleans(), "tied"),
    }
    if "Deepseek" in architecture:
        changes["q_lora_rank"] = data.draw(st.sampled_from([None, 24]), "q_lora")
        changes["first_k_dense_replace"] = data.draw(st.integers(0, 5), "dense layers")
    else:
        changes["num_key_value_heads"] = kv_heads
    if architecture in ("LlamaForCausalLM", "Qwen3ForCausalLM", "Qwen3MoeForCausalLM", "Gemma2ForCausalLM"):
        changes["attention_bias"] = data.draw(st.booleans(), "bias")
    if architecture == "Qwen3MoeForCausalLM":
        changes["mlp_only_layers"] = data.draw(st.lists(st.integers(0, 5), max_size=4), "dense layers")
    raw = small(architecture, **changes)
    shape, tensors = load_shape(raw), held(model_of(raw)).values()
    assert parameters(shape) == sum(tensor.numel() for tensor in tensors)
    assert weight_bytes(shape) == sum(2 * tensor.numel() for tensor in tensors)


def test_every_supported_architecture_is_tried_here() -> None:
    assert list(TYPES) == list(ARCHITECTURES) == list(SMALL)
    assert {raw["architectures"][0] for raw in PUBLISHED.values()} <= set(TYPES)


# Bytes of weights and of the cache.


def scaled(tensor: torch.Tensor, name: str, stored: WeightFormat, plain: WeightFormat) -> float:
    """Bytes of a checkpoint's tensor where linear layers, and nothing else, are quantised. [..., d_out, d_in]."""
    wide = ("embed_tokens", "lm_head", "norm", "gate.", "kv_b_proj", "bias")
    if any(word in name for word in wide):
        return tensor.numel() * plain.bits / 8
    *experts, d_out, d_in = tensor.shape
    blocks = len(range(0, d_in, stored.block)) * len(range(0, d_out, stored.block)) if stored.block else 0
    groups = d_out * (len(range(0, d_in, stored.group)) if stored.group else 1)
    scales = torch.Size(experts).numel() * (blocks or groups)
    return tensor.numel() * stored.bits / 8 + scales * stored.scale_bytes


@pytest.mark.parametrize("weights", [None, "int8", "int4", "fp8", "fp8-block"])
@pytest.mark.parametrize("name", ["tinyllama-1.1b", "llama3-70b", "qwen3-30b-a3b", "deepseek-v3"])
def test_bytes_of_weights_are_those_of_every_tensor_with_its_scales(name: str, weights: str | None) -> None:
    plain, stored = WEIGHT_FORMATS["bfloat16"], WEIGHT_FORMATS[weights or "bfloat16"]
    sizes = (scaled(tensor, key, stored, plain) for key, tensor in held(published(name)).items())
    assert weight_bytes(load_shape(name), Formats(weights=weights)) == sum(sizes)


def test_a_quarter_of_the_bits_is_about_a_quarter_of_a_large_model() -> None:
    shape = load_shape("llama3-405b")
    assert weight_bytes(shape) == 2 * 405_853_388_800
    assert weight_bytes(shape, Formats(weights="int4")) / weight_bytes(shape) == pytest.approx(0.265, abs=0.005)


@pytest.mark.parametrize(
    ("name", "bytes_per_token"),
    [
        ("titan-tiny", 8 * 2 * 2 * 64 * 2),
        ("tinyllama-1.1b", 22_528),
        ("llama3-8b", 131_072),
        ("llama3-70b", 327_680),
        ("llama3-405b", 516_096),
        ("mixtral-8x7b", 131_072),
        ("qwen3-30b-a3b", 98_304),
        ("qwen3-235b-a22b", 192_512),
        ("deepseek-v3", 70_272),  # 61 layers x 576 numbers: 70.272 KB in DeepSeek's paper (arXiv 2505.09343), table 1
    ],
)
def test_a_token_takes_so_many_bytes_of_cache(name: str, bytes_per_token: int) -> None:
    shape = load_shape(name)
    assert kv_bytes_per_token(shape) == bytes_per_token
    assert kv_bytes(shape, 1000) == 1000 * bytes_per_token
    assert kv_bytes_per_token(shape, Formats(kv="fp8")) == bytes_per_token / 2
    assert kv_bytes_per_token(shape, Formats(dtype="float32")) == bytes_per_token * 2


@pytest.mark.parametrize("architecture", TYPES)
def test_the_cache_is_as_large_as_the_one_that_transformers_fills(architecture: str) -> None:
    raw, tokens = small(architecture), torch.zeros(1, 7, dtype=torch.long)
    filled = model_of(raw, "cpu")(tokens, use_cache=True).past_key_values
    size = sum(tensor.nbytes for layer in filled.layers for tensor in (layer.keys, layer.values))
    assert kv_bytes(load_shape(raw), 7, Formats(dtype="float32")) == size


def test_a_sliding_layer_keeps_its_window_and_a_full_one_everything() -> None:
    raw = small("Qwen2ForCausalLM", use_sliding_window=True, sliding_window=5, max_window_layers=1)
    shape = load_shape(raw)
    assert shape.windows == (None, 5, 5)
    one = kv_bytes_per_token(shape) / 3
    assert [kv_bytes(shape, context) / one for context in (1, 4, 5, 6, 100)] == [3, 12, 15, 16, 110]


# A step's FLOPs, module by module as torch counts them.


def counted(raw: Mapping[str, Any], batch: int, tokens: int, prefix: int = 0) -> dict[str, int]:
    """FLOPs of matrix products by part of the model; attention is what is left of `self_attn` without its layers."""
    torch.manual_seed(0)
    model = model_of(raw, "cpu")
    with torch.no_grad():
        seen = model(torch.zeros(batch, prefix, dtype=torch.long)).past_key_values if prefix else None
        new = torch.randint(0, raw["vocab_size"], (batch, tokens))
        with FlopCounterMode(display=False) as counter:
            model(new, past_key_values=seen, use_cache=True, logits_to_keep=1)
    found: dict[str, int] = {}
    for path, flops in counter.get_flop_counts().items():
        parent, _, part = path.rpartition(".")
        name = f"shared {part}" if parent.endswith("shared_experts") else part
        found[name] = found.get(name, 0) + sum(flops.values())
    layers = ("q_proj", "k_proj", "v_proj", "o_proj", "q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj")
    found["attention"] = found["self_attn"] - sum(found.get(layer, 0) for layer in layers)
    return found


PARTS = {
    "qkv": ("q_proj", "k_proj", "v_proj"),
    "o_proj": ("o_proj",),
    "q": ("q_proj",),
    "q_a": ("q_a_proj",),
    "q_b": ("q_b_proj",),
    "kv_a": ("kv_a_proj_with_mqa",),
    "kv_b": ("kv_b_proj",),
    "gate_up": ("gate_proj", "up_proj"),
    "down": ("down_proj",),
    "shared gate_up": ("shared gate_proj", "shared up_proj"),
    "shared down": ("shared down_proj",),
    "router": ("gate",),
    "experts": ("experts",),
    "lm_head": ("lm_head",),
}


@pytest.mark.parametrize(("tokens", "prefix"), [(7, 0), (3, 5), (1, 6)], ids=["prefill", "chunk", "decode"])
@pytest.mark.parametrize("architecture", TYPES)
def test_every_product_of_a_step_is_one_that_transformers_does(architecture: str, tokens: int, prefix: int) -> None:
    batch, raw = 2, small(architecture)
    shape = load_shape(raw)
    found, operations = counted(raw, batch, tokens, prefix), step(shape, batch, tokens, prefix)
    moe, rows = shape.moe, batch * tokens
    beside = {}  # FLOPs that are not of a matrix product: softmax of the router, silu_mul of the experts
    if moe:
        beside["router"] = 5 * rows * moe.experts * shape.moe_layers
        beside["experts"] = 5 * rows * moe.top_k * moe.intermediate * shape.moe_layers
    if shape.mla and prefix:  # transformers expands every latent; absorbing is in test_costs
        operations = [o for o in operations if not o.name.startswith(("absorb", "attention"))]
        operations += model_costs._expanded(shape, shape.mla, batch, tokens, prefix, Formats())
    products = {o.name: o.total.flops for o in operations if o.kind == "linear"}
    assert set(products) <= set(PARTS)
    for name, flops in products.items():
        assert flops - beside.get(name, 0) == sum(found.get(part, 0) for part in PARTS[name]), name

    attention = sum(o.total.flops for o in operations if o.kind == "attention")
    in_full = tokens * (prefix + tokens)  # transformers multiplies every pair, and masks afterwards
    assert attention * in_full == found["attention"] * visible_pairs(tokens, prefix)
    everything = sum(products.values()) - sum(beside.values()) + found["attention"]
    assert everything == found["Global"]  # no product of the model is left out


@pytest.mark.parametrize("name", ["tinyllama-1.1b", "llama3-8b"])
@pytest.mark.parametrize("rows", [1, 64])
def test_bytes_of_the_products_are_those_of_weights_inputs_and_outputs(name: str, rows: int) -> None:
    """Of each nn.Linear of transformers; ours read the input of q, k and v once, and that of gate and up."""
    sizes = []
    for layer in published(name).modules():
        if isinstance(layer, nn.Linear):
            x = torch.empty(rows, layer.in_features, device="meta")
            sizes.append(2 * sum(tensor.numel() for tensor in (x, layer.weight, layer(x))))
    shape = load_shape(name)
    again = 3 * shape.layers * rows * shape.hidden * 2
    ours = sum(o.total.bytes for o in decode_step(shape, rows, 1) if o.kind == "linear")
    assert ours == sum(sizes) - again


def works(operations: list[Operation]) -> dict[str, Operation]:
    assert len({operation.name for operation in operations}) == len(operations)
    return {operation.name: operation for operation in operations}


TINYLLAMA = load_shape("tinyllama-1.1b")


def test_decode_step_reads_the_weights_of_a_1_1b_model_once() -> None:
    products = [o for o in decode_step(TINYLLAMA, batch=1, context=1) if o.kind == "linear"]
    without = 32000 * 2048 + 45 * 2048  # the embedding is a gather; norms are counted apart
    weights = 1_100_048_384 - without
    assert total(products).flops == 2 * weights
    assert total(products).bytes == pytest.approx(2 * weights, rel=2e-3)  # and small activations


def test_decode_floor_at_31_gb_a_second_is_15_tokens_a_second() -> None:
    operations, roof = decode_step(TINYLLAMA, batch=1, context=128), Roof(flops=2.5e12, bandwidth=31e9)
    floor = step_seconds(operations, roof)
    assert 1 / floor == pytest.approx(15, abs=0.2)  # 2.07 GB of weights: 66.7 ms
    assert floor >= roof.seconds(total(operations))  # operations one by one are never faster than all as one


def test_cache_traffic_grows_with_batch_and_context_and_weights_do_not() -> None:
    small, large = works(decode_step(TINYLLAMA, 1, 1000)), works(decode_step(TINYLLAMA, 8, 2000))
    assert large["attention"].total.bytes == pytest.approx(16 * small["attention"].total.bytes, rel=0.01)
    assert large["gate_up"].total.bytes == pytest.approx(small["gate_up"].total.bytes, rel=0.01)
    assert large["attention"].positions == 2000


@pytest.mark.parametrize("name", PUBLISHED)
def test_prefill_of_one_token_is_a_decode_at_context_one(name: str) -> None:
    assert prefill_step(load_shape(name), 3, 1) == decode_step(load_shape(name), 3, 1)


def test_prefill_computes_logits_for_the_last_token_of_each_prompt_only() -> None:
    prefill, decode = works(prefill_step(TINYLLAMA, 2, 100)), works(decode_step(TINYLLAMA, 2, 100))
    assert prefill["lm_head"] == decode["lm_head"]
    assert prefill["down"].total.flops == 100 * decode["down"].total.flops


def test_prefill_is_compute_bound_where_decode_is_memory_bound() -> None:
    a100 = Roof(flops=312e12, bandwidth=2.0e12)
    assert a100.bound_by(total(decode_step(TINYLLAMA, 1, 512))) == "memory"
    assert a100.bound_by(total(prefill_step(TINYLLAMA, 1, 1024))) == "compute"


def test_a_large_batch_reads_every_expert_and_one_sequence_its_own_eight() -> None:
    shape = load_shape("qwen3-30b-a3b")
    expert = 3 * 2048 * 768 * 2 * 48  # bytes of one, in all layers
    one, many = (works(decode_step(shape, batch, 1))["experts"] for batch in (1, 1024))
    assert one.total.bytes == pytest.approx(8 * expert, rel=0.01) and one.rows == pytest.approx(1)
    activations = 1024 * 8 * (2 * 2048 + 6 * 768) * 2 * 48
    assert many.total.bytes == pytest.approx(128 * expert + activations)
    assert many.rows == pytest.approx(1024 * 8 / 128)


def test_sliding_layers_read_their_window_and_are_an_operation_of_their_own() -> None:
    raw = small("Qwen3ForCausalLM", use_sliding_window=True, sliding_window=16, max_window_layers=2)
    found = works(decode_step(load_shape(raw), 1, 100))
    full, sliding = found["attention"], found["attention, window 16"]
    assert (full.times, full.positions) == (2, 100) and (sliding.times, sliding.positions) == (1, 16)
    assert full.work.flops / sliding.work.flops == 100 / 16


def test_deepseek_absorbs_for_few_queries_and_expands_for_a_long_prefill() -> None:
    """Absorbing costs 2 L (P + V) a query and head, expanding as much a position: worth it up to 170 new tokens."""
    shape = load_shape("deepseek-v3")
    for tokens in (1, 100, 170):
        assert "attention, absorbed" in works(step(shape, 1, tokens, 10**6))
    for tokens, prefix in ((171, 10**6), (4096, 0), (1, 0)):
        assert "attention, expanded" in works(step(shape, 1, tokens, prefix))


def test_a_decode_of_deepseek_reads_one_latent_a_position_for_all_its_heads() -> None:
    attention = works(decode_step(load_shape("deepseek-v3"), 32, 4096))["attention, absorbed"]
    queries = 32 * 61 * 128 * (576 + 512) * 2
    assert attention.total.bytes == 32 * 4096 * 70_272 + queries


# Formats.


def test_formats_say_what_is_stored_and_at_which_rate_it_is_multiplied() -> None:
    assert (Formats().bytes, Formats().kv_bytes, Formats().linear.bits, Formats().rate) == (2, 2, 16, "bfloat16")
    mixed = Formats("float16", weights="int4", kv="fp8")
    assert (mixed.bytes, mixed.kv_bytes, mixed.linear.bits, mixed.rate) == (2, 1, 4, "float16")  # widened, then fp16
    assert Formats(weights="fp8-block").rate == "fp8"
    assert Formats("float32").linear.bits == 32


def test_quantised_weights_leave_head_router_and_absorbed_products_as_they_are() -> None:
    shape = load_shape("deepseek-v3")
    plain, packed = (works(decode_step(shape, 4, 100, Formats(weights=w))) for w in (None, "fp8-block"))
    same = {"lm_head", "router", "absorb W_UK", "absorb W_UV"}
    for name, operation in plain.items():
        if operation.kind == "linear":
            halved = packed[name].work.bytes < operation.work.bytes
            assert (halved, packed[name].rate) == ((False, "bfloat16") if name in same else (True, "fp8"))
        else:
            assert packed[name] == operation


def test_a_quantised_cache_changes_what_is_written_and_read() -> None:
    plain, packed = (works(decode_step(TINYLLAMA, 4, 100, Formats(kv=kv))) for kv in (None, "fp8"))
    changed = {name for name in plain if plain[name] != packed[name]}
    assert changed == {"kv write", "attention"}


@pytest.mark.parametrize(
    ("option", "given_value", "message"),
    [
        ("dtype", "int4", "--dtype int4 is unknown: use float32, float16, bfloat16"),
        ("weights", "int3", "--weights int3 is unknown: use float32, .*fp8-block"),
        ("kv", "int4", "--kv-dtype int4 is unknown"),
    ],
)
def test_an_unknown_format_is_one_line_that_lists_the_known(option: str, given_value: str, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        Formats(**{option: given_value})


# Tensor parallelism.

COPIED = ("q_a", "kv_a", "router")
"""Products that every device does in full."""


@pytest.mark.parametrize("ranks", [2, 4, 8])
@pytest.mark.parametrize("name", ["llama3-8b", "llama3-405b", "mixtral-8x7b", "deepseek-v3"])
def test_products_of_all_devices_together_are_those_of_the_model(name: str, ranks: int) -> None:
    shape = load_shape(name)
    whole, part = works(step(shape, 4, 16, 64)), works(step(shard(shape, ranks), 4, 16, 64, ranks=ranks))
    for operation in whole.values():
        if operation.kind in ("linear", "attention"):
            copies = 1 if operation.name in COPIED else ranks
            assert copies * part[operation.name].total.flops == operation.total.flops, operation.name
    assert set(part) - set(whole) == {"all-reduce", "gather logits"}


def test_devices_beyond_the_key_value_heads_hold_copies_of_them() -> None:
    shape = load_shape("qwen3-30b-a3b")  # four key-value heads
    assert [kv_bytes_per_token(shard(shape, ranks)) for ranks in (1, 2, 4, 8)] == [98_304, 49_152, 24_576, 24_576]
    deepseek = load_shape("deepseek-v3")
    assert kv_bytes_per_token(shard(deepseek, 8)) == 70_272  # every device needs the whole latent


@pytest.mark.parametrize("name", ["llama3-70b", "mixtral-8x7b", "deepseek-v3"])
def test_weights_of_all_devices_are_those_of_the_model_and_copies_of_what_is_not_split(name: str) -> None:
    shape, ranks = load_shape(name), 8
    words = ("norm", "gate.", "q_a_proj", "kv_a_proj")
    copied = sum(2 * tensor.numel() for key, tensor in held(published(name)).items() if any(w in key for w in words))
    assert ranks * weight_bytes(shard(shape, ranks)) == weight_bytes(shape) + (ranks - 1) * copied


def test_a_split_step_sends_two_sums_a_layer_and_the_logits() -> None:
    shape = load_shape("llama3-8b")
    found = works(step(shard(shape, 4), 2, 3, 5, ranks=4))
    reduce, gather = found["all-reduce"], found["gather logits"]
    assert reduce.comm is not None and gather.comm is not None
    assert reduce.times == 2 * 32 and reduce.comm.bytes == 2 * 3 / 4 * (2 * 3 * 4096) * 2
    assert gather.comm.bytes == 3 * (2 * 128256 // 4) * 2  # its quarter to each of three others


def test_one_device_holds_the_whole_model_and_sends_nothing() -> None:
    assert shard(TINYLLAMA, 1) == TINYLLAMA
    assert not any(operation.comm for operation in step(TINYLLAMA, 2, 3, 5))


@pytest.mark.parametrize(
    ("name", "ranks", "message"),
    [
        ("tinyllama-1.1b", 3, "--tp 3 does not divide heads = 32 of tinyllama-1.1b"),
        ("titan-tiny", 8, "--tp 8 does not divide heads = 4 of titan-tiny"),
        ("qwen3-30b-a3b", 64, "--tp 64 does not divide heads = 32 of qwen3-30b-a3b"),
    ],
)
def test_a_model_that_cannot_be_divided_is_one_line(name: str, ranks: int, message: str) -> None:
    with pytest.raises(ModelError) as refused:
        shard(load_shape(name), ranks)
    assert str(refused.value) == message


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"intermediate": 5634}, "intermediate_size = 5634"),
        ({"vocab": 32001}, "vocab_size = 32001"),
        ({"heads": 36, "kv_heads": 6}, "num_key_value_heads = 6"),
    ],
)
def test_each_width_must_be_divisible(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=f"--tp 4 does not divide {message} of tinyllama"):
        shard(replace(TINYLLAMA, **changes), 4)


# Reading a config.


@pytest.mark.parametrize("form", ["directory", "file", "mapping", "name"])
def test_a_shape_is_read_from_a_directory_a_file_its_content_or_a_name(form: str, tmp_path: Path) -> None:
    raw = dict(PUBLISHED["llama3-8b"])
    (tmp_path / "some-llama").mkdir()
    file = tmp_path / "some-llama" / "config.json"
    file.write_text(json.dumps(raw))
    forms: dict[str, Any] = {"directory": file.parent, "file": str(file), "mapping": raw, "name": "LLAMA3-8B"}
    name = {"mapping": "", "name": "llama3-8b"}.get(form, "some-llama")
    expected = ModelShape(4096, 14336, 32, 32, 8, 128, 128256, name=name)
    assert load_shape(forms[form]) == expected


REQUIRED = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
MLA_SIZES = ("kv_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim")


@pytest.mark.parametrize(
    ("architecture", "key"),
    [
        *(("LlamaForCausalLM", key) for key in REQUIRED),
        *(("DeepseekV3ForCausalLM", key) for key in (*MLA_SIZES, "moe_intermediate_size", "num_experts_per_tok")),
        ("MixtralForCausalLM", "num_local_experts"),
        ("MixtralForCausalLM", "num_experts_per_tok"),
        ("Qwen3MoeForCausalLM", "num_experts"),
        ("Qwen3MoeForCausalLM", "moe_intermediate_size"),
    ],
)
def test_a_size_that_is_missing_or_no_whole_number_is_one_line_with_file_and_field(
    architecture: str, key: str, tmp_path: Path
) -> None:
    file = tmp_path / "config.json"
    for value in (None, "64", 64.5, 0, -1, True, [64]):
        file.write_text(json.dumps(small(architecture, **{key: value})))
        with pytest.raises(ModelError) as refused:
            load_shape(tmp_path)
        line = str(refused.value)
        assert line.startswith(f"{file}: {key} is ") and "\n" not in line
        assert ("missing" if value is None else repr(value)) in line


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_key_value_heads": 3}, "num_key_value_heads is 3, which does not divide 4 heads"),
        ({"head_dim": "8"}, "head_dim is '8'"),
        ({**small("MixtralForCausalLM"), "num_experts_per_tok": 5}, "num_experts_per_tok is 5, of only 4 experts"),
        ({"architectures": ["GPT2LMHeadModel"]}, r"architectures is \['GPT2LMHeadModel'\], supported are LlamaFor"),
        ({"architectures": None}, "architectures is None, supported are"),
        ({"architectures": []}, r"architectures is \[\], supported are"),
        ({"architectures": [["LlamaForCausalLM"]]}, "supported are"),
        ({"architectures": {"a": 1}}, "supported are"),
        ({"architectures": ["MistralForCausalLM"], "sliding_window": "4096"}, "sliding_window is '4096'"),
        ({"architectures": ["Qwen2ForCausalLM"], "use_sliding_window": True, "sliding_window": 0.5}, "sliding_window"),
    ],
)
def test_a_field_that_makes_no_sense_is_one_line(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=f"^config: .*{message}"):
        load_shape({**small("LlamaForCausalLM"), **changes})


@pytest.mark.parametrize(
    ("architecture", "changes", "key"),
    [
        ("Qwen3MoeForCausalLM", {"decoder_sparse_step": 2}, "decoder_sparse_step"),
        ("Qwen3MoeForCausalLM", {"mlp_only_layers": 2}, "mlp_only_layers"),
        ("DeepseekV3ForCausalLM", {"moe_layer_freq": 2}, "moe_layer_freq"),
    ],
)
def test_an_arrangement_of_layers_that_is_not_modelled_is_refused(
    architecture: str, changes: dict[str, Any], key: str
) -> None:
    with pytest.raises(ModelError, match=f"^config: {key} is "):
        load_shape(small(architecture, **changes))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "cannot be read as JSON: Expecting property name"),
        (b"", "cannot be read as JSON"),
        (b"\xff\xfe\x00", "cannot be read as JSON"),
        (b"[1, 2]", "holds list, expected an object"),
    ],
)
def test_a_file_that_is_no_config_is_one_line_that_names_it(content: bytes, message: str, tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_bytes(content)
    with pytest.raises(ModelError) as refused:
        load_shape(tmp_path)
    assert str(refused.value).startswith(f"{file} {message}") and "\n" not in str(refused.value)


def test_an_unknown_name_lists_the_bundled_ones() -> None:
    with pytest.raises(ModelError) as refused:
        load_shape("llama9-9b")
    assert str(refused.value).startswith("model 'llama9-9b': no such file, and not one of the bundled titan-tiny, ")
    assert all(name in str(refused.value) for name in PUBLISHED)


def test_a_directory_without_a_config_is_told_apart_from_a_name(tmp_path: Path) -> None:
    with pytest.raises(ModelError) as refused:
        load_shape(tmp_path)
    assert str(tmp_path) in str(refused.value) and "config.json" in str(refused.value)
    assert "\n" not in str(refused.value)


SCALARS = st.none() | st.booleans() | st.integers(-1, 4) | st.floats() | st.text(max_size=3)
VALUES = st.one_of(SCALARS, st.lists(SCALARS, max_size=3), st.dictionaries(st.text(max_size=2), SCALARS, max_size=2))


@settings(max_examples=300, deadline=None)
@given(data=st.data(), architecture=st.sampled_from(list(TYPES)))
def test_any_content_is_a_shape_or_one_line(data: st.DataObject, architecture: str) -> None:
    raw = small(architecture, use_sliding_window=True)
    fields = [*raw, "sliding_window", "max_window_layers", "layer_types", "head_dim", "decoder_sparse_step"]
    for key in data.draw(st.lists(st.sampled_from(fields), max_size=3, unique=True), "fields"):
        raw[key] = data.draw(VALUES, key)
    try:
        shape = load_shape(raw)
    except ModelError as error:
        assert str(error).startswith("config: ") and "\n" not in str(error)
    else:
        assert total(decode_step(shape, 1, 10)).bytes > 0 and parameters(shape) > 0


@pytest.mark.parametrize(
    ("architecture", "changes"),
    [
        ("LlamaForCausalLM", {"sliding_window": 4}),
        ("MistralForCausalLM", {"sliding_window": 4}),
        ("MistralForCausalLM", {"sliding_window": None}),
        ("MixtralForCausalLM", {"sliding_window": 4}),
        ("MixtralForCausalLM", {}),
        ("Qwen2ForCausalLM", {"use_sliding_window": False, "sliding_window": 4, "max_window_layers": 0}),
        ("Qwen2ForCausalLM", {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 2}),
        ("Qwen2ForCausalLM", {"use_sliding_window": True, "sliding_window": 4}),
        ("Qwen3ForCausalLM", {"use_sliding_window": True, "sliding_window": None, "max_window_layers": 0}),
        (
            "Qwen3ForCausalLM",
            {
                "use_sliding_window": True,
                "sliding_window": 4,
                "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            },
        ),
        ("Qwen3MoeForCausalLM", {"use_sliding_window": True, "sliding_window": 4}),
        ("Gemma2ForCausalLM", {"sliding_window": 4}),
        (
            "Gemma2ForCausalLM",
            {
                "sliding_window": 4,
                "layer_types": ["full_attention", "full_attention", "sliding_attention"],
            },
        ),
    ],
)
def test_layers_slide_where_those_of_transformers_do(architecture: str, changes: dict[str, Any]) -> None:
    """Seen in the attention weights themselves: how many positions the last of ten tokens gives a weight to."""
    raw = small(architecture, **changes)
    out = model_of(raw, "cpu")(torch.arange(10)[None], output_attentions=True)
    seen = [int((weights[0, 0, -1] > 0).sum()) for weights in out.attentions]
    shape = load_shape(raw)
    windows = shape.windows or (None,) * shape.layers
    assert [window or 10 for window in windows] == seen


def test_mistral_slides_by_default_and_mixtral_does_not() -> None:
    raw = small("MistralForCausalLM")
    del raw["sliding_window"]
    assert load_shape(raw).windows == (config_of(raw).sliding_window,) * 3 == (4096,) * 3
    raw = small("MixtralForCausalLM")
    assert config_of(raw).sliding_window is None and load_shape(raw).windows == ()
    raw = small("Qwen3MoeForCausalLM", use_sliding_window=True)
    assert load_shape(raw).windows == (config_of(raw).sliding_window,) * 3 == (4096,) * 3


@pytest.mark.parametrize("architecture", [name for name in TYPES if "Deepseek" not in name])
def test_a_config_without_a_head_dim_has_that_of_transformers(architecture: str) -> None:
    raw = small(architecture)
    raw.pop("head_dim", None)
    shape = load_shape(raw)
    assert parameters(shape) == sum(tensor.numel() for tensor in held(model_of(raw)).values())


def test_a_last_layer_of_the_last_tokens_does_the_arithmetic_that_is_used():
    """Multiplied out by hand for TinyLlama: beyond q, k and v, its last layer has one row for each prompt."""
    whole, one = prefill_step(TINYLLAMA, 2, 100), decode_step(TINYLLAMA, 2, 100)
    saved = total(whole).flops - total(last_rows_only(whole, one, TINYLLAMA)).flops
    products = 2 * (200 - 2) * (2048 * 2048 + 3 * 2048 * 5632)
    attention = 2 * 2 * 32 * 64 * 2 * (100 * 101 // 2 - 100)
    assert saved == pytest.approx(products + attention, rel=0.01)
