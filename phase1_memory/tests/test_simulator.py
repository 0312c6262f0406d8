"""Traces, policies and the simulator: scenarios by hand, brute force beside them, conservation at every step."""

from __future__ import annotations

import itertools
from collections import deque
from pathlib import Path

import numpy as np
import pytest
import typer
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from typer.testing import CliRunner

from module0_profiling import plots
from phase0_prototype.errors import UserError
from phase1_memory import simulate_commands, simulator_cases, traces
from phase1_memory.allocator import BuddyAllocator, Run
from phase1_memory.contiguous import Holes
from phase1_memory.policies import NAMES, BuddyRuns, Memory, Pages, VllmBlockManager, make_policy
from phase1_memory.simulator import PRESSURES, Costs, Moment, Replay, Setup, simulate, snapshot_at
from phase1_memory.traces import Job, Trace

CONTIGUOUS = ("max", "pow2", "oracle", "runs")


def kinds(moments: tuple[Moment, ...]) -> list[tuple[int, ...]]:
    """stored, reserved, internal, external, free, running, waiting of each step."""
    return [tuple(moment[1:-1]) for moment in moments]


# Traces


@pytest.mark.parametrize("kind", traces.MEANS)
def test_lengths_have_the_published_means_and_a_long_tail(kind: str) -> None:
    jobs = traces.conversations(kind, seed=1, count=40_000, rate=2.0).jobs
    for lengths, mean in zip(("prompt", "output"), traces.MEANS[kind], strict=True):
        values = np.array([getattr(job, lengths) for job in jobs])
        error = values.std() / len(values) ** 0.5
        assert abs(values.mean() - mean) < 4 * error + 0.5
        assert np.median(values) < 0.75 * mean
        assert np.percentile(values, 99) > 3 * mean
        assert values.min() >= 1 and values.max() <= traces.CAP
    assert jobs[-1].arrival == pytest.approx(len(jobs) / 2.0, rel=0.03)


def test_growing_keeps_its_number_of_requests_alive_at_every_step() -> None:
    jobs = traces.growing(seed=3, alive=1000, steps=400).jobs
    for step in (0, 1, 77, 399):
        assert sum(job.arrival <= step < job.arrival + job.output for job in jobs) == 1000
    ended = [job for job in jobs if job.arrival + job.output < 400]
    assert len(ended) == pytest.approx(1000 * 400 / traces.MEANS["sharegpt"][1], rel=0.1)


def test_a_seed_is_a_trace() -> None:
    for make in (
        lambda seed: traces.conversations("alpaca", seed, 50, 1.0),
        lambda seed: traces.growing(seed, 20, 100),
        lambda seed: traces.uniform(seed, 50, 1.0),
        lambda seed: traces.bimodal(seed, 50, 1.0),
    ):
        assert make(5) == make(5)
        assert make(5) != make(6)


def test_a_trace_is_read_from_a_file_in_the_order_of_arrival(tmp_path: Path) -> None:
    file = tmp_path / "mine.csv"
    file.write_text("arrival,output,prompt\n7,3,2\n0,1,9\n", encoding="utf-8")
    assert traces.read_csv(file) == Trace("mine", (Job(0, 9, 1), Job(7, 2, 3)))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("arrival,prompt\n1,2\n", "no column output"),
        ("", "no column arrival, prompt, output"),
        ("arrival,prompt,output\n", "no requests"),
        ("arrival,prompt,output\n0,1,2\n0,x,2\n", r"line 3: prompt 'x'"),
        ("arrival,prompt,output\n0,1,0\n", r"line 2: output '0' must be a whole number of at least 1"),
        ("arrival,prompt,output\n-1,1,1\n", r"arrival '-1'"),
        ("arrival,prompt,output\n1,1\n", r"output ''"),
    ],
)
def test_a_bad_file_is_one_line(tmp_path: Path, text: str, said: str) -> None:
    file = tmp_path / "bad.csv"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=said) as caught:
        traces.read_csv(file)
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="No such file"):
        traces.read_csv(tmp_path / "none.csv")


# Policies by hand


