"""The offline API as a user meets it: sampling parameters, streams, mistakes, interruptions, and using it again."""

from __future__ import annotations

import dataclasses
import math
import re

import pytest
import torch

from phase0_prototype.errors import UserError
from phase0_prototype.llm import LLM
from phase0_prototype.sampling_params import SamplingParams
from phase0_prototype.tests.checkpoints import CONTEXT, VOCAB, random_prompt, with_files

PROMPT = random_prompt(12, seed=3)


@pytest.fixture(scope="module")
def made(checkpoint):
    return checkpoint("llama-gqa")


@pytest.fixture(scope="module")
def llm(made, load):
    return load(made, max_num_seqs=4)


@pytest.fixture(scope="module")
def said(llm):
    """Forty greedy tokens after PROMPT."""
    return tokens(llm.generate(PROMPT, greedy(40)))


@pytest.fixture(autouse=True)
def nothing_is_left_behind(llm):
    yield
    engine = llm.engine
    assert not engine.has_unfinished()
    assert engine.kv.num_free == 4
    assert not engine._answers and not engine._of_request


def greedy(count, **more):
    return SamplingParams(temperature=0, max_tokens=count, **more)


def tokens(outputs):
    (output,) = outputs
    (completion,) = output.outputs
    return completion.token_ids


def text_of(llm, ids):
    return llm.engine.tokenizer.decode(ids)


def fail_after(llm, steps, error, monkeypatch):
    """Let the n-th forward pass from now raise."""
    forward, left = llm.engine.runner.forward, [steps]

    def failing(batch):
        left[0] -= 1
        if left[0] == 0:
            raise error
        return forward(batch)

    monkeypatch.setattr(llm.engine.runner, "forward", failing)


# What is generated


def test_prompts_come_in_every_shape_and_answers_in_their_order(llm):
    text = "def add(a"
    ids = llm.engine.tokenizer.encode(text)
    single = llm.generate(text, greedy(4))[0]
    assert (single.prompt, single.prompt_token_ids) == (text, ids)
    given = [text, ids, tuple(ids), {"prompt": text}, {"prompt_token_ids": ids}, PROMPT]
    outputs = llm.generate(given, greedy(4))
    assert [o.prompt_token_ids for o in outputs] == [ids] * 5 + [PROMPT]
    assert [o.prompt for o in outputs] == [text, None, None, text, None, None]
    assert len({tuple(o.outputs[0].token_ids) for o in outputs[:5]}) == 1
    assert llm.generate([]) == []
    assert len(llm.generate(PROMPT)[0].outputs[0].token_ids) == 16


def test_each_prompt_can_have_its_own_parameters(llm):
    outputs = llm.generate([PROMPT] * 3, [greedy(2), greedy(7), SamplingParams(max_tokens=3, seed=1)])
    assert [len(o.outputs[0].token_ids) for o in outputs] == [2, 7, 3]


def test_times_are_in_order(llm):
    metrics = llm.generate(PROMPT, greedy(3))[0].metrics
    assert metrics.arrival_time < metrics.first_token_time < metrics.finished_time


def test_the_same_seed_says_the_same_whatever_else_is_in_the_batch(llm):
    params = SamplingParams(max_tokens=12, seed=7, top_p=0.9)
    alone = tokens(llm.generate(PROMPT, params))
    others = [random_prompt(length) for length in (3, 30, 1, 8)]
    for place in range(5):
        prompts = [*others[:place], PROMPT, *others[place:]]
        all_params = [params if p is PROMPT else SamplingParams(max_tokens=3 + len(p) % 7) for p in prompts]
        assert llm.generate(prompts, all_params)[place].outputs[0].token_ids == alone
    assert tokens(llm.generate(PROMPT, dataclasses.replace(params, seed=8))) != alone


def test_requests_without_a_seed_differ_and_the_engines_seed_repeats_them_all(made, load):
    params = SamplingParams(max_tokens=12)
    runs = [[o.outputs[0].token_ids for o in load(made, seed=s).generate([PROMPT] * 3, params)] for s in (5, 5, 6)]
    assert runs[0] == runs[1] != runs[2]
    assert len({tuple(one) for one in runs[0]}) == 3


