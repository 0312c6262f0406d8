"""What a load asks and when: lengths, seeds, arrival times."""

from __future__ import annotations

import math
import statistics
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from phase0_prototype.errors import UserError
from phase4_scheduler.bench import workloads
from phase4_scheduler.bench.arrivals import Arrival
from phase4_scheduler.bench.workload_file import from_file
from phase4_scheduler.bench.workloads import MAKERS, PromptMaker

ROOT = Path(__file__).parent.parent.parent


@pytest.mark.parametrize("name", MAKERS)
def test_a_seed_gives_the_same_requests_and_another_one_others(name):
    first, again, other = (MAKERS[name](20, PromptMaker(seed)) for seed in (3, 3, 4))
    assert first == again and first.items != other.items and len(first.items) == 20
    assert all(item.output_tokens >= 1 and len(item.prompt) >= 1 for item in first.items)


def test_half_of_the_mixed_answers_are_short():
    lengths = [item.output_tokens for item in workloads.mixed(101, PromptMaker(0)).items]
    assert sorted(set(lengths)) == [10, 200] and lengths.count(10) in (50, 51)
    assert lengths != sorted(lengths)  # shuffled
    other = workloads.mixed(10, PromptMaker(0), short=3, long=9, share=0.2, prompt=17)
    assert [i.output_tokens for i in other.items].count(3) == 2 and {len(i.prompt) for i in other.items} == {17}


def test_random_lengths_reach_both_ends_of_their_range():
    items = workloads.random(4000, PromptMaker(0), prompt=(5, 8), output=(1, 2)).items
    assert {len(item.prompt) for item in items} == {5, 6, 7, 8} and {item.output_tokens for item in items} == {1, 2}
    default = workloads.random(300, PromptMaker(0)).items
    assert all(100 <= len(i.prompt) <= 1024 and 100 <= i.output_tokens <= 1024 for i in default)
    assert statistics.mean(len(i.prompt) for i in default) == pytest.approx(562, rel=0.1)
    with pytest.raises(UserError, match="range"):
        workloads.random(1, PromptMaker(0), prompt=(9, 8))


def test_prompts_of_a_group_begin_alike_and_others_do_not():
    items = workloads.shared_prefix(9, PromptMaker(0), groups=3, prefix=20, prompt=5, output=7).items
    heads = [item.prompt[:20] for item in items]
    assert len(set(heads)) == 3 and heads[0] == heads[3] == heads[6]
    assert len({item.prompt for item in items}) == 9 and {len(item.prompt) for item in items} == {25}


def test_conversations_have_the_published_means_and_can_be_cut():
    items = workloads.sharegpt(20_000, PromptMaker(0)).items
    assert statistics.mean(len(item.prompt) for item in items) == pytest.approx(161.31, rel=0.03)
    assert statistics.mean(item.output_tokens for item in items) == pytest.approx(337.99, rel=0.03)
    cut = workloads.sharegpt(2000, PromptMaker(0), longest=256).items
    assert max(len(item.prompt) + item.output_tokens for item in cut) == 256
    assert min(len(item.prompt) for item in cut) >= 1 and min(item.output_tokens for item in cut) >= 1


def test_token_ids_stay_in_the_vocabulary_and_text_has_so_many_words():
    ids = PromptMaker(0, vocab=40).make(500)
    assert isinstance(ids, tuple) and min(ids) == 16 and max(ids) == 39
    text = PromptMaker(0, text=True).make(50)
    assert isinstance(text, str) and len(text.split()) == 50
    shared = workloads.shared_prefix(2, PromptMaker(0, text=True), groups=1, prefix=4, prompt=2).items
    assert shared[0].prompt.split()[:4] == shared[1].prompt.split()[:4] and len(shared[0].prompt.split()) == 6
    with pytest.raises(UserError, match="17"):
        PromptMaker(0, vocab=16)


