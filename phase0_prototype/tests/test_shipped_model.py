"""titan-tiny: its card tells the truth, and it writes what a reader recognises as Python."""

import ast
import json
import re

import pytest
import torch

from phase0_prototype import corpus
from phase0_prototype.hub import SHIPPED
from phase0_prototype.llm import LLM
from phase0_prototype.quality import held_out_loss, read_held_out
from phase0_prototype.sampling_params import SamplingParams

HOME = SHIPPED["titan-tiny"]
FLOOR = 2.3  # nats per token on held-out text


@pytest.fixture(scope="module")
def llm():
    return LLM("titan-tiny", dtype="float32", device="cpu", use="phase0=solution")


@pytest.fixture(scope="module")
def quality():
    return json.loads((HOME / "quality.json").read_text())


def test_the_held_out_loss_is_the_one_on_the_card(llm, quality):
    measured = held_out_loss(llm, read_held_out(), max_tokens=24_000)
    assert measured.tokens == quality["quick_tokens"]
    assert measured.nats_per_token == pytest.approx(quality["quick_nats_per_token"], abs=2e-3)


def test_the_card_quotes_what_was_measured_and_it_is_below_the_floor(quality):
    card = (HOME / "README.md").read_text()
    assert f"**{quality['held_out_nats_per_token']:.3f} nats/token**" in card
    assert f"{quality['held_out_bits_per_byte']:.3f} bits/byte" in card
    assert quality["held_out_nats_per_token"] <= FLOOR


def test_loss_agrees_with_transformers(llm):
    transformers = pytest.importorskip("transformers")
    ids = [0, *llm.engine.tokenizer.encode(read_held_out()[0].text)][:400]
    peer = transformers.AutoModelForCausalLM.from_pretrained(HOME, dtype=torch.float32)
    with torch.no_grad():
        theirs = peer(torch.tensor([ids]), labels=torch.tensor([ids])).loss.item()
    (output,) = llm.generate(ids, SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0), progress=False)
    ours = -sum(c[t].logprob for t, c in zip(ids[1:], output.prompt_logprobs[1:], strict=True)) / (len(ids) - 1)
    assert ours == pytest.approx(theirs, abs=1e-4)


def test_held_out_documents_are_those_that_training_leaves_out():
    held = read_held_out()
    assert len(held) > 30
    assert all(corpus.is_held_out(document.path) for document in held)
    trained = {document.path for document in corpus.documents(held_out=False)}
    assert not trained & {document.path for document in held}


def test_binary_search_becomes_a_function_that_parses(llm):
    prompt = "def binary_search("
    (output,) = llm.generate(prompt, SamplingParams(temperature=0, max_tokens=120), progress=False)
    text = prompt + output.outputs[0].text
    assert re.match(r"def binary_search\(.*\).*:\n", text), text
    body = [line for line in text.splitlines()[1:] if line.strip()]
    assert len(body) >= 3
    assert all(line.startswith(("    ", "def ", "class ", "@", "#")) for line in body), text
    assert _parses_up_to_a_line(text), text


def test_the_weights_fit_the_promise():
    size = (HOME / "model.safetensors").stat().st_size
    assert size <= 14_000_000


def _parses_up_to_a_line(text: str) -> bool:
    """Whether some prefix of at least three lines is valid Python: the end is cut in the middle of a line."""
    lines = text.splitlines()
    for end in range(len(lines), 2, -1):
        try:
            ast.parse("\n".join(lines[:end]))
        except SyntaxError:
            continue
        return True
    return False