def test_n_outputs_are_different_complete_and_repeatable(llm):
    params = SamplingParams(n=6, max_tokens=8, seed=3)  # more than the cache has rows
    first, other = llm.generate([PROMPT, PROMPT[:5]], params)
    assert [c.index for c in first.outputs] == list(range(6))
    assert len({tuple(c.token_ids) for c in first.outputs}) == 6
    assert all(len(c.token_ids) == 8 and c.text == text_of(llm, c.token_ids) for c in first.outputs)
    assert [c.token_ids for c in llm.generate(PROMPT, params)[0].outputs] == [c.token_ids for c in first.outputs]
    assert other.prompt_token_ids == PROMPT[:5] and len(other.outputs) == 6


def test_n_outputs_may_end_at_different_times(llm):
    stops = list(range(0, VOCAB, 12))
    (output,) = llm.generate(PROMPT, SamplingParams(n=5, max_tokens=30, seed=11, stop_token_ids=stops))
    assert len({len(c.token_ids) for c in output.outputs}) > 1
    assert all((c.token_ids[-1] in stops) == (c.finish_reason == "stop") for c in output.outputs)


# When it ends


def test_max_tokens_none_goes_to_the_end_of_the_context(llm):
    (output,) = llm.generate(PROMPT, greedy(None))
    assert len(output.outputs[0].token_ids) == CONTEXT - len(PROMPT)
    assert output.outputs[0].finish_reason == "length"


def test_a_stop_string_ends_the_text_before_it(llm, said):
    text = text_of(llm, said)
    stop = text[9:12]
    at = text.index(stop)
    (output,) = llm.generate(PROMPT, greedy(40, stop=["\x00never", stop]))
    (completion,) = output.outputs
    assert (completion.text, completion.finish_reason, completion.stop_reason) == (text[:at], "stop", stop)
    assert completion.token_ids == said[: len(completion.token_ids)]
    assert stop in text_of(llm, completion.token_ids), "the tokens of the stop string are kept"
    (kept,) = llm.generate(PROMPT, greedy(40, stop=stop, include_stop_str_in_output=True))
    assert kept.outputs[0].text == text[: at + len(stop)]


def ends_in_ascii(llm, said):
    """A number of tokens whose text ends in a character of its own that did not occur before."""
    for count in range(3, len(said)):
        text, last = text_of(llm, said[:count]), text_of(llm, [said[count - 1]])
        if last.isascii() and last and last not in text[: -len(last)]:
            return count, last
    raise AssertionError("the random model should say something readable: change the seed")


def test_a_stop_string_on_the_last_allowed_token_is_a_stop(llm, said):
    count, last = ends_in_ascii(llm, said)
    completion = llm.generate(PROMPT, greedy(count, stop=last))[0].outputs[0]
    assert (completion.finish_reason, completion.stop_reason) == ("stop", last)
    assert len(completion.token_ids) == count
    assert not completion.text.endswith(last)


def test_what_could_have_been_a_stop_string_is_shown_when_the_length_ends_it(llm, said):
    count, last = ends_in_ascii(llm, said)
    completion = llm.generate(PROMPT, greedy(count, stop=last + "\x00never"))[0].outputs[0]
    assert (completion.finish_reason, completion.text) == ("length", text_of(llm, said[:count]))


def test_a_stop_token_ends_it_and_leaves_no_text(llm, said):
    place = next(i for i in range(4, 40) if said[i] not in said[:i])
    (output,) = llm.generate(PROMPT, greedy(40, stop_token_ids=[said[place]]))
    (completion,) = output.outputs
    assert (completion.token_ids, completion.finish_reason) == (said[: place + 1], "stop")
    assert completion.stop_reason == said[place]
    assert completion.text == text_of(llm, said[:place])


def test_the_models_end_token_ends_it_unless_ignored(made, load, said, tmp_path):
    place = next(i for i in range(4, 40) if said[i] not in said[:i])
    ending = load(with_files(made.path, tmp_path / "eos", generation_config={"eos_token_id": [VOCAB - 1, said[place]]}))
    completion = ending.generate(PROMPT, greedy(40))[0].outputs[0]
    assert (completion.token_ids, completion.finish_reason) == (said[: place + 1], "stop")
    assert completion.stop_reason is None
    assert tokens(ending.generate(PROMPT, greedy(40, ignore_eos=True))) == said
    patient = ending.generate(PROMPT, greedy(40, min_tokens=place + 5))[0].outputs[0].token_ids
    assert len(patient) >= place + 5 and said[place] not in patient[: place + 4]
    assert patient[:place] == said[:place]


