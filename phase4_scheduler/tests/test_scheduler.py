"""The scheduler as a state machine with too little of everything: whoever comes, ends, is aborted, is late, is swapped
or fails, nothing is lost, nothing is computed from the wrong block, and everybody ends once (scheduling.py).
"""

from __future__ import annotations

import random
import subprocess
import sys
import time

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test

from phase0_prototype.request import Request
from phase0_prototype.sampling_params import SamplingParams
from phase4_scheduler.scheduler_config import POLICIES, SchedulerConfig
from phase4_scheduler.tests.hash_model import POISON, FailureError, ModelMemory
from phase4_scheduler.tests.scheduling import World

PRESSURES = ("recompute", "swap", "reject")


def machine(parts, preemption, ahead):
    class Machine(RuleBasedStateMachine):
        @initialize(
            num_blocks=st.integers(6, 16),
            seqs=st.integers(1, 6),
            budget=st.sampled_from([1, 2, 3, 5, 8, 30]),
            threshold=st.sampled_from([0, 0, 1, 3]),
            chunked=st.booleans(),
            first=st.sampled_from(["decode", "prefill"]),
            policy=st.sampled_from(POLICIES),
            watermark=st.sampled_from([0.0, 0.01, 0.3, 0.9]),
            wait=st.sampled_from([0.0, 0.0, 2.0]),
            faults=st.tuples(*[st.sampled_from([0.0, 0.3, 1.0])] * 3),
        )
        def make(self, num_blocks, seqs, budget, threshold, chunked, first, policy, watermark, wait, faults):
            self.turned = 0.0  # when the loop was turned last
            self.world = World(
                *parts,
                num_blocks=num_blocks,
                page=3,
                ahead=ahead,
                faults=faults,
                max_num_seqs=seqs,
                max_num_batched_tokens=budget,
                long_prefill_token_threshold=threshold,
                enable_chunked_prefill=chunked,
                step_priority=first,
                scheduling_policy=policy,
                ageing_rate=3.0,
                preemption=preemption,
                watermark=watermark,
                batch_wait=wait,
                batch_size=3,
            )

        @rule(
            prompt=st.integers(1, 10),
            tokens=st.integers(1, 8),
            n=st.sampled_from([1, 1, 1, 2, 3, 5]),
            priority=st.integers(-1, 1),
            patience=st.sampled_from([None, None, None, 1.0, 5.0]),
            odd=st.sampled_from(["", "", "", "poison", "penalty"]),
        )
        def add(self, prompt, tokens, n, priority, patience, odd):
            """At most 17 tokens in the cache, 6 blocks: each alone fits."""
            world = self.world
            ids = [(world.count + i) % 5 for i in range(prompt)]
            if odd == "poison":
                ids[-1] = POISON
            penalty = 1.5 if odd == "penalty" else 1.0
            params = SamplingParams(n=n, temperature=1.0 if n > 1 else 0, repetition_penalty=penalty)
            deadline = None if patience is None else world.clock.now + patience
            world.add(ids, tokens, n, priority=priority, deadline=deadline, params=params)
            world.check()

        @precondition(lambda self: self.world.loop.has_unfinished())
        @rule(count=st.integers(1, 4))
        def steps(self, count):
            for _ in range(count):
                seen = self.turned if ahead else self.world.clock.now  # where it can't run ahead, every other turn
                self.turned = self.world.clock.now
                self.world.step()
                assert all(r.deadline is None or r.deadline > seen for r in self.world.live), "late, and not told"

        @precondition(lambda self: self.world.loop.has_unfinished())
        @rule(where=st.sampled_from(["launch", "collect"]))
        def fail(self, where):
            """The next step that gets there fails; what one step ahead of it did is lost with it."""
            self.world.executor.failing = where
            try:
                self.world.step()
            except FailureError:
                self.world.check()
            self.world.executor.failing = ""

        @rule(seed=st.integers(0, 10**6))
        def crowd(self, seed):
            """More than there is room for, and nobody knows what happens to them."""
            dice = random.Random(seed)
            for _ in range(12):
                event = dice.random()
                if event < 0.5:
                    odd, patience = dice.choice(["", "", "", "", "poison"]), dice.choice([None, None, None, 3.0])
                    self.add(
                        dice.randint(1, 10), dice.randint(1, 8), dice.randint(1, 4), dice.randint(-1, 1), patience, odd
                    )
                elif event < 0.55 and self.world.live:
                    self.abort(dice.randint(0, 9))
                elif event < 0.6 and self.world.loop.has_unfinished():
                    self.fail(dice.choice(["launch", "collect"]))
                elif self.world.loop.has_unfinished():
                    self.steps(dice.randint(1, 4))
                self.world.clock.now += 0.1

        @precondition(lambda self: self.world.live)
        @rule(which=st.integers(0, 9))
        def abort(self, which):
            self.world.abort(self.world.live[which % len(self.world.live)])

        @rule(seconds=st.sampled_from([0.5, 2.0]))
        def wait(self, seconds):
            self.world.clock.now += seconds

        def teardown(self):
            if hasattr(self, "world") and self.world.sound:
                self.world.run()

    return Machine


@pytest.mark.usefixtures("continuous")
@pytest.mark.parametrize("ahead", [False, True], ids=["one after the other", "one step ahead"])
@pytest.mark.parametrize("preemption", PRESSURES)
def test_nothing_that_happens_breaks_the_invariants(parts, preemption, ahead):
    options = settings(
        max_examples=90,
        stateful_step_count=20,
        deadline=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
        report_multiple_bugs=False,
    )
    run_state_machine_as_test(machine(parts, preemption, ahead), settings=options)


