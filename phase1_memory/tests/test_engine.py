"""The paged engine as a user meets it: it says what phase 0 says, however little memory there is, and nothing leaks.

Phase 0's own tests compare it to transformers. The fixture `load` checks after each test that every block is free.
"""

from __future__ import annotations

import dataclasses
import errno
import math
import os
import random

import pytest

from phase0_prototype.errors import UserError
from phase0_prototype.sampling_params import SamplingParams
from phase0_prototype.tests.checkpoints import CONTEXT, VARIANTS, random_prompt
from phase1_memory import LLM as NAMED_BY_THE_PACKAGE
from phase1_memory.llm import LLM
from phase1_memory.offload_file import FileCalls, FileTier
from phase1_memory.probe import reads_cache
from phase1_memory.tests.conftest import is_empty

LENGTHS = (1, 40, 7, 2, 19, 33, 16, 5)
PROMPTS = [random_prompt(length, seed=2) for length in LENGTHS]
NEW = (30, 12, 44, 3, 25, 1, 20, 50)  # tokens for each: they end at different times
PROMPT = random_prompt(21, seed=3)


def greedy(count, **more):
    return SamplingParams(temperature=0, max_tokens=count, **more)


def mixed(count, i):
    """Every other request samples, each with a seed of its own."""
    return greedy(count) if i % 2 else SamplingParams(max_tokens=count, seed=i, temperature=0.8, top_p=0.95)


def branched(params, n):
    """The same with n answers, which must be sampled."""
    return params if n == 1 else dataclasses.replace(params, n=n, temperature=0.8, seed=n)


PARAMS = [mixed(count, i) for i, count in enumerate(NEW)]


def said(outputs):
    return [[(c.token_ids, c.text, c.finish_reason, c.stop_reason) for c in o.outputs] for o in outputs]


@pytest.fixture(scope="module")
def made(checkpoint):
    return checkpoint("llama-gqa")


@pytest.fixture(scope="module")
def expected(made, prototype):
    """What phase 0 says to PROMPTS."""
    return said(prototype(made).generate(PROMPTS, PARAMS))


def test_the_package_names_the_llm():
    assert NAMED_BY_THE_PACKAGE is LLM


# With enough memory


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_architecture_says_what_phase_0_says(variant, checkpoint, load, prototype):
    made = checkpoint(variant)
    params = [dataclasses.replace(p, max_tokens=min(p.max_tokens, 20)) for p in PARAMS]
    right = said(prototype(made).generate(PROMPTS, params))
    assert said(load(made).generate(PROMPTS, params)) == right


@pytest.mark.parametrize("block_size", [1, 3, 50, CONTEXT, 1000])
def test_any_block_size_says_the_same(made, load, expected, block_size):
    assert said(load(made, block_size=block_size).generate(PROMPTS, PARAMS)) == expected


@pytest.mark.parametrize("settings", [{"max_num_seqs": 1}, {"max_num_seqs": 3, "max_num_batched_tokens": 20}], ids=str)
def test_small_batches_say_the_same(made, load, expected, settings):
    assert said(load(made, **settings).generate(PROMPTS, PARAMS)) == expected