def test_max_reserves_whole_rows() -> None:
    trace = Trace("three", (Job(0, 1, 2),) * 3)
    done = simulate(trace, make_policy("max", Memory(9, max_model_len=4)), Setup(max_model_len=4))
    assert kinds(done.moments) == [
        (4, 2, 2, 0, 1, 2, 1),  # each: 2 stored, 1 to come, 1 never; one slot is left and nobody fits it
        (6, 0, 2, 0, 1, 2, 1),
        (2, 1, 1, 0, 5, 1, 0),
        (3, 0, 1, 0, 5, 1, 0),
    ]
    summary = done.summary
    assert (summary.steps, summary.finished, summary.tokens) == (4, 3, 6)
    assert (summary.mean_batch, summary.largest_batch) == (1.5, 2)
    assert summary.stored == pytest.approx(15 / 36) and summary.internal == pytest.approx(6 / 36)
    assert summary.fragmentation == pytest.approx(1 - 15 / 24)
    assert summary.waste == pytest.approx((3 + 6) / 36)


def test_pow2_rounds_the_output_up() -> None:
    done = simulate(Trace("one", (Job(0, 3, 5),)), make_policy("pow2", Memory(11)))
    assert kinds(done.moments)[0] == (4, 4, 3, 0, 0, 1, 0)  # 3 + 8 slots: 3 + 5 will be used
    assert kinds(done.moments)[-1] == (8, 0, 3, 0, 0, 1, 0)
    assert make_policy("pow2", Memory(99, max_model_len=10)).need(Job(0, 3, 5), 4) == 10


def test_the_oracle_wastes_nothing_inside_and_waits_before_two_holes() -> None:
    trace = Trace("holes", (Job(0, 3, 1), Job(0, 1, 3), Job(1, 5, 1)))
    done = simulate(trace, make_policy("oracle", Memory(10)))
    assert kinds(done.moments) == [
        (6, 2, 0, 0, 2, 2, 0),
        (3, 1, 0, 6, 0, 1, 1),  # free: 4 before the second request, 2 behind; the third needs 6
        (4, 0, 0, 6, 0, 1, 1),
        (6, 0, 0, 0, 4, 1, 0),
    ]


def test_a_run_doubles_in_place_or_moves() -> None:
    policy = BuddyRuns(BuddyAllocator(8), page=2)
    job = Job(0, 1, 15)
    assert policy.admit(0, job, 2) and policy.admit(1, job, 2)
    assert policy.tables == {0: range(0, 1), 1: range(1, 2)}
    assert policy.grow([0]) == [True] and policy.tables[0] == range(2, 4) and policy.copied_tokens == 2
    assert policy.grow([0]) == [True] and policy.tables[0] == range(2, 6) and policy.copied_tokens == 2
    assert policy.grow([0]) == [False] and policy.tables[0] == range(2, 6) and policy.num_free == 3
    assert policy.in_pieces(job, 3) is False and policy.in_pieces(job, 5) is False
    assert policy.fits(job, 16) and not policy.fits(job, 17)
    policy.release([0, 1])
    assert policy.num_free == 8


def test_runs_round_up_to_powers_of_two() -> None:
    done = simulate(Trace("one", (Job(0, 4, 3),)), make_policy("runs", Memory(16, page=2)))
    assert kinds(done.moments) == [(5, 2, 1, 0, 8, 1, 0), (6, 1, 1, 0, 8, 1, 0), (7, 0, 1, 0, 8, 1, 0)]


def test_vllm_gives_out_what_was_freed_first() -> None:
    policy = VllmBlockManager(5, page=2, watermark=0)
    job = Job(0, 1, 9)
    assert policy.admit(0, job, 4) and policy.tables[0] == [0, 1]
    policy.release([0])
    assert policy.admit(1, job, 10) and policy.tables[1] == [2, 3, 4, 1, 0]
    assert policy.grow([1]) == [False]


