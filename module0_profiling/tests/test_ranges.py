"""Ranges are seen by whoever watches, and cost nothing when nobody does."""

from __future__ import annotations

import timeit
from contextlib import nullcontext

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from module0_profiling import ranges
from module0_profiling.ranges import span


def names(recorded: profile) -> list[str]:
    return [event.name for event in recorded.events() if event.is_user_annotation]


def test_a_torch_profile_holds_the_ranges_around_its_operators():
    with profile(activities=[ProfilerActivity.CPU]) as recorded, span("forward"), span("mlp"):
        torch.ones(2) + 1
    assert {"forward", "mlp"} <= set(names(recorded))
    (add,) = [event for event in recorded.events() if event.name == "aten::add"]
    assert add.cpu_parent.name == "mlp" and add.cpu_parent.cpu_parent.name == "forward"


def test_a_range_ends_when_an_exception_leaves_it():
    with profile(activities=[ProfilerActivity.CPU]) as recorded:
        with pytest.raises(ZeroDivisionError), span("broken"):
            _ = 1 / 0
        with span("next"):
            torch.ones(2) + 1
    after = next(event for event in recorded.events() if event.name == "next")
    assert after.cpu_parent is None


def test_nobody_watching_gets_one_shared_object():
    assert span("a") is span("b")


def test_under_nsight_a_range_is_pushed_and_popped(monkeypatch):
    seen: list[object] = []
    monkeypatch.setattr(ranges, "NVTX", True)
    monkeypatch.setattr(torch.cuda.nvtx, "range_push", seen.append)
    monkeypatch.setattr(torch.cuda.nvtx, "range_pop", lambda: seen.append("pop"))
    with span("outer"), span("inner"):
        pass
    assert seen == ["outer", "inner", "pop", "pop"]


def best(statement: str, **scope: object) -> float:
    return min(timeit.repeat(statement, globals=scope, number=20_000, repeat=9))


def test_an_unwatched_range_costs_about_as_much_as_an_empty_context():
    off = best("with span('forward'): pass", span=span)
    empty = best("with nullcontext(): pass", nullcontext=nullcontext)
    assert off / empty < 1.2  # 0.5 on a quiet machine; record_function takes 25


def test_a_compiled_function_has_no_ranges_and_no_second_graph_when_a_profiler_starts():
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    @torch.compile(fullgraph=True, backend=backend)
    def step(x):
        with span("attention"):
            x = x + 1
        with span("mlp"):
            return x * 2

    assert step(torch.ones(2)).tolist() == [4, 4]
    with profile(activities=[ProfilerActivity.CPU]) as recorded:
        assert step(torch.ones(2)).tolist() == [4, 4]
    assert len(graphs) == 1
    calls = [node.target for node in graphs[0].graph.nodes if node.op == "call_function"]
    assert len(calls) == 2, f"only the addition and the product: {calls}"
    assert "attention" not in names(recorded)
