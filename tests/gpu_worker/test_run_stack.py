"""Whose turn it is on the stack of one GPU's runs."""

from __future__ import annotations

from gpu_worker.run_stack import Place, RunStack


def test_the_newest_that_is_ready_is_next() -> None:
    stack, older, newer, newest = RunStack(), Place(), Place(), Place()
    stack.enter(older, ready=True)
    stack.take(older)
    stack.enter(newer, ready=True)
    stack.enter(newest, ready=False)
    assert stack.gives_way(older)
    stack.put_down(older)
    stack.take(newer)
    assert not stack.gives_way(newer)


def test_a_check_that_is_due_comes_before_whoever_enters_meanwhile() -> None:
    stack, failed, check, newcomer = RunStack(), Place(), Place(urgent=True), Place()
    stack.enter(failed, ready=True)
    stack.take(failed)
    stack.enter(check, ready=True)
    stack.leave(failed)
    stack.enter(newcomer, ready=True)
    assert stack.gives_way(newcomer)
    assert not stack.gives_way(check)
    stack.take(check)
    stack.leave(check)
    stack.take(newcomer)


def test_a_run_that_is_lifted_is_next_after_the_one_on_top() -> None:
    stack, places = RunStack(), [Place() for _ in range(3)]
    for place in places:
        stack.enter(place, ready=True)
    first, second, third = places
    assert stack.lift(first) == (second, first, third)
    assert stack.lift(third) == (second, first, third)
    stack.leave(third)
    assert stack.lift(third) == (second, first)