def test_a_sequence_may_fill_the_context_and_the_memory_to_the_last_token(made, load):
    prompt = random_prompt(150)
    (output,) = load(made, num_blocks=CONTEXT // 16, watermark=0.9).generate(prompt, greedy(None))
    assert len(prompt) + len(output.outputs[0].token_ids) == CONTEXT
    assert output.outputs[0].token_ids == made.greedy(prompt, CONTEXT - len(prompt))


def test_an_engine_takes_the_settings_of_the_memory(made, load):
    llm = load(made, num_blocks=7, block_size=8)
    assert (llm.engine.kv.tables.num_blocks, llm.engine.kv.block_size, llm.engine.max_model_len) == (7, 8, 56)
    assert llm.config.preemption == "recompute"


# With too little


SQUEEZES = {
    "recompute": {},
    "recompute-small-blocks": {"block_size": 2, "num_blocks": 64},
    "swap-to-memory": {"preemption": "swap"},
    "swap-to-a-file": {"preemption": "swap", "swap_bytes": 0, "offload_dir": ...},
    "swap-to-both": {"preemption": "swap", "swap_bytes": 1 << 13, "offload_dir": ..., "offload_bytes": 1 << 20},
    "swap-to-little": {"preemption": "swap", "swap_bytes": 1 << 13},  # one block
}


@pytest.fixture
def squeezed(load, tmp_path):
    """An engine for which PROMPTS are too much: sequences of up to 4 blocks, 8 blocks in all."""

    def get(made, name):
        settings = {"block_size": 16, "num_blocks": 8, "watermark": 0, "max_model_len": 96, **SQUEEZES[name]}
        if "offload_dir" in settings:
            settings |= {"offload_dir": str(tmp_path)}
            settings.setdefault("offload_bytes", 1 << 20)
        return load(made, **settings)

    return get


@pytest.mark.parametrize("name", SQUEEZES)
@pytest.mark.parametrize("variant", ["llama-gqa", "mistral-window"])
def test_too_little_memory_changes_no_token(checkpoint, squeezed, prototype, variant, name):
    made = checkpoint(variant)
    assert said(squeezed(made, name).generate(PROMPTS, PARAMS)) == said(prototype(made).generate(PROMPTS, PARAMS))


@pytest.mark.usefixtures("on_demand")
@pytest.mark.parametrize("name", SQUEEZES)
def test_the_memory_does_run_out_in_these_tests(made, squeezed, name):
    llm = squeezed(made, name)
    llm.generate(PROMPTS, PARAMS)
    scheduler = llm.engine.scheduler
    assert scheduler.preemptions > 0
    swaps = name in ("swap-to-memory", "swap-to-a-file", "swap-to-both")
    assert (scheduler.recomputed_tokens == 0) == swaps
    tokens = sum(LENGTHS) + sum(NEW) - len(NEW)  # the last token of an answer is never computed
    assert llm.engine.runner.forward_tokens == tokens + scheduler.recomputed_tokens


def unreadable(descriptor, memory, offset):
    raise OSError(errno.EIO, "the disk does not read")


def rotten(descriptor, memory, offset):
    count = os.preadv(descriptor, memory, offset)
    memory[0][count // 2] ^= 1
    return count


@pytest.fixture
def on_a_bad_disk(squeezed, part, tmp_path):
    """An engine that swaps to a file from which nothing comes back as it was."""

    def get(made, read):
        engine = squeezed(made, "swap-to-memory")
        size, device = engine.engine.kv.block_bytes, engine.engine.device
        tier = FileTier(tmp_path, 100, size, calls=FileCalls(read=read))
        engine.engine.scheduler.store = part("offload").OffloadStore([tier], size, device)
        return engine

    return get


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("read", [unreadable, rotten])
def test_a_disk_that_loses_everything_changes_no_token(made, on_a_bad_disk, prototype, read, n):
    params = [branched(p, n) for p in PARAMS]
    outputs = on_a_bad_disk(made, read).generate(PROMPTS, params)
    assert said(outputs) == said(prototype(made).generate(PROMPTS, params))


@pytest.mark.usefixtures("on_demand")
@pytest.mark.parametrize("read", [unreadable, rotten])
def test_a_disk_that_loses_everything_is_noticed_and_costs_a_recomputation(made, on_a_bad_disk, read, caplog):
    llm = on_a_bad_disk(made, read)
    llm.generate(PROMPTS * 2, PARAMS * 2)
    assert llm.engine.scheduler.recomputed_tokens > 0
    assert caplog.records and all("\n" not in record.getMessage() for record in caplog.records)


@pytest.mark.parametrize("name", ["recompute", "swap-to-memory"])
def test_what_is_asked_besides_tokens_survives_a_preemption(made, squeezed, prototype, name):
    """Log-probabilities, of answer and prompt, come once, in order, and are the same."""
    params = [dataclasses.replace(p, logprobs=2, prompt_logprobs=1) for p in PARAMS]
    outputs = squeezed(made, name).generate(PROMPTS, params)
    for output, right in zip(outputs, prototype(made).generate(PROMPTS, params), strict=True):
        same_logprobs(output.prompt_logprobs[1:], right.prompt_logprobs[1:])
        same_logprobs(output.outputs[0].logprobs, right.outputs[0].logprobs)
        assert math.isclose(output.outputs[0].cumulative_logprob, right.outputs[0].cumulative_logprob, abs_tol=1e-3)


def same_logprobs(found, right):
    assert [list(position) for position in found] == [list(position) for position in right]
    for position, other in zip(found, right, strict=True):
        for token, logprob in position.items():
            assert logprob.logprob == pytest.approx(other[token].logprob, abs=1e-4)
            assert (logprob.rank, logprob.decoded_token) == (other[token].rank, other[token].decoded_token)


@pytest.mark.parametrize("seed", range(4))
def test_arrivals_and_aborts_at_any_time_disturb_nobody(made, squeezed, expected, seed):
    dice = random.Random(seed)
    engine = squeezed(made, ["recompute", "swap-to-memory", "swap-to-little", "swap-to-a-file"][seed]).engine
    waiting, ids, finished, aborted = list(range(len(PROMPTS))) * 3, {}, {}, set()
    dice.shuffle(waiting)
    while waiting or engine.has_unfinished():
        if waiting and dice.random() < 0.5:
            number = waiting.pop()
            ids[engine.add_request(PROMPTS[number], PARAMS[number])] = number
        if engine.has_unfinished():
            finished |= {o.request_id: o for o in engine.step() if o.finished}
        if dice.random() < 0.05 and (running := sorted(set(ids) - set(finished) - aborted)):
            aborted.add(dice.choice(running))
            for request_id in aborted:
                engine.abort(request_id)
    assert set(finished) == set(ids) - aborted
    for request_id, output in finished.items():
        assert said([output]) == [expected[ids[request_id]]]


def test_titan_tiny_writes_the_same_code_with_a_quarter_of_the_memory(load, prototype):
    prompts = ["def add(a, b):", "class Stack:\n    def push(self", "import os\n", "for i in range(", "return"]
    params = [greedy(40), SamplingParams(max_tokens=40, seed=1), greedy(24), greedy(33), greedy(40, n=1)]
    right = said(prototype("titan-tiny").generate(prompts, params))
    assert said(load("titan-tiny", num_blocks=8, block_size=8, watermark=0).generate(prompts, params)) == right


# Several answers to one prompt


@pytest.mark.parametrize("name", ["recompute", "swap-to-memory", "swap-to-little"])
def test_n_answers_are_those_of_phase_0_with_any_memory(made, load, squeezed, prototype, name):
    params = [SamplingParams(n=1 + i % 5, max_tokens=18, seed=i) for i in range(6)]
    right = said(prototype(made).generate(PROMPTS[:6], params))
    assert said(load(made).generate(PROMPTS[:6], params)) == right
    assert said(squeezed(made, name).generate(PROMPTS[:6], params)) == right


def test_n_answers_may_end_at_different_times(made, load, prototype):
    params = SamplingParams(n=5, max_tokens=30, seed=11, stop_token_ids=list(range(0, 320, 12)), logprobs=1)
    outputs, right = (llm.generate(PROMPT, params) for llm in (load(made), prototype(made)))
    assert said(outputs) == said(right)
    assert len({len(c.token_ids) for c in outputs[0].outputs}) > 1


@pytest.mark.usefixtures("prompts_once")
def test_the_prompt_of_n_answers_is_computed_once(made, load):
    llm = load(made)
    llm.generate(PROMPT, SamplingParams(n=6, max_tokens=9, seed=0))
    assert llm.engine.runner.forward_tokens == len(PROMPT) + 6 * 8


def test_prompt_logprobs_of_n_answers_are_there_once(made, load, prototype):
    params = SamplingParams(n=3, max_tokens=4, seed=0, prompt_logprobs=2, logprobs=0)
    (output,), (right,) = (llm.generate(PROMPT, params) for llm in (load(made, max_num_seqs=2), prototype(made)))
    same_logprobs(output.prompt_logprobs[1:], right.prompt_logprobs[1:])
    assert said([output]) == said([right])


@pytest.mark.usefixtures("prompts_once")
def test_no_branch_has_a_block_of_its_own_before_it_writes(made, load):
    llm = load(made, num_blocks=40, block_size=8)
    engine = llm.engine
    request = engine.add_request(PROMPT, SamplingParams(n=4, max_tokens=9, seed=0))  # 21 tokens: 2 blocks and a part
    engine.step()
    assert engine.kv.num_free == 40 - 3
    assert engine.kv.tables.shared_blocks() == 3
    engine.step()
    assert engine.kv.num_free == 40 - 2 - 4, "the full blocks are still shared"
    assert engine.kv.copied_blocks == 3, "the last writer needs no copy"
    engine.abort(request)


# What the caller sees


def test_a_stream_grows_to_what_generate_returns(made, load):
    llm = load(made, num_blocks=12)
    for params in (greedy(20), SamplingParams(max_tokens=25, seed=4, stop=["a", "e", "\n"]), greedy(9, logprobs=1)):
        shown = ""
        for output in llm.stream(PROMPT, params):
            assert output.outputs[0].text.startswith(shown), "shown text was taken back"
            shown = output.outputs[0].text
        assert output.outputs == llm.generate(PROMPT, params)[0].outputs


def test_streams_and_a_generate_share_too_little_memory(made, squeezed, prototype):
    llm = squeezed(made, "recompute")
    streams = [llm.stream(prompt, greedy(40)) for prompt in PROMPTS[:4]]
    last = [next(stream) for stream in streams]
    outputs = llm.generate(PROMPTS, greedy(9))
    for i, stream in enumerate(streams):
        for output in stream:
            last[i] = output
    assert said(outputs) == said(prototype(made).generate(PROMPTS, greedy(9)))
    assert said(last) == said(prototype(made).generate(PROMPTS[:4], greedy(40)))


def test_closing_a_stream_frees_its_blocks(made, load):
    llm = load(made, num_blocks=12)
    stream = llm.stream(PROMPT, SamplingParams(n=3, max_tokens=30, seed=0))
    next(stream)
    next(stream)
    assert llm.engine.kv.num_free < 12
    stream.close()
    assert llm.engine.kv.num_free == 12


STOPPING = {
    "stop-string": {"stop": ["a", "e", "0", " "]},
    "stop-string-kept": {"stop": ["a", "e", "0"], "include_stop_str_in_output": True},
    "min-tokens": {"stop": ["a", "e"], "min_tokens": 9, "max_tokens": 30},
    "stop-tokens": {"stop_token_ids": list(range(0, 320, 9)), "min_tokens": 3, "max_tokens": 20},
}


@pytest.mark.parametrize("name", STOPPING)
def test_answers_end_where_those_of_phase_0_end(made, squeezed, prototype, name):
    params = [dataclasses.replace(branched(p, 1 + i % 3), **STOPPING[name]) for i, p in enumerate(PARAMS)]
    outputs = squeezed(made, "recompute").generate(PROMPTS, params)
    assert said(outputs) == said(prototype(made).generate(PROMPTS, params))
    assert "stop" in {c.finish_reason for o in outputs for c in o.outputs}


# Rejection


@pytest.mark.usefixtures("on_demand")
def test_a_rejected_answer_says_why_and_the_others_are_whole(made, load, prototype):
    llm = load(made, num_blocks=8, watermark=0, max_model_len=96, preemption="reject")
    outputs = llm.generate(PROMPTS, [greedy(45)] * len(PROMPTS))
    rejected = 0
    for (answer,), (right,) in zip(said(outputs), said(prototype(made).generate(PROMPTS, greedy(45))), strict=True):
        if answer[2] == "abort":
            assert answer[3] == "out of KV blocks"
            assert answer[0] == right[0][: len(answer[0])] and answer[0]
            assert right[1].startswith(answer[1].rstrip("\ufffd"))
            rejected += 1
        else:
            assert answer == right
    assert 0 < rejected < len(PROMPTS)
    assert all(o.finished for o in outputs)


@pytest.mark.usefixtures("on_demand")
def test_some_of_n_answers_can_be_rejected(made, load):
    llm = load(made, num_blocks=6, watermark=0, max_model_len=96, preemption="reject")
    (output,) = llm.generate(PROMPT, SamplingParams(n=6, max_tokens=60, seed=0))
    reasons = [c.finish_reason for c in output.outputs]
    assert reasons[0] == "length" and "abort" in reasons
    assert all((c.stop_reason == "out of KV blocks") == (c.finish_reason == "abort") for c in output.outputs)


# Mistakes and interruptions


def fail_after(llm, steps, error, monkeypatch):
    """Let the n-th forward pass from now raise."""
    forward, left = llm.engine.runner.forward, [steps]

    def failing(batch):
        left[0] -= 1
        if left[0] == 0:
            raise error
        return forward(batch)

    monkeypatch.setattr(llm.engine.runner, "forward", failing)


@pytest.mark.parametrize("steps", [1, 2, 9, 30])
@pytest.mark.parametrize("name", ["recompute", "swap-to-memory", "swap-to-a-file"])
def test_after_an_interruption_the_next_call_starts_clean(made, squeezed, expected, monkeypatch, name, steps):
    llm = squeezed(made, name)
    for error in (KeyboardInterrupt(), RuntimeError("out of memory")):
        with monkeypatch.context() as patch:
            fail_after(llm, steps, error, patch)
            with pytest.raises(type(error)):
                llm.generate(PROMPTS * 2, SamplingParams(n=2, max_tokens=20, seed=1))
        assert llm.engine.kv.num_free == 8 and not llm.engine.kv.tables.tables
        assert is_empty(getattr(llm.engine.scheduler, "store", None))
    assert said(llm.generate(PROMPTS, PARAMS)) == expected


@pytest.mark.parametrize("name", ["recompute", "swap-to-memory"])
def test_a_stream_survives_the_interruption_of_somebody_else(made, squeezed, prototype, monkeypatch, name):
    """Its prompt is in the step that fails, so it must be planned again."""
    llm = squeezed(made, name)
    params = SamplingParams(n=4, max_tokens=20, seed=5)
    stream = llm.stream(PROMPTS[1], params)
    first = llm.stream(PROMPTS[0], greedy(30))
    next(first)
    with monkeypatch.context() as patch:
        fail_after(llm, 1, KeyboardInterrupt(), patch)
        llm.engine.add_request(PROMPTS[1], params)
        with pytest.raises(KeyboardInterrupt):
            llm.generate(PROMPTS, greedy(5))
    *_, last = stream
    assert said([last]) == said(prototype(made).generate(PROMPTS[1], params))
    *_, last = first
    assert said([last]) == said(prototype(made).generate(PROMPTS[0], greedy(30)))
    llm.engine.abort_all()


@pytest.mark.usefixtures("on_demand")
def test_a_stream_that_is_rejected_in_a_step_that_fails_ends(made, load, monkeypatch):
    """The scheduler has ended it; nobody has told it so yet."""
    llm = load(made, num_blocks=4, block_size=16, watermark=0, max_model_len=64, preemption="reject")
    older = llm.engine.add_request(PROMPT, greedy(40))
    stream = llm.stream(random_prompt(15), greedy(40))
    last = next(stream)
    forward = llm.engine.runner.forward

    def failing(batch):
        if batch.num_seqs == 1:
            raise RuntimeError("out of memory")
        return forward(batch)

    with monkeypatch.context() as patch:
        patch.setattr(llm.engine.runner, "forward", failing)
        with pytest.raises(RuntimeError, match="out of memory"):
            while True:
                llm.engine.step()
    llm.engine.abort(older)
    for output in stream:
        last = output
    assert (last.outputs[0].finish_reason, last.outputs[0].stop_reason) == ("abort", "out of KV blocks")


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"num_block": 4}, ("'num_block'", "did you mean num_blocks")),
        ({"num_blocks": 10**9}, ("1000000000 blocks of 16 tokens", "are free on cpu", "lower num_blocks")),
        ({"kv_cache_memory_bytes": 10**15}, ("GB of KV cache", "kv_cache_memory_bytes")),
        ({"kv_cache_memory_bytes": 1}, ("has 0", "kv_cache_memory_bytes")),
        ({"max_model_len": CONTEXT + 1}, (f"max_model_len {CONTEXT + 1}", f"{CONTEXT} positions")),
        ({"max_model_len": CONTEXT, "num_blocks": 11}, (f"max_model_len {CONTEXT}", "12 blocks", "has 11")),
        ({"preemption": "swap", "swap_bytes": 0}, ("swap_bytes=0", "offload_dir")),
        ({"preemption": "swap", "swap_bytes": 5}, ("swap_bytes=5",)),
        ({"preemption": "swap", "offload_dir": "/no/such/place"}, ("/no/such/place",)),
        ({"preemption": "wait"}, ("preemption='wait'", "recompute, swap or reject")),
        ({"allocator": "slab"}, ("allocator='slab'",)),
        ({"dtype": "int8"}, ("dtype 'int8'",)),
    ],
    ids=str,
)
def test_bad_settings_are_one_line_that_names_them(made, load, settings, named):
    with pytest.raises(UserError) as caught:
        load(made, **settings)
    message = str(caught.value)
    assert "\n" not in message
    assert all(name in message for name in named), message


