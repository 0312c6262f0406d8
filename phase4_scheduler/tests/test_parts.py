"""What every implementation of the parts must do: the solution, the framework, or the learner (`IMPL=mine`).

What the solution does beyond it, test_scheduler.py and the others say.
"""

from __future__ import annotations

import asyncio
import json
import random
import socket

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test

from module0_profiling.course.parts import resolve
from phase0_prototype.request import Request
from phase0_prototype.sampling_params import SamplingParams
from phase4_scheduler.bench.http_client import Address, Pool
from phase4_scheduler.scheduler_config import POLICIES, SchedulerConfig
from phase4_scheduler.server.options import ServerOptions
from phase4_scheduler.tests.engines import null_llm, run, tokens
from phase4_scheduler.tests.hash_model import POISON, FailureError
from phase4_scheduler.tests.scheduling import World

ROOM = "phase4_scheduler"


def machine(parts, ahead):
    """Enough tokens a step for any prompt; too few blocks and places for all who come."""

    class Machine(RuleBasedStateMachine):
        @initialize(
            num_blocks=st.integers(6, 16),
            seqs=st.integers(1, 6),
            policy=st.sampled_from(POLICIES),
            preemption=st.sampled_from(["recompute", "swap"]),
        )
        def make(self, num_blocks, seqs, policy, preemption):
            self.world = World(
                *parts,
                num_blocks=num_blocks,
                page=3,
                ahead=ahead,
                faults=(0.3, 0.3, 0.3),
                max_num_seqs=seqs,
                max_num_batched_tokens=64,
                scheduling_policy=policy,
                preemption=preemption,
            )

        @rule(
            prompt=st.integers(1, 10),
            tokens=st.integers(1, 8),
            n=st.sampled_from([1, 1, 2]),
            patience=st.sampled_from([None, 1.5, 5.0]),
            odd=st.sampled_from(["", "", "", "poison", "penalty"]),
        )
        def add(self, prompt, tokens, n, patience, odd):
            world = self.world
            ids = [(world.count + i) % 5 for i in range(prompt)]
            if odd == "poison":
                ids[-1] = POISON
            penalty = 1.5 if odd == "penalty" else 1.0
            params = SamplingParams(n=n, temperature=1.0 if n > 1 else 0, repetition_penalty=penalty)
            deadline = None if patience is None else world.clock.now + patience
            world.add(ids, tokens, n, deadline=deadline, params=params)
            world.check()

        @precondition(lambda self: self.world.loop.has_unfinished())
        @rule(count=st.integers(1, 4))
        def steps(self, count):
            for _ in range(count):
                self.world.step()

        @precondition(lambda self: self.world.loop.has_unfinished())
        @rule(where=st.sampled_from(["launch", "collect"]))
        def fail(self, where):
            self.world.executor.failing = where
            try:
                self.world.step()
            except FailureError:
                self.world.check()
            self.world.executor.failing = ""

        @precondition(lambda self: self.world.live)
        @rule(data=st.data())
        def abort(self, data):
            self.world.abort(data.draw(st.sampled_from(self.world.live)))

        @rule()
        def wait(self):
            self.world.clock.now += 2.0

        def teardown(self):
            if hasattr(self, "world") and self.world.sound:
                self.world.run()

    return Machine


@pytest.mark.parametrize("ahead", [False, True], ids=["Loop", "AheadLoop"])
def test_whoever_comes_ends_once_with_what_it_says_alone(parts, ahead):
    options = settings(
        max_examples=40,
        stateful_step_count=25,
        deadline=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
        report_multiple_bugs=False,
    )
    run_state_machine_as_test(machine(parts, ahead), settings=options)


@pytest.mark.parametrize("policy", POLICIES)
def test_alike_requests_begin_in_the_order_of_their_arrival(parts, policy):
    world = World(*parts, max_num_seqs=2, max_num_batched_tokens=64, scheduling_policy=policy)
    for second in range(8):
        world.clock.now = 1.0 + second / 100
        world.one(3, 4)
    world.run()
    assert [request.request_id for request in world.told] == [f"{i}.0" for i in range(1, 9)]


def test_by_arrival_is_the_order_of_arrivals_whatever_else_a_request_says(use):
    policy = resolve(ROOM, "policies", use).make_policy(SchedulerConfig(scheduling_policy="fcfs"))
    requests = [
        Request(str(i), [1] * (9 - i), SamplingParams(), 0, (), 9 - i, priority=-i, arrival=float(i)) for i in range(8)
    ]
    shuffled = random.Random(0).sample(requests, 8)
    assert sorted(shuffled, key=policy.key) == requests


def test_a_door_without_bounds_lets_everybody_in_and_advice_is_between_its_ends(use):
    module = resolve(ROOM, "server.admission", use)
    for crowd, speed in ((0, 0.0), (3, 10.0), (5000, 0.0), (5000, 0.1), (5000, 1e9)):
        load = module.Load(crowd, crowd, 4, crowd * 100, crowd * 150.0, speed)
        assert module.Admission().refusal(load, 128, 10**6) is None
        assert module.SHORTEST <= module.retry_after(load) <= module.LONGEST


BAD = [
    ({"max_tokens": 4}, "prompt"),
    ({"prompt": "x", "max_tokens": -1}, "max_tokens"),
    ({"prompt": "x", "tools": [{}]}, "tools"),
    ({"prompt": "x", "temperatur": 0}, "temperatur"),
]


def test_a_front_answers_what_it_serves_and_says_what_is_wrong_with_the_rest(use):
    front = resolve(ROOM, "server.front", use)

    async def ask():
        stop = asyncio.Event()
        options = ServerOptions(api_keys=("secret",), use=str(use))
        async with null_llm() as llm:
            with socket.create_server(("127.0.0.1", 0)) as sock:
                address = Address("127.0.0.1", sock.getsockname()[1], False, "")
                serving = asyncio.create_task(front.serve(llm, options, sock, stop))
                async with Pool(address) as pool:
                    assert (await pool.fetch("/health", {}))[0] == 200
                    assert (await pool.fetch("/v1/completions", {}))[0] == 401
                    assert (await pool.fetch("/nothing", {"Authorization": "Bearer secret"}))[0] == 404
                    for body, field in BAD:
                        status, answer = await post(pool, body)
                        assert (status, field in answer["error"]["message"]) == (400, True), answer
                    status, answer = await post(pool, {"prompt": "x", "max_tokens": 5, "seed": 1})
                    right = (await llm.generate("x", tokens(5, seed=1))).outputs[0].text
                    assert (status, answer["choices"][0]["text"]) == (200, right)
                    assert answer["usage"]["completion_tokens"] == 5
                stop.set()
                await serving  # ends when it is told to

    run(ask())


async def post(pool, body):
    """Status and answer."""
    pieces = []
    headers = {"Content-Type": "application/json", "Authorization": "Bearer secret"}
    head = await pool.request(
        "POST", "/v1/completions", headers, json.dumps(body).encode(), lambda _, piece: pieces.append(piece)
    )
    return head.status, json.loads(b"".join(pieces))