def test_a_file_gives_texts_token_ids_and_lengths(tmp_path):
    file = tmp_path / "work.jsonl"
    lines = ['{"prompt": "def f(", "output_tokens": 3}', "", '{"prompt": [5, 6], "output_tokens": 1}',
             '{"prompt_tokens": 7, "output_tokens": 9, "more": true}']  # fmt: skip
    file.write_text("\n".join(lines))
    first, second, third = from_file(file, None, PromptMaker(0)).items
    assert (first.prompt, first.output_tokens, second.prompt) == ("def f(", 3, (5, 6))
    assert len(third.prompt) == 7 and third.output_tokens == 9
    assert len(from_file(file, 2, PromptMaker(0)).items) == 2


@pytest.mark.parametrize(
    "line",
    [
        "no json",
        "[]",
        '{"output_tokens": 3}',
        '{"prompt": "x", "prompt_tokens": 3, "output_tokens": 3}',
        '{"prompt": "x"}',
        '{"prompt": "x", "output_tokens": 0}',
        '{"prompt": "x", "output_tokens": true}',
        '{"prompt": [1.5], "output_tokens": 1}',
        '{"prompt": "", "output_tokens": 1}',
        '{"prompt_tokens": -1, "output_tokens": 1}',
    ],
)
def test_a_wrong_line_is_named(tmp_path, line):
    file = tmp_path / "work.jsonl"
    file.write_text('{"prompt_tokens": 1, "output_tokens": 1}\n' + line)
    with pytest.raises(UserError, match="line 2"):
        from_file(file, None, PromptMaker(0))


def test_a_file_that_is_absent_or_empty_is_one_line(tmp_path):
    with pytest.raises(UserError, match="No such file"):
        from_file(tmp_path / "absent.jsonl", None, PromptMaker(0))
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(UserError, match="no requests"):
        from_file(tmp_path / "empty.jsonl", None, PromptMaker(0))


@pytest.mark.parametrize("burstiness", [0.25, 1.0, 4.0])
def test_gaps_have_the_mean_of_the_rate_and_the_variation_of_the_burstiness(burstiness):
    times = Arrival(20.0, burstiness).times(20_001, seed=1)
    gaps = [after - before for before, after in pairwise(times)]
    assert times[0] == 0 and min(gaps) >= 0
    mean = statistics.mean(gaps)
    assert mean == pytest.approx(1 / 20, rel=0.05)
    assert statistics.stdev(gaps) / mean == pytest.approx(burstiness**-0.5, rel=0.05)
    if burstiness == 1:  # exponential: memoryless, so P(gap > mean) = 1/e
        assert sum(gap > 1 / 20 for gap in gaps) / len(gaps) == pytest.approx(1 / math.e, abs=0.02)


@given(st.integers(0, 50), st.floats(0.1, 1e4), st.integers(0, 9))
def test_times_ascend_from_zero(count, rate, seed):
    for arrival in (Arrival.poisson(rate), Arrival.constant(rate), Arrival.closed_loop(3)):
        times = arrival.times(count, seed)
        assert len(times) == count and times == sorted(times) and (not times or times[0] == 0)
    assert Arrival.closed_loop(3).times(2) == [0, 0] and Arrival.constant(4).times(3) == [0, 0.25, 0.5]


@pytest.mark.parametrize("wrong", [{"rate": 0}, {"rate": math.nan}, {"burstiness": -1}, {"max_concurrency": 0}])
def test_an_arrival_that_makes_no_sense_is_one_line(wrong):
    with pytest.raises(UserError):
        Arrival(**wrong)


def test_the_load_generator_needs_no_torch():
    modules = "load, plots, tables, result_file, serve_command, commands"
    code = f"import sys; from phase4_scheduler.bench import {modules}; import phase4_scheduler.top_frame; "
    code += "print('torch' in sys.modules, 'fastapi' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.stdout.split() == ["False", "False"], done.stderr
    code = "import sys, phase4_scheduler.bench.commands, phase4_scheduler.top; "
    code += "print(*(m for m in ('numpy', 'rich', 'msgspec', 'asyncio', 'matplotlib') if m in sys.modules))"
    light = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    only_typer = subprocess.run(
        [sys.executable, "-c", code.replace("phase4_scheduler.bench.commands, phase4_scheduler.top", "typer")],
        cwd=ROOT, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert light.stdout == only_typer.stdout, light.stderr  # what `titan --help` imports anyway
