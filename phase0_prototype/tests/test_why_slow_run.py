"""`titan why-slow` finds the cause in real runs where it is known."""

from __future__ import annotations

import pytest
import torch
from typer.testing import CliRunner

from module0_profiling.cli import make_app
from module0_profiling.why_slow import CALLS, RECOMPUTATION, diagnose
from phase0_prototype import workloads
from phase0_prototype.errors import UserError
from phase0_prototype.llm import LLM
from phase0_prototype.profile import profile_decode
from phase0_prototype.why_slow_run import collect, seconds_per_call

TOKENS = 24


def ask(*options: str) -> str:
    done = CliRunner().invoke(make_app(), ["why-slow", "--device", "cpu", "--tokens", str(TOKENS), *options])
    assert done.exit_code == 0, done.output
    return " ".join(done.output.split())


@pytest.fixture(scope="module")
def tiny() -> LLM:
    return LLM("titan-tiny", device="cpu", runner="eager", use="phase0=solution", max_num_seqs=4)


def test_the_framework_is_told_that_it_has_no_cache():
    said = ask("--phase", "phase0", "--use", "phase0=framework")
    computed = sum(8 + i for i in range(TOKENS))
    assert f"there is no KV cache. {computed} tokens went through the model, {8 + TOKENS - 1} were needed" in said
    assert "1. keep a KV cache" in said


def test_the_solution_on_the_small_model_is_told_of_its_calls():
    said = ask("--phase", "phase0", "--use", "phase0=solution", "--runner", "eager")
    assert "bound by operator-call overhead (Python and dispatch)" in said
    assert "1. fewer calls (runner compile" in said and "up to" in said


def test_evidence_counts_what_the_engine_did(tiny):
    evidence = collect(tiny, batch=2, prompt_length=8, tokens=TOKENS)
    assert evidence.needed == evidence.computed == 2 * (8 + TOKENS - 1)
    assert evidence.sequences == evidence.rows == 2
    assert evidence.weight_bytes == tiny.engine.model.weight_bytes
    assert evidence.kv_bytes == 2 * (8 + TOKENS // 2) * tiny.engine.model.kv_spec.bytes_per_token
    assert evidence.flops_per_token == pytest.approx(2 * evidence.weight_bytes * 8 / evidence.weight_bits, rel=0.1)
    assert 0 < evidence.busy <= 1 and 0.3 < evidence.forward < 1 and evidence.calls > 100
    assert diagnose(evidence).bound == CALLS
    assert not tiny.engine.has_unfinished()


def test_evidence_of_the_framework_shows_the_growing_rows():
    llm = LLM("titan-tiny", device="cpu", use="phase0=framework", max_num_seqs=2)
    evidence = collect(llm, batch=2, prompt_length=8, tokens=6)
    assert evidence.computed == 2 * sum(8 + i for i in range(6)) and evidence.needed == 2 * 13
    assert evidence.sequences == 1 and evidence.rows == sum(8 + i for i in range(1, 6)) / 5
    assert diagnose(evidence).bound == RECOMPUTATION


def test_ranges_of_the_engine_are_no_operations_of_its_profile(tiny):
    measured = profile_decode(tiny, context=8, steps=2)
    names = {op.name for op in measured.operations}
    assert not names & {"schedule", "prepare", "forward", "sample", "finish", "detokenise", "attention", "mlp"}
    assert any(name.startswith("aten::") for name in names)
    assert 0 < measured.forward < 1 and measured.busy < 1


def test_ranges_name_every_part_of_a_step(tiny):
    engine = tiny.engine
    prompt = workloads.random_prompts(engine.config.vocab_size, [8])[0]
    request = engine.add_request(prompt, workloads.SamplingParams(temperature=0, max_tokens=4, ignore_eos=True))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as trace:
        engine.step()
    engine.abort(request)
    events = [event for event in trace.events() if event.is_user_annotation]
    top = [event.name for event in sorted(events, key=lambda e: e.time_range.start) if event.cpu_parent is None]
    assert top == ["schedule", "prepare", "forward", "sample", "finish", "detokenise"]
    inside = {event.name for event in events if event.cpu_parent is not None and event.cpu_parent.name == "forward"}
    assert inside == {"embedding", "norm", "attention", "mlp", "lm_head"}


def test_an_empty_call_takes_microseconds():
    assert 1e-7 < seconds_per_call(torch.device("cpu"), torch.float32, 256, calls=50, rounds=3) < 1e-3


@pytest.mark.parametrize(
    ("settings", "names"),
    [({"tokens": 1}, "--tokens 1"), ({"batch": 0}, "--batch 0"), ({"prompt_length": 0}, "--prompt-length 0")],
)
def test_a_workload_that_makes_no_sense_is_refused_by_its_option(tiny, settings, names):
    with pytest.raises(UserError, match=names):
        collect(tiny, **settings)


def test_a_workload_longer_than_the_model_is_refused(tiny):
    with pytest.raises(UserError, match="max_model_len"):
        collect(tiny, prompt_length=1020, tokens=20)