def test_a_prompt_that_is_longer_than_the_memory_is_refused(made, load):
    llm = load(made, num_blocks=2)
    with pytest.raises(UserError, match="the prompt has 32 tokens, max_model_len is 32"):
        llm.generate(random_prompt(32))
    (output,) = llm.generate(random_prompt(31))
    assert len(output.outputs[0].token_ids) == 1


def test_bad_prompts_and_params_leave_nothing_behind(made, load):
    llm = load(made, num_blocks=8)
    for prompts, params in (
        ([PROMPT, [-1]], greedy(2)),
        ([PROMPT] * 2, [greedy(2)]),
        ([PROMPT, "", PROMPT], greedy(2)),
    ):
        with pytest.raises(UserError) as caught:
            llm.generate(prompts, params)
        assert "\n" not in str(caught.value)
    assert llm.engine.runner.forward_passes == 0 and llm.engine.kv.num_free == 8


# Models that keep nothing


@pytest.mark.parametrize("block_size", [1, 16])
def test_a_model_that_reads_no_cache_is_refused(made, block_size):
    with pytest.raises(UserError, match=r"phase0=framework: its model does not read the KV cache.*--phase phase0"):
        LLM(made.path, dtype="float32", device="cpu", use="phase0=framework,phase1=solution", block_size=block_size)


@pytest.mark.parametrize("block_size", [1, 2, 16])
@pytest.mark.parametrize("variant", ["llama-gqa", "llama-one-layer", "mistral-window"])
def test_one_that_does_is_not(checkpoint, load, variant, block_size):
    llm = load(checkpoint(variant), block_size=block_size)
    assert reads_cache(llm.engine.model, llm.engine.kv)