def test_min_tokens_holds_back_stop_strings_too(llm, said):
    stop = text_of(llm, said)[2:4]
    completion = llm.generate(PROMPT, greedy(40, stop=stop, min_tokens=20))[0].outputs[0]
    assert len(completion.token_ids) >= 20
    assert completion.text.startswith(text_of(llm, said[:10]))


# Log-probabilities


@pytest.mark.parametrize("k", [0, 3, -1])
def test_logprobs_are_transformers_log_softmax(llm, made, k):
    (output,) = llm.generate([PROMPT], greedy(6, logprobs=k))
    (completion,) = output.outputs
    expected = made.logprobs(PROMPT + completion.token_ids)[len(PROMPT) - 1 : -1]
    assert len(completion.logprobs) == 6
    for token, row, candidates in zip(completion.token_ids, expected, completion.logprobs, strict=True):
        assert len(candidates) == {0: 1, 3: 3, -1: VOCAB}[k]
        assert next(iter(candidates)) == token
        for candidate, found in candidates.items():
            assert found.logprob == pytest.approx(row[candidate].item(), abs=1e-4)
            assert found.rank == 1 + int((row > row[candidate]).sum())
            assert found.decoded_token == llm.engine.tokenizer.decode([candidate], skip_special_tokens=False)
    assert completion.cumulative_logprob == pytest.approx(
        sum(c[t].logprob for c, t in zip(completion.logprobs, completion.token_ids, strict=True))
    )


def test_logprobs_belong_to_those_who_asked(llm, made):
    asks = SamplingParams(max_tokens=5, seed=1, logprobs=2)
    params = [SamplingParams(max_tokens=5, seed=1), asks, greedy(3), dataclasses.replace(asks, logprobs=-1)]
    outputs = [o.outputs[0] for o in llm.generate([PROMPT[:9], PROMPT, PROMPT, PROMPT[:4]], params)]
    assert outputs[0].logprobs is outputs[2].logprobs is outputs[0].cumulative_logprob is None
    assert all(2 <= len(c) <= 3 for c in outputs[1].logprobs)
    assert all(len(c) == VOCAB for c in outputs[3].logprobs)
    row = made.logprobs(PROMPT[:4])[-1]
    assert outputs[3].logprobs[0][17].logprob == pytest.approx(row[17].item(), abs=1e-4)


@pytest.mark.parametrize("budget", [8192, 7])
@pytest.mark.parametrize("k", [0, 2, -1])
def test_prompt_logprobs_are_transformers_too(made, load, budget, k):
    """With a small budget the prompt is longer than a step may be."""
    llm = load(made, max_num_batched_tokens=budget)
    asks = SamplingParams(max_tokens=2, seed=0, n=2, prompt_logprobs=k)
    outputs = llm.generate([PROMPT[:3], PROMPT, [5]], [greedy(4), asks, asks])
    assert outputs[0].prompt_logprobs is None
    first, *rest = outputs[1].prompt_logprobs
    assert first is None
    assert outputs[2].prompt_logprobs == [None]
    for token, row, candidates in zip(PROMPT[1:], made.logprobs(PROMPT), rest, strict=False):
        assert len(candidates) in {0: (1,), 2: (2, 3), -1: (VOCAB,)}[k]
        for candidate, found in candidates.items():
            assert found.logprob == pytest.approx(row[candidate].item(), abs=1e-4)
            assert found.rank == 1 + int((row > row[candidate]).sum())
        assert next(iter(candidates)) == token
    assert len(rest) == len(PROMPT) - 1
    assert tokens(outputs[:1]) == made.greedy(PROMPT[:3], 4), "sampled from the wrong rows"
    plain = dataclasses.replace(asks, prompt_logprobs=None)
    for output, expected in zip(outputs[1:], llm.generate([PROMPT, [5]], plain), strict=True):
        assert [c.token_ids for c in output.outputs] == [c.token_ids for c in expected.outputs]


# Streaming