# Groups


def one_prompt_for_many(parts):
    world = World(*parts)
    world.add(6, 3, n=3)
    return len(world.step().step.scheduled) == 1


def test_the_prompt_of_a_group_is_computed_once(parts, world):
    if not one_prompt_for_many(parts):
        pytest.skip("every sequence computes its prompt here: task 4.1")
    here = world()
    here.add(41, 5, n=4, eos_token_ids=())
    here.run()
    computed = sum(step.num_tokens for step in here.executor.steps)
    assert computed == 41 + 4 * 4, "the last token of an answer is never computed"


@pytest.mark.parametrize("policy", POLICIES)
def test_a_group_that_is_larger_than_the_batch_comes_in_parts_and_does_not_push_itself_out(world, policy):
    """What is left of it has no older key than those of it that run."""
    here = world(max_num_seqs=3, scheduling_policy=policy)
    here.add(6, 5, n=8, eos_token_ids=())
    here.run(most=3 * (1 + 5))
    assert here.scheduler.preemptions == 0


@pytest.mark.usefixtures("continuous")
def test_answers_whose_blocks_go_before_their_first_token_came_are_not_taken_for_the_same(world):
    """One step ahead: three answers of a prompt have their first tokens under way when somebody urgent comes."""
    for preemption in ("recompute", "swap"):
        here = world(num_blocks=8, ahead=True, scheduling_policy="priority", preemption=preemption, max_num_seqs=3)
        here.add(6, 6, n=3, priority=1, eos_token_ids=())
        here.step()
        here.one(28, 4, priority=0)  # none of them can stay
        here.run()  # the model tells whether a token stands on the wrong block


# Ends


@pytest.mark.parametrize("ahead", [False, True])
def test_a_deadline_ends_a_request_wherever_it_is(world, ahead):
    here = world(num_blocks=14, page=2, max_num_seqs=3, ahead=ahead, preemption="swap")
    requests = [here.one(4, 16, deadline=here.clock.now + 1.0) for _ in range(3)]
    waiting = here.one(4, 16, deadline=here.clock.now + 1.0)
    late = here.one(4, 4)
    for _ in range(9):
        here.step()
    here.clock.now += 1.0
    done = here.step()
    assert set(done.step.rejected) >= {*requests, waiting}
    assert {(r.finish_reason, r.stop_reason) for r in (*requests, waiting)} == {("abort", "deadline")}
    here.run()
    assert late.finish_reason == "length"


def test_deadlines_of_those_who_have_ended_are_not_kept(world):
    """A server with a limit of ten minutes must not remember ten minutes of requests."""
    here = world()
    for _ in range(50):
        here.one(3, 2, deadline=here.clock.now + 600.0)
        here.run()
    assert not getattr(here.scheduler, "_deadlines", [])


@pytest.mark.parametrize("ahead", [False, True])
def test_who_ended_in_a_step_that_failed_hears_it_once(world, ahead):
    for where in ("launch", "collect"):
        for lead in range(4):
            here = world(ahead=ahead, max_num_seqs=2)
            here.one(3, 9)
            here.one(3, 9, deadline=here.clock.now + 1.0)
            here.one(3, 3, deadline=here.clock.now + 2.0)
            for _ in range(lead):
                here.step()
            for _ in range(3):
                here.clock.now += 1.0
                here.executor.failing = where
                try:
                    here.step()
                except FailureError:
                    here.check()
                here.executor.failing = ""
            here.run()  # everybody's end is told once (`World.end`), or this does not end
            assert len(here.told) == 3


def test_a_token_that_can_not_be_chosen_ends_its_sequence_alone(world):
    here = world()
    bad = here.one([1, 2, POISON], 40)
    good = here.one([1, 2, 3], 40)
    here.run()
    assert (bad.finish_reason, good.finish_reason) == ("error", "length")


# What it costs


def test_nothing_of_it_imports_torch():
    modules = ["scheduler", "policies", "loop", "memory", "null_executor", "null_engine", "scheduler_config"]
    code = f"import sys; {'; '.join(f'import phase4_scheduler.{m}' for m in modules)}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60, check=False).returncode == 0


@pytest.mark.parametrize("policy", POLICIES)
def test_hundreds_of_steps_a_second_for_64_sequences(parts, policy):
    """A loose bound, for a machine with other work: an engine's step takes ten times as long at least."""
    scheduler = parts[0].Scheduler(
        ModelMemory(4000, 16), SchedulerConfig(max_num_seqs=64, max_num_batched_tokens=256, scheduling_policy=policy)
    )
    for i in range(500):
        scheduler.add(Request(str(i), [1] * (10 + i % 90), SamplingParams(temperature=0), 0, (), 100 + i % 50))
    best, seqs = 0.0, 0
    for _ in range(4):
        began = time.process_time()
        for _ in range(200):
            step = scheduler.next_step()
            seqs += len(step.scheduled)
            sampling = set(step.sampling)
            scheduler.finish(step, [[1] if r in sampling else [] for r in step.requests])
        best = max(best, 200 / (time.process_time() - began))
    print(f"{policy}: {best:,.0f} steps a second")
    assert best > 500 and seqs > 4 * 200 * 40
