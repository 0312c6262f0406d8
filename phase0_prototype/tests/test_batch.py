"""A step as tensors: flat, without padding, and equal to what a reader would write down by hand."""

from __future__ import annotations

import pytest
import torch

from phase0_prototype.batch import Batch
from phase0_prototype.request import Request
from phase0_prototype.sampling_params import SamplingParams
from phase0_prototype.step import ScheduledRequest, Step

CPU = torch.device("cpu")


def request(prompt, output=(), **params) -> Request:
    return Request("r", list(prompt), SamplingParams(**params), 0, (), 100, output_token_ids=list(output))


def build(*scheduled, blocks, block_size) -> Batch:
    return Batch.build(Step(tuple(ScheduledRequest(*s) for s in scheduled)), list(blocks), block_size, CPU)


def test_prompts_chunks_and_decodes_lie_one_after_the_other():
    decode = request([1, 2, 3], [4, 5])  # its last token is not computed yet
    prompt = request([6, 7, 8, 9])
    chunk = request(range(20, 30))  # positions 3..5 of 10: reaches no new token
    batch = build((decode, 4, 1), (prompt, 0, 4), (chunk, 3, 3), blocks=[(2,), (0,), (1,)], block_size=100)
    assert batch.token_ids.tolist() == [5, 6, 7, 8, 9, 23, 24, 25]
    assert batch.positions.tolist() == [4, 0, 1, 2, 3, 3, 4, 5]
    assert batch.slot_mapping.tolist() == [204, 0, 1, 2, 3, 103, 104, 105]
    assert batch.query_start.tolist() == [0, 1, 5, 8]
    assert batch.seq_lens.tolist() == [5, 4, 6]
    assert batch.block_tables.tolist() == [[2], [0], [1]]
    assert batch.logits_rows.tolist() == [0, 4]
    assert (batch.query_lens, batch.kv_lens, batch.blocks) == ((1, 4, 3), (5, 4, 6), ((2,), (0,), (1,)))
    assert (batch.num_tokens, batch.num_seqs) == (8, 3)


def test_a_chunk_may_span_prompt_and_output():
    batch = build((request([1, 2, 3], [4, 5, 6]), 1, 4), blocks=[(0,)], block_size=10)
    assert batch.token_ids.tolist() == [2, 3, 4, 5]
    assert batch.logits_rows.tolist() == []


def test_slots_follow_the_block_table_and_tables_of_different_lengths_share_a_tensor():
    batch = build((request(range(10)), 0, 10), (request([1, 2], [3]), 2, 1), blocks=[(7, 2, 5), (4,)], block_size=4)
    assert batch.slot_mapping.tolist() == [28, 29, 30, 31, 8, 9, 10, 11, 20, 21, 18]
    assert batch.block_tables.shape == (2, 3)
    assert batch.block_tables[0].tolist() == [7, 2, 5]
    assert batch.block_tables[1, 0] == 4


def test_prompt_logprobs_want_every_row_of_the_prompt_and_no_more_once_it_is_in():
    asks, plain = request([1, 2, 3], prompt_logprobs=1), request([4, 5])
    assert build((plain, 0, 2), (asks, 0, 3), blocks=[(0,), (1,)], block_size=9).logits_rows.tolist() == [1, 2, 3, 4]
    answered = request([1, 2, 3], [9], prompt_logprobs=1)
    assert build((answered, 3, 1), (plain, 0, 2), blocks=[(0,), (1,)], block_size=9).logits_rows.tolist() == [0, 2]
    assert build((answered, 0, 4), blocks=[(0,)], block_size=9).logits_rows.tolist() == [3]  # computed anew


def test_the_step_counts_its_tokens_and_knows_who_samples():
    step = Step((ScheduledRequest(request([1, 2, 3]), 0, 2), ScheduledRequest(request([1], [2]), 1, 1)))
    assert step.num_tokens == 3
    assert [s.samples for s in step.scheduled] == [False, True]


@pytest.mark.parametrize(
    ("params", "output", "token", "reason", "stop_reason"),
    [
        ({"stop_token_ids": [7]}, [], 7, "stop", 7),
        ({}, [], 9, "stop", None),  # the model's own end token
        ({"ignore_eos": True}, [], 9, None, None),
        ({"stop_token_ids": [9], "ignore_eos": True}, [], 9, "stop", 9),
        ({"min_tokens": 3, "stop_token_ids": [7]}, [1], 7, None, None),
        ({"min_tokens": 3, "stop_token_ids": [7]}, [1, 1], 7, "stop", 7),
        ({}, [1, 1, 1], 5, "length", None),
        ({"stop_token_ids": [7]}, [1, 1, 1], 7, "stop", 7),  # a stop on the last allowed token is a stop
        ({}, [1, 1, 1], 9, "stop", None),
        ({}, [1, 1], 5, None, None),
    ],
)
def test_which_token_ends_a_request(params, output, token, reason, stop_reason):
    one = Request("r", [1], SamplingParams(**params), 0, (9,), 4, output_token_ids=list(output))
    one.append(token)
    assert (one.finish_reason, one.stop_reason) == (reason, stop_reason)
    assert one.output_token_ids == [*output, token]