def test_the_watermark_is_kept_by_admission_and_used_by_growth() -> None:
    job = Job(0, 1, 999)
    vllm, ours = VllmBlockManager(100, page=1), Pages(BuddyAllocator(100), page=1)
    assert not vllm.fits(job, 100) and not vllm.admit(0, job, 100) and vllm.admit(0, job, 99)
    assert vllm.grow([0]) == [True] and vllm.num_free == 0
    assert ours.admit(0, job, 98) and not ours.admit(1, job, 2) and ours.admit(1, job, 1)
    assert ours.grow([0, 1]) == [True, False]
    ours.release([0, 1])
    assert ours.num_free == 100 and ours.admit(2, job, 100)  # nobody runs: nobody needs the spare


def test_pages_stay_neighbours_where_there_is_headroom() -> None:
    policy = Pages(BuddyAllocator(64, headroom=16), page=1)
    for request in range(2):
        assert policy.admit(request, Job(0, 1, 9), 2)
    for _ in range(8):
        assert policy.grow([0, 1]) == [True, True]
    assert all(table == list(range(table[0], table[0] + 10)) for table in policy.tables.values())


def test_first_fit_is_that_of_a_bitmap(seed: int = 0) -> None:
    draw = np.random.default_rng(seed)
    holes, bitmap, held = Holes(60), "." * 60, []
    for _ in range(3000):
        if held and draw.random() < 0.5:
            start, length = held.pop(draw.integers(len(held)))
            holes.give(Run(start, length))
            bitmap = bitmap[:start] + "." * length + bitmap[start + length :]
        length = int(draw.integers(1, 20))
        expected, run = bitmap.find("." * length), holes.take(length)
        assert (run.start if run else -1) == expected
        if run:
            held.append(run)
            bitmap = bitmap[:expected] + "#" * length + bitmap[expected + length :]
        free = [len(hole) for hole in bitmap.split("#") if hole]
        assert (holes.total, holes.largest) == (sum(free), max(free, default=0))


# Running out of memory

TWO = Trace("two", (Job(0, 1, 6), Job(0, 1, 6)))
SMALL = Memory(8, page=2)  # four pages, of which admission leaves one free


@pytest.mark.parametrize("name", ["pages", "vllm"])
def test_the_youngest_is_recomputed(name: str) -> None:
    costs = Costs(recompute=2)
    done = simulate(TWO, make_policy(name, SMALL), Setup("recompute", costs=costs, max_model_len=7))
    wait = (7, 0, 1, 0, 0, 1, 1)
    assert kinds(done.moments)[:6] == [
        (4, 0, 0, 0, 4, 2, 0),
        (6, 2, 0, 0, 0, 2, 0),
        (8, 0, 0, 0, 0, 2, 0),
        (5, 1, 0, 0, 2, 1, 1),  # the first needs a third page: the second loses both of its own
        (6, 0, 0, 0, 2, 1, 1),  # it needs three pages to come back
        wait,
    ]
    assert kinds(done.moments)[6:8] == [(4, 2, 0, 0, 2, 1, 0)] * 2  # 4 tokens are computed again, 2 a step
    assert kinds(done.moments)[8:] == [(5, 1, 0, 0, 2, 1, 0), (6, 0, 0, 0, 2, 1, 0), (7, 0, 1, 0, 0, 1, 0)]
    summary = done.summary
    assert (summary.preemptions, summary.recomputed_tokens, summary.swapped_bytes) == (1, 4, 0)
    assert (summary.finished, summary.rejected, summary.tokens) == (2, 0, 12)


def test_the_youngest_is_swapped() -> None:
    done = simulate(TWO, make_policy("pages", SMALL), Setup("swap", costs=Costs(bytes_per_token=10, swap=0))).summary
    assert (done.preemptions, done.recomputed_tokens, done.swapped_bytes) == (1, 0, 2 * 4 * 10)
    assert (done.finished, done.steps) == (2, 9)


def test_the_youngest_is_ended() -> None:
    done = simulate(TWO, make_policy("pages", SMALL), Setup("reject")).summary
    assert (done.preemptions, done.rejected, done.finished, done.tokens, done.steps) == (0, 1, 1, 9, 6)