def test_a_stream_grows_to_what_generate_returns(llm):
    for params in (greedy(20), SamplingParams(max_tokens=25, seed=4, stop=["a", "e", "\n"]), greedy(9, logprobs=1)):
        shown, last = "", None
        for output in llm.stream(PROMPT, params):
            (completion,) = output.outputs
            assert completion.text.startswith(shown), "shown text was taken back"
            assert last is None or completion.token_ids[:-1] == last.outputs[0].token_ids
            assert last is None or not last.finished
            shown, last = completion.text, output
        (whole,) = llm.generate(PROMPT, params)
        assert last.finished and last.outputs == whole.outputs


def test_closing_a_stream_frees_its_rows(llm, said):
    stream = llm.stream(PROMPT, SamplingParams(n=3, max_tokens=30, seed=0))
    next(stream)
    next(stream)
    stream.close()
    assert not llm.engine.has_unfinished() and llm.engine.kv.num_free == 4
    for _ in llm.stream(PROMPT, greedy(30)):
        break  # the abandoned generator is closed by its collection
    assert tokens(llm.generate(PROMPT, greedy(40))) == said


def test_two_streams_and_a_generate_can_be_interleaved(llm, said):
    one, two = llm.stream(PROMPT, greedy(12)), llm.stream(PROMPT[:5], greedy(7))
    last = [next(one), next(two)]
    assert tokens(llm.generate(PROMPT, greedy(3))) == said[:3]
    for output in one:
        last[0] = output
    for output in two:
        last[1] = output
    assert all(output.finished for output in last)
    assert last[0].outputs[0].token_ids == said[:12]
    assert last[1].outputs[0].token_ids == tokens(llm.generate(PROMPT[:5], greedy(7)))


# Mistakes and interruptions


@pytest.mark.parametrize(
    ("prompt", "named"),
    [
        ("", "prompt is empty"),
        ([[]], "prompt is empty"),
        ([0] * CONTEXT, f"the prompt has {CONTEXT} tokens, max_model_len is {CONTEXT}"),
        ([1, VOCAB], f"token id {VOCAB} "),
        ([1, -1], "token id -1 "),
        ([[1, "a"]], "token id 'a' "),
        ([[1.0]], "token id 1.0 "),
        ([True], "token id True "),
        (None, "NoneType"),
        (5, "int"),
        (["fine", 5], "prompt 1 is int"),
        (["fine", None], "prompt 1 is NoneType"),
        (["fine", [1], [VOCAB]], "prompt 2: token id"),
        (b"bytes", "bytes"),
        ([b"bytes"], "prompt 0 is bytes"),
        ({"text": "a"}, "text"),
        ({}, "prompt 0 has the keys []"),
        ({1: 2, "a": 3}, "prompt 0 has"),
        ({"prompt": 5}, "prompt 0 is int"),
        ({"prompt": "a", "prompt_token_ids": [1]}, "prompt_token_ids"),
        (torch.tensor([1, 2]), "Tensor"),
    ],
    ids=lambda value: value if isinstance(value, str) else repr(value)[:20],
)
def test_a_bad_prompt_is_one_line_that_names_it(llm, prompt, named):
    with pytest.raises(UserError) as caught:
        llm.generate(prompt, greedy(2))
    assert named in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("params", "named"),
    [
        ([SamplingParams()] * 3, "3 SamplingParams for 2 prompts"),
        ([], "0 SamplingParams for 2 prompts"),
        ({"temperature": 0, "max_tokens": 3}, "dict"),
        ([SamplingParams(), {"temperature": 0}], "dict"),
        (0.7, "float"),
    ],
    ids=["too-many", "none", "dict", "dict-for-one", "number"],
)
def test_bad_sampling_params_are_one_line(llm, params, named):
    with pytest.raises(UserError, match=re.escape(named)) as caught:
        llm.generate([PROMPT, PROMPT], params)
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="SamplingParams"):
        list(llm.stream(PROMPT, params))


def test_a_bad_prompt_among_good_ones_generates_nothing(llm, said):
    before = llm.engine.runner.forward_passes
    with pytest.raises(UserError):
        llm.generate([PROMPT, [VOCAB], PROMPT])
    assert llm.engine.runner.forward_passes == before
    assert tokens(llm.generate(PROMPT, greedy(40))) == said


