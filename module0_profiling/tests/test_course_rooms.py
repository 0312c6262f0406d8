"""The proofs of prove.py for every room of this repository that has a framework."""

from __future__ import annotations

import pytest

from module0_profiling.course import leaks, prove, signatures

every_room = pytest.mark.parametrize("room", prove.taught())


@every_room
def test_framework_and_solution_have_the_same_interface(room: str) -> None:
    assert signatures.problems(room) == []


@every_room
def test_no_answer_is_in_the_framework(room: str) -> None:
    assert leaks.problems(room) == []


@every_room
def test_every_task_has_a_mark_three_hints_and_a_gate(room: str) -> None:
    assert prove.loose_tasks(room) == []


@every_room
def test_the_framework_fails_its_gates_for_the_intended_reason_and_the_solution_passes(room: str) -> None:
    problems, _ = prove.gates_as_promised(room, tests_of=("framework",))  # the solution's tests are run beside this
    assert problems == []


@every_room
def test_every_planted_bug_is_caught(room: str) -> None:
    proof = prove.uncaught(room)
    print(f"caught {proof.caught}/{proof.planted}")
    assert proof.problems == ()