@pytest.mark.parametrize("name", NAMES)
def test_what_can_never_fit_is_rejected_and_the_next_one_runs(name: str) -> None:
    setup = Setup(max_model_len=16)
    trace = Trace("long", (Job(0, 20, 1), Job(0, 4, 2), Job(0, 2, 40)))
    done = simulate(trace, make_policy(name, Memory(64, page=2, max_model_len=16)), setup).summary
    assert (done.rejected, done.finished) == (1, 2)
    assert done.tokens == 2 + 14  # the last is cut at the model's length
    assert simulate(trace, make_policy(name, Memory(8, page=2, max_model_len=16)), setup).summary.rejected >= 2


def test_time_without_work_is_skipped() -> None:
    trace = Trace("rare", (Job(3, 1, 1), Job(10**12, 1, 2)))
    done = simulate(trace, make_policy("pages", Memory(64)), Setup(max_steps=10**13))
    assert [moment.step for moment in done.moments] == [3, 10**12, 10**12 + 1]
    assert simulate(Trace("none", ()), make_policy("pages", Memory(64))).summary.steps == 0


def test_no_more_run_together_than_allowed() -> None:
    done = simulate(Trace("four", (Job(0, 1, 2),) * 4), make_policy("pages", Memory(999)), Setup(max_num_seqs=3))
    assert [moment.running for moment in done.moments] == [3, 3, 1, 1]


# Conservation, and brute force beside it

JOBS = st.lists(st.builds(Job, st.integers(0, 12), st.integers(1, 20), st.integers(1, 20)), max_size=12)


def as_trace(jobs: list[Job]) -> Trace:
    return Trace("drawn", tuple(sorted(jobs, key=lambda job: job.arrival)))


@settings(max_examples=300, deadline=None)
@given(
    jobs=JOBS, name=st.sampled_from(NAMES), pressure=st.sampled_from(PRESSURES), page=st.integers(1, 5), data=st.data()
)
def test_no_slot_is_lost_or_shared(jobs: list[Job], name: str, pressure: str, page: int, data: st.DataObject) -> None:
    tokens = data.draw(st.integers(page, 80))
    policy = make_policy(name, Memory(tokens, page, grain=page, max_model_len=24))
    replay = Replay(as_trace(jobs), policy, Setup(pressure, 5, 24, costs=Costs(recompute=7, swap=0)))
    while replay.advance():
        used = sorted(itertools.chain.from_iterable(policy.tables.values()))
        assert len(set(used)) == len(used) and all(0 <= block < policy.num_blocks for block in used)
        assert policy.num_free == policy.num_blocks - len(used)
        assert (replay.held > 0).nonzero()[0].tolist() == sorted(policy.tables)
        for request, table in policy.tables.items():
            assert replay.held[request] == len(table) * page >= replay.stored[request]
            assert name not in CONTIGUOUS or list(table) == list(range(table[0], table[0] + len(table)))
        if not replay.moments or replay.moments[-1].step != replay.now - 1:
            assert not used
            continue
        moment = replay.moments[-1]
        assert sum(moment[1:6]) == policy.num_blocks * page and min(moment) >= 0
        assert moment.free + moment.external == policy.num_free * page
        assert moment.stored == sum(int(replay.stored[request]) for request in policy.tables)
        assert moment.running == len(policy.tables) <= 5
        if replay.waiting and moment.running < 5 and name in CONTIGUOUS:
            first = as_trace(jobs).jobs[replay.waiting[0]]
            first = Job(0, first.prompt, min(first.output, 24 - first.prompt))
            need = policy.need(first, int(replay.stored[replay.waiting[0]]) + 1)
            bitmap = "".join("#" if block in used else "." for block in range(policy.num_blocks))
            begins = range(0, len(bitmap), need if name == "runs" else 1)
            fits = any(bitmap[start : start + need] == "." * need for start in begins)
            assert (moment.external > 0) == (bitmap.count(".") >= need and not fits)
    assert not policy.tables and policy.num_free == policy.num_blocks
    assert replay.finished + replay.rejected == len(jobs)