@pytest.mark.parametrize("steps", [1, 2, 7])
@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("out of memory")], ids=["ctrl-c", "error"])
def test_after_an_interruption_the_next_call_starts_clean(llm, said, steps, error, monkeypatch):
    for run in (
        lambda: llm.generate([PROMPT] * 6, SamplingParams(max_tokens=9, seed=2)),
        lambda: list(llm.stream(PROMPT, SamplingParams(n=2, max_tokens=9, seed=2))),
    ):
        with monkeypatch.context() as patch:
            fail_after(llm, steps, error, patch)
            with pytest.raises(type(error)):
                run()
        assert not llm.engine.has_unfinished() and llm.engine.kv.num_free == 4
        assert tokens(llm.generate(PROMPT, greedy(40))) == said


def test_weights_that_give_nan_are_a_users_error_in_one_line(llm, monkeypatch):
    forward = llm.engine.runner.forward
    monkeypatch.setattr(llm.engine.runner, "forward", lambda batch: forward(batch) * math.nan)
    with pytest.raises(Exception, match="NaN") as caught:
        llm.generate(PROMPT, greedy(2))
    assert getattr(caught.value, "is_user_error", False)


def test_a_waiting_request_can_be_aborted(llm, said):
    engine = llm.engine
    running = [engine.add_request(PROMPT, greedy(10)) for _ in range(4)]
    engine.step()
    waiting = engine.add_request(PROMPT, SamplingParams(n=2, max_tokens=5))
    engine.abort(waiting)
    engine.abort(waiting)
    engine.abort("unknown")
    finished = {}
    while engine.has_unfinished():
        finished |= {o.request_id: o for o in engine.step() if o.finished}
    assert list(finished) == running
    assert all(tokens([o]) == said[:10] for o in finished.values())


def test_no_bar_is_printed_where_there_is_no_terminal(llm, capfd):
    llm.generate([PROMPT] * 2, greedy(2))
    out, err = capfd.readouterr()
    assert (out, err) == ("", "")


def test_a_checkpoint_without_tokenizer_takes_and_gives_token_ids(made, load, said, tmp_path):
    bare = load(with_files(made.path, tmp_path / "bare", tokenizer=None))
    (output,) = bare.generate(PROMPT, greedy(5, logprobs=1))
    assert (output.outputs[0].token_ids, output.outputs[0].text) == (said[:5], "")
    with pytest.raises(UserError, match=r"no tokenizer\.json: give the prompt as token ids"):
        bare.generate("text")


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"dtype": "int8"}, "dtype 'int8'"),
        ({"dtype": torch.float32}, "dtype torch.float32"),
        ({"device": "tpu"}, "'tpu'"),
        ({"device": "cuda:99"}, "cuda:99"),
        ({"runner": "fast"}, "runner 'fast'"),
        ({"runner": "cuda-graph"}, "cuda-graph"),
        ({"max_model_len": 0}, "max_model_len=0"),
        ({"max_model_len": CONTEXT + 1}, f"max_model_len {CONTEXT + 1}"),
        ({"max_num_seqs": 10**9}, "max_num_seqs 1000000000"),
        ({"max_num_batched_tokens": True}, "max_num_batched_tokens=True"),
        ({"seed": -1}, "seed=-1"),
    ],
    ids=str,
)
def test_bad_settings_are_one_line_that_names_them(made, load, settings, named):
    with pytest.raises(UserError, match=re.escape(named)) as caught:
        load(made, **settings)
    assert "\n" not in str(caught.value)


def test_quantised_checkpoints_are_refused(made, load, tmp_path):
    path = with_files(made.path, tmp_path / "awq", config={"quantization_config": {"quant_method": "awq"}})
    with pytest.raises(UserError, match=r"quantised \(awq\)"):
        load(path)


def test_unknown_settings_are_refused_by_name(made):
    with pytest.raises(UserError, match=r"max_model_length.*did you mean max_model_len"):
        LLM(made.path, max_model_length=5)


def test_the_cache_and_the_weights_are_counted_in_bytes(made, load):
    """The figure that bandwidth reports divide by must not change when weights are packed."""
    sizes = {n: p.numel() for n, p in made.oracle.named_parameters() if "embed" not in n}
    assert load(made).engine.model.weight_bytes == 4 * sum(sizes.values())
    assert load(made, dtype="bfloat16").engine.model.weight_bytes == 2 * sum(sizes.values())
