"""Tests that planted.toml needs because no other test sees the bug every time."""

from __future__ import annotations

import torch

from phase0_prototype.request import Request
from phase0_prototype.sampler import adjusted_logits
from phase0_prototype.sampling_params import SamplingParams
from phase0_prototype.sampling_rows import SamplingRows


def test_a_repetition_penalty_makes_tokens_less_likely_whatever_the_sign_of_their_logits():
    """As in `transformers`: what was in the prompt or the output is divided when positive, multiplied when negative."""
    logits = torch.tensor([[3.0, -3.0, 1.0, -1.0]])
    request = Request("r", [0, 1], SamplingParams(repetition_penalty=2.0), 0, (), 5, output_token_ids=[3])
    adjusted = adjusted_logits(logits, SamplingRows.build([request], 4))
    assert adjusted.tolist() == [[1.5, -6.0, 1.0, -2.0]]
