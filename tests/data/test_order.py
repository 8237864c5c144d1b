"""Which task a step takes, and which prompts of it."""

from __future__ import annotations

import itertools
from collections import Counter
from fractions import Fraction

import pytest

from opd.data.order import PromptOrder, interleave
from opd.types import Prompt


def played(shares: list[float], count: int) -> list[tuple[int, int]]:
    """The first turns, from a list of all times that could come into it, sorted."""
    whole = sum(map(Fraction, shares))
    times = [
        ((k + Fraction(1, 2)) * whole / Fraction(share), task, k)
        for task, share in enumerate(shares)
        for k in range(count)
    ]
    return [(task, k) for _, task, k in sorted(times)[:count]]


SHARES = [
    [1.0],
    [1.0, 1.0],
    [2.0, 1.0],
    [1.0, 2.0],
    [0.7, 0.2, 0.1],
    [1.0, 1.0, 1.0],
    [1e-3, 1.0],
    [3.0, 1.0, 2.0, 5.0],
]


@pytest.mark.parametrize("shares", SHARES, ids=str)
def test_turns_from_anywhere_are_those_of_the_whole_sequence(shares: list[float]):
    whole = played(shares, 150)
    assert interleave(shares, first=0, count=150) == whole
    for first in range(0, 140, 7):
        assert interleave(shares, first=first, count=9) == whole[first : first + 9]


@pytest.mark.parametrize("shares", SHARES, ids=str)
def test_every_task_has_had_its_share_at_any_time(shares: list[float]):
    had: Counter[int] = Counter()
    for number, (task, earlier) in enumerate(interleave(shares, first=0, count=400), start=1):
        assert earlier == had[task]
        had[task] += 1
        for other, share in enumerate(shares):
            assert abs(had[other] - number * share / sum(shares)) <= (len(shares) + 1) / 2


def test_equal_shares_alternate_in_the_order_of_the_recipe():
    assert [task for task, _ in interleave([1.0, 1.0], first=0, count=6)] == [0, 1, 0, 1, 0, 1]
    assert [task for task, _ in interleave([5.0, 5.0, 5.0], first=0, count=6)] == [0, 1, 2, 0, 1, 2]


def order(*sizes: int, count: int = 4, mixed: bool = False, shares: tuple[float, ...] = ()) -> PromptOrder:
    """Prompts with unique ids, their task's number as content."""
    ids = itertools.count()
    prompts = tuple([Prompt(id=next(ids), content=str(task)) for _ in range(size)] for task, size in enumerate(sizes))
    return PromptOrder(prompts=prompts, shares=shares or (1.0,) * len(sizes), count=count, seed=3, mixed=mixed)


def test_a_step_takes_prompts_of_one_task_and_the_tasks_take_turns():
    steps = [order(10, 7).take(step) for step in range(6)]
    assert [{prompt.content for prompt in prompts} for prompts in steps] == [{"0"}, {"1"}] * 3
    assert all(len(prompts) == 4 for prompts in steps)


def test_a_task_sees_its_prompts_as_if_it_were_alone():
    """Other tasks move its steps, and change neither their order nor what they hold."""
    alone = [[p.id for p in order(10).take(step)] for step in range(5)]
    among = [[p.id for p in order(10, 7).take(step)] for step in range(10)]
    assert among[::2] == alone


@pytest.mark.parametrize("mixed", [False, True])
def test_every_task_goes_through_whole_permutations(mixed: bool):
    both = order(6, 4, mixed=mixed, shares=(3.0, 2.0), count=5)
    ids = [prompt.id for step in range(20) for prompt in both.take(step)]
    for own in (range(6), range(6, 10)):
        of_task = [i for i in ids if i in own]
        epochs = [of_task[i : i + len(own)] for i in range(0, len(of_task), len(own))]
        assert len(epochs) == 10
        assert all(sorted(epoch) == list(own) for epoch in epochs)


def test_a_mixed_step_holds_all_tasks_by_their_shares():
    steps = [order(30, 30, mixed=True, shares=(3.0, 1.0), count=8).take(step) for step in range(6)]
    assert [Counter(prompt.content for prompt in prompts) for prompts in steps] == [{"0": 6, "1": 2}] * 6


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("count", [3, 7, 20])
def test_the_order_knows_without_a_look_how_many_prompts_of_a_step_differ_at_least(mixed: bool, count: int):
    one = order(5, 3, mixed=mixed, shares=(2.0, 1.0), count=count)
    least = [one.different_at_least(s) for s in range(60)]
    different = [len({p.id for p in one.take(s)}) for s in range(60)]
    assert all(at_least <= really for at_least, really in zip(least, different, strict=True))
    assert min(different) < count, "some step takes a prompt twice"
    if count == 3:
        assert 0 < least.count(3) < 60
    if count == 20:
        assert set(least) == ({8} if mixed else {3, 5}), "every step has all prompts of its tasks"


def test_half_of_a_step_is_always_of_one_pass():
    """So that no step with twice as many prompts as processes has to be taken to know that each gets its own."""
    one = order(1000, 400, shares=(0.7, 0.2), count=16)
    assert min(one.different_at_least(step) for step in range(20_000)) == 8
