"""Gemma 2, and windows that change from layer to layer: what `transformers` says in float32, whoever attends."""

from __future__ import annotations

import pytest
import torch
import transformers
from transformers.models.gemma2 import modeling_gemma2

from phase0_prototype.checkpoint import checkpoint_bytes, write_checkpoint
from phase0_prototype.config import ARCHITECTURES as PHASE0
from phase0_prototype.config import parse_config
from phase0_prototype.errors import ConfigError
from phase0_prototype.layers import OffsetNorm, ScaledEmbedding
from phase0_prototype.sampling_params import SamplingParams
from phase0_prototype.tests.checkpoints import SIZES, Checkpoint, random_prompt, save, with_files
from phase2_rope.deepseek import ARCHITECTURES as PHASE2
from phase2_rope.shapes import tensor_shapes
from phase3_paged_attention.gemma import ARCHITECTURES, GEMMA2_2B

WINDOW = 10
TINY = {  # caps so low that scores of random weights reach them
    **SIZES,
    "num_hidden_layers": 3,
    "head_dim": 16,
    "query_pre_attn_scalar": 24,
    "attn_logit_softcapping": 1.5,
    "final_logit_softcapping": 2.0,
    "sliding_window": WINDOW,
    "tie_word_embeddings": True,
}
UNTIED = "biases, untied, other layers slide"
VARIANTS = {
    "as published": {},
    "no caps": {"attn_logit_softcapping": None, "final_logit_softcapping": None},
    UNTIED: {
        "attention_bias": True,
        "tie_word_embeddings": False,
        "layer_types": ["full_attention", "sliding_attention", "sliding_attention"],
    },
}
LENGTHS, NEW = (1, 40, 7, 25), (30, 12, 25, 8)  # below the window, beyond it, and across
PROMPTS = [random_prompt(length, seed=3) for length in LENGTHS]


def greedy(count, **more):
    return SamplingParams(temperature=0, max_tokens=count, **more)


PARAMS = [greedy(count) for count in NEW]


@pytest.fixture(scope="module")
def gemma(tmp_path_factory):
    made = {}

    def get(variant):
        if variant not in made:
            sizes, path = {**TINY, **VARIANTS[variant]}, tmp_path_factory.mktemp("gemma")
            made[variant] = save("Gemma2", sizes, path, seed=11, attention="eager")  # sdpa would leave the cap out
        return made[variant]

    return get


@pytest.fixture(scope="module")
def alone(gemma):
    """What transformers says to PROMPTS, one at a time."""
    return [gemma(UNTIED).greedy(p, n) for p, n in zip(PROMPTS, NEW, strict=True)]


def logits_of(llm, prompt, count):
    """Logits of the prompt's and the answer's tokens, and the answer."""
    seen, forward = [], llm.engine.runner.forward

    def spy(batch):
        logits = forward(batch)
        seen.append(logits.clone())
        return logits

    llm.engine.runner.forward = spy
    (output,) = llm.generate(prompt, greedy(count, prompt_logprobs=0))
    return torch.cat(seen), output.outputs[0].token_ids


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_of_a_prompt_in_chunks_and_of_decodes_are_those_of_transformers(variant, gemma, load):
    made, prompt = gemma(variant), random_prompt(60)
    logits, answer = logits_of(load(made, max_num_batched_tokens=17), prompt, 16)
    assert (logits - made.logits(prompt + answer[:-1])).abs().max() <= 1e-4
    assert answer == made.greedy(prompt, 16)