def naive_growth(stored: dict[int, int], held: dict[int, int], waiting: list[int], num_pages: int, page: int) -> bool:
    """A page for whoever is full, the oldest first; True where nobody had to go for it."""
    calm = True
    for i in sorted(held):
        while i in held and stored[i] == held[i] * page:
            if sum(held.values()) < num_pages:
                held[i] += 1
            else:
                calm = False
                youngest = max(held)
                del held[youngest]
                waiting.insert(0, youngest)
    return calm


def naive(jobs: tuple[Job, ...], num_pages: int, page: int, spare: int) -> list[tuple[int, int, int]]:
    """Tokens stored, running and waiting at each step of paged memory with recompute at no cost: counts only."""
    stored = {i: job.prompt for i, job in enumerate(jobs)}
    held: dict[int, int] = {}
    coming, waiting = deque(range(len(jobs))), []
    found = []
    for step in itertools.count():
        for i in [i for i in held if stored[i] == jobs[i].total]:
            del held[i]
        if not (held or waiting or coming):
            return found
        while coming and jobs[coming[0]].arrival <= step:
            waiting.append(coming.popleft())
        calm = naive_growth(stored, held, waiting, num_pages, page)
        while calm and waiting:
            i = waiting[0]
            need = -(-(stored[i] + 1) // page)
            if need > num_pages:
                waiting.pop(0)
            elif sum(held.values()) + need + (spare if held else 0) <= num_pages:
                held[waiting.pop(0)] = need
            else:
                break
        for i in held:
            stored[i] += 1
        if held or waiting:
            found.append((sum(stored[i] for i in held), len(held), len(waiting)))
    raise AssertionError


@settings(max_examples=200, deadline=None)
@given(jobs=JOBS, num_pages=st.integers(1, 16), page=st.integers(1, 5))
def test_pages_run_what_a_naive_count_of_pages_runs(jobs: list[Job], num_pages: int, page: int) -> None:
    trace = as_trace(jobs)
    policy = Pages(BuddyAllocator(num_pages), page)
    done = simulate(trace, policy, Setup(costs=Costs(recompute=0)))
    assert [(m.stored, m.running, m.waiting) for m in done.moments] == naive(trace.jobs, num_pages, page, policy.spare)


@pytest.mark.parametrize("name", NAMES)
def test_a_replay_is_the_same_twice(name: str) -> None:
    outcomes = []
    for _ in range(2):
        trace = traces.conversations("sharegpt", 4, 60, rate=1.0)
        outcomes.append(simulate(trace, make_policy(name, Memory(6000))).summary.outcome())
    assert outcomes[0] == outcomes[1]


def test_the_checkerboard_stops_contiguous_memory_and_not_pages() -> None:
    trace = traces.checkerboard(pairs=8, size=64)
    found = {name: simulate(trace, make_policy(name, Memory(16 * 64))) for name in ("oracle", "pages")}
    blocked = found["oracle"].moments[1]
    assert (blocked.external, blocked.running, blocked.waiting) == (8 * 64, 8, 4)
    assert found["pages"].moments[1].external == 0 and found["pages"].moments[1].running > 8


def test_a_snapshot_is_the_memory_after_its_step() -> None:
    snapshot = snapshot_at(TWO, make_policy("pages", SMALL), Setup(), 1)
    assert snapshot.lengths == {"r0": 3, "r1": 3} and snapshot.free == ()
    assert sorted(snapshot.tables["r0"] + snapshot.tables["r1"]) == [0, 1, 2, 3]
    assert snapshot_at(TWO, make_policy("pages", SMALL), Setup(), 10**9).tables == {}


# Gates, figures, commands


def test_pages_of_a_thousand_requests_waste_less_than_four_percent() -> None:
    found = simulator_cases.growing(("pages",))["pages"]
    assert min(moment.running for moment in found.moments) >= 1000
    assert 0.005 < simulator_cases.fragmentation() < 0.04


def test_on_the_papers_server_seven_rows_run_and_more_than_twice_as_many_in_pages() -> None:
    found = simulator_cases.sharegpt(("max", "pow2", "oracle", "pages"))
    batches = {name: s.summary.mean_batch for name, s in found.items()}
    assert found["max"].summary.largest_batch == 7  # 15 700 / 2048
    assert batches["max"] < batches["pow2"] < batches["oracle"] < batches["pages"]
    assert simulator_cases.batch_over_contiguous() >= 2


def test_figures_are_finite_and_named_once() -> None:
    console = Console(quiet=True)
    figures = (
        *simulator_cases.simulator(console, simulator_cases.DRY),
        *simulator_cases.pressure(console, simulator_cases.DRY),
    )
    assert len({figure.name for figure in figures}) == len(figures)
    assert np.isfinite([figure.value for figure in figures]).all()


def test_plots_say_what_they_show(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    found = simulator_cases.sharegpt(("max", "pages"), simulator_cases.DRY)
    paths = simulator_cases.draw(found, tmp_path / "run")
    assert sorted(p.name for p in paths) == sorted(
        f"run-{n}.{e}" for n in ("memory", "batch", "waste") for e in ("svg", "png")
    )
    again = simulator_cases.draw(simulator_cases.sharegpt(("max", "pages"), simulator_cases.DRY), tmp_path / "again")
    for one, other in zip(paths, again, strict=True):
        assert one.stat().st_size > 1000 and one.read_bytes() == other.read_bytes()
    digest = plots.digest_of({name: [moment[:-1] for moment in s.moments] for name, s in found.items()})
    assert all(plots.shows(path, digest) for path in paths)


def titan(*arguments: str) -> tuple[int, str]:
    app = typer.Typer()
    simulate_commands.register(app)
    done = CliRunner().invoke(app, list(arguments), env={"COLUMNS": "80", "NO_COLOR": "1"})
    if isinstance(done.exception, UserError):
        return 2, str(done.exception)
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    return done.exit_code, done.stdout


def test_the_command_compares_policies(tmp_path: Path) -> None:
    file = tmp_path / "mine.csv"
    file.write_text("arrival,prompt,output\n0,30,20\n1,10,5\n", encoding="utf-8")
    code, said = titan("simulate", "--trace", str(file), "--policy", "max,pages", "--memory", "4096")
    assert code == 0 and "mine: 2 requests, 4096 tokens of memory" in said
    assert max(map(len, said.splitlines())) <= 80
    assert [line.split()[0] for line in said.splitlines() if line.startswith(("max", "pages"))] == ["max", "pages"] * 3


def test_the_command_draws_a_simulated_memory() -> None:
    code, said = titan("memory-map", "--trace", "alpaca", "--step", "40", "--memory", "1024", "--no-colour")
    assert code == 0 and "alpaca in pages, step 40" in said and "64 blocks of 16" in said
    assert max(map(len, said.splitlines())) <= 80


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["simulate", "--policy", "max,best"], "--policy 'best': choose one of max, pow2"),
        (["simulate", "--trace", "chats"], "--trace 'chats': choose one of sharegpt"),
        (["simulate", "--trace", "none.csv"], "trace none.csv: No such file"),
        (["simulate", "--memory", "8"], "--memory 8: give at least one page of 16"),
        (["simulate", "--page", "0"], "--page 0: give at least 1"),
        (["simulate", "--rate", "nan"], "--rate nan: give a positive number"),
        (["simulate", "--out-of-memory", "pray"], "--out-of-memory 'pray': choose one of recompute, swap, reject"),
        (["simulate", "--requests", "99999999"], "--requests 99999999: at most 1000000"),
        (["simulate", "--seed", "-1"], "--seed -1: give at least 0"),
        (["simulate", "--steps", "0"], "--steps 0"),
        (["memory-map", "--step", "-1"], "--step -1: give at least 0"),
        (["memory-map", "--policy", "all"], "--policy 'all': choose one of"),
        (["memory-map", "hello", "--n", "0"], "--n 0: give at least 1"),
    ],
)
def test_bad_input_is_one_line(arguments: list[str], said: str) -> None:
    code, message = titan(*arguments)
    assert code == 2 and message.startswith(said) and "\n" not in message


def test_a_picture_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    (tmp_path / "file").write_text("", encoding="utf-8")
    code, message = titan("memory-map", "--step", "3", "--image", str(tmp_path / "file" / "map"))
    assert code == 2 and "choose another place" in message and "\n" not in message