@pytest.mark.parametrize(
    "changes",
    [
        {"attn_logit_softcapping": None},
        {"final_logit_softcapping": None},
        {"query_pre_attn_scalar": 16},
        {"sliding_window": None, "layer_types": ["full_attention"] * 3},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_each_of_its_choices_is_seen_in_the_logits(changes, gemma, load, tmp_path):
    """Else the comparison with transformers would not see a mistake in it."""
    made, prompt = gemma("as published"), random_prompt(60)
    path = with_files(made.path, tmp_path / "other", config=changes)
    logits, _ = logits_of(load(path), prompt, 1)
    assert (logits - made.logits(prompt)).abs().max() > 0.05


SETTINGS = {
    "batched": {},
    "chunks of 7": {"max_num_batched_tokens": 7},
    "pages of 3": {"block_size": 3},
    "recomputed": {"num_blocks": 6, "max_model_len": 96, "watermark": 0, "block_size": 16},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_batches_chunks_pages_and_pressure_change_no_token(name, gemma, load, alone):
    llm = load(gemma(UNTIED), **SETTINGS[name])
    assert [output.outputs[0].token_ids for output in llm.generate(PROMPTS, PARAMS)] == alone
    assert (llm.engine.scheduler.preemptions > 0) == (name == "recomputed")


def test_half_precision_stays_near_float32(gemma, load):
    made, prompt = gemma("as published"), random_prompt(50)
    (output,) = load(made, dtype="bfloat16").generate(prompt, greedy(1, prompt_logprobs=0))
    own = torch.tensor([p[t].logprob for p, t in zip(output.prompt_logprobs[1:], prompt[1:], strict=True)])
    expected = made.logprobs(prompt)[:-1].gather(1, torch.tensor(prompt[1:])[:, None])[:, 0]
    assert (own - expected).abs().mean() < 0.03


def test_norms_and_embeddings_round_as_those_of_transformers():
    """In bfloat16 sqrt(2304) = 48 is exact, sqrt(3584) is not, and 1 + weight would lose bits of the weight."""
    torch.manual_seed(0)
    device, hidden = torch.device("cpu"), 3584
    x, weight = torch.randn(5, hidden).bfloat16(), (0.1 * torch.randn(hidden)).bfloat16()
    theirs = modeling_gemma2.Gemma2RMSNorm(hidden).bfloat16()
    theirs.weight.data.copy_(weight)
    ours = OffsetNorm("norm", hidden, 1e-6, torch.bfloat16, device)
    ours.destinations()["norm.weight"].load(weight)
    assert (ours(x) == theirs(x)).float().mean() > 0.999  # the mean of squares is summed in another order

    table = torch.randn(7, hidden).bfloat16()
    scaled = modeling_gemma2.Gemma2TextScaledWordEmbedding(7, hidden, None, embed_scale=hidden**0.5).bfloat16()
    scaled.weight.data.copy_(table)
    embedding = ScaledEmbedding("embed", 7, hidden, torch.bfloat16, device, hidden**0.5)
    embedding.destinations()["embed.weight"].load(table)
    ids = torch.arange(7)
    assert torch.equal(embedding(ids), scaled(ids))


# Windows of other models


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("Mistral", {"sliding_window": WINDOW}),
        ("Qwen2", {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1}),
        (
            "Qwen2",
            {
                "num_hidden_layers": 3,
                "use_sliding_window": True,
                "sliding_window": WINDOW,
                "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            },
        ),
    ],
    ids=["Mistral", "Qwen2 from layer 1 on", "Qwen2 by layer_types"],
)
def test_windows_of_some_or_all_layers_are_those_of_transformers(family, changes, load, tmp_path):
    made = save(family, {**SIZES, **changes}, tmp_path / "model", seed=5)
    outputs = load(made, max_num_batched_tokens=23).generate(PROMPTS, PARAMS)
    for prompt, count, output in zip(PROMPTS, NEW, outputs, strict=True):
        said = output.outputs[0].token_ids
        assert len(said) == count
        assert said == made.logits(prompt + said)[len(prompt) - 1 : -1].argmax(-1).tolist()


# Configs and checkpoints


def config(**changes):
    """Of a file where these keys differ; ... leaves one out."""
    raw = {key: value for key, value in {**GEMMA2_2B, **changes}.items() if value is not ...}
    return parse_config(raw, architectures=ARCHITECTURES)


def test_what_a_file_leaves_out_is_as_in_transformers():
    needed = ("architectures", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")
    left_out = {key: ... for key in GEMMA2_2B if key not in (*needed, "num_attention_heads")}
    assert config(**left_out) == config()
    theirs = transformers.Gemma2Config()  # its defaults are gemma-2-2b
    assert {key: getattr(theirs, key) for key in GEMMA2_2B if key not in ("architectures", "rope_theta")} == {
        key: value for key, value in GEMMA2_2B.items() if key not in ("architectures", "rope_theta")
    }
    slides = [kind == "sliding_attention" for kind in theirs.layer_types]
    assert [window == 4096 for window in config().sliding_windows] == slides
    assert config().rope.theta == theirs.rope_parameters["rope_theta"]


def test_gemma_2_2b_has_the_published_number_of_parameters():
    assert checkpoint_bytes(config(), "bfloat16") == 2 * 2_614_341_888


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"hidden_activation": "gelu"}, 'hidden_activation is "gelu": expected gelu_pytorch_tanh'),
        ({"use_bidirectional_attention": True}, "use_bidirectional_attention is true: expected false or null"),
        ({"sliding_window": None}, "sliding_window is null: expected a window, as layer_types has sliding"),
        ({"layer_types": ["full_attention"]}, "layer_types is .*: expected 26 entries"),
        ({"attn_logit_softcapping": 0}, "attn_logit_softcapping is 0: expected a number above 0"),
        ({"final_logit_softcapping": "30"}, 'final_logit_softcapping is "30"'),
        ({"query_pre_attn_scalar": None}, "query_pre_attn_scalar is null"),
    ],
)
def test_a_config_that_can_not_be_is_one_line(changes, said):
    with pytest.raises(ConfigError, match=said):
        config(**changes)


@pytest.mark.parametrize("known", [PHASE0, PHASE2], ids=["phase 0", "phase 2"])
def test_earlier_phases_refuse_it(known):
    with pytest.raises(
        ConfigError, match=r"architectures is \[\"Gemma2ForCausalLM\"\]: expected a list with one of Llama"
    ):
        parse_config(GEMMA2_2B, architectures=known)


def test_a_random_checkpoint_is_one_of_transformers_and_runs(load, tmp_path):
    raw = {**GEMMA2_2B, **TINY, "bos_token_id": 2, "eos_token_id": 1}
    path = write_checkpoint(
        raw, tmp_path / "random", dtype="float32", architectures=ARCHITECTURES, tensors=tensor_shapes
    )
    oracle = transformers.AutoModelForCausalLM.from_pretrained(path, attn_implementation="eager").eval()
    shapes = tensor_shapes(parse_config(raw, architectures=ARCHITECTURES))
    named = {name: tuple(tensor.shape) for name, tensor in oracle.named_parameters()}
    assert shapes == named
    prompt = random_prompt(20)
    logits, _ = logits_of(load(path), prompt, 1)
    expected = Checkpoint(path, oracle).logits(prompt)
    assert (logits - expected).abs().max() <= 1e-4 and expected.std() > 0.01
