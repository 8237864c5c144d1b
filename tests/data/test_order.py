"""Which task a step takes, and which prompts of it."""

from __future__ import annotations

import itertools
import math
import random
from collections import Counter
from fractions import Fraction

import pytest

from opd.data.order import PromptOrder, first_turn, interleave
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
def test_interleave_equals_slice_of_whole_sequence(shares: list[float]):
    whole = played(shares, 150)
    assert interleave(shares, first=0, count=150) == whole
    for first in range(0, 140, 7):
        assert interleave(shares, first=first, count=9) == whole[first : first + 9]


@pytest.mark.parametrize("shares", SHARES, ids=str)
def test_interleave_keeps_shares_at_every_turn(shares: list[float]):
    had: Counter[int] = Counter()
    for number, (task, earlier) in enumerate(interleave(shares, first=0, count=400), start=1):
        assert earlier == had[task]
        had[task] += 1
        for other, share in enumerate(shares):
            assert abs(had[other] - number * share / sum(shares)) <= (len(shares) + 1) / 2


def test_interleave_alternates_when_shares_are_equal():
    assert [task for task, _ in interleave([1.0, 1.0], first=0, count=6)] == [0, 1, 0, 1, 0, 1]
    assert [task for task, _ in interleave([5.0, 5.0, 5.0], first=0, count=6)] == [0, 1, 2, 0, 1, 2]


def order(*sizes: int, count: int = 4, mixed: bool = False, shares: tuple[float, ...] = ()) -> PromptOrder:
    """Prompts with unique ids, their task's number as content."""
    ids = itertools.count()
    prompts = tuple([Prompt(id=next(ids), content=str(task)) for _ in range(size)] for task, size in enumerate(sizes))
    return PromptOrder(prompts=prompts, shares=shares or (1.0,) * len(sizes), count=count, seed=3, mixed=mixed)


def test_prompt_order_alternates_tasks_between_steps():
    steps = [order(10, 7).take(step) for step in range(6)]
    assert [{prompt.content for prompt in prompts} for prompts in steps] == [{"0"}, {"1"}] * 3
    assert all(len(prompts) == 4 for prompts in steps)


def test_prompt_order_of_task_is_unchanged_by_other_tasks():
    """Other tasks move its steps, and change neither their order nor what they hold."""
    alone = [[p.id for p in order(10).take(step)] for step in range(5)]
    among = [[p.id for p in order(10, 7).take(step)] for step in range(10)]
    assert among[::2] == alone


@pytest.mark.parametrize("mixed", [False, True])
def test_prompt_order_takes_whole_permutations_of_each_task(mixed: bool):
    both = order(6, 4, mixed=mixed, shares=(3.0, 2.0), count=5)
    ids = [prompt.id for step in range(20) for prompt in both.take(step)]
    for own in (range(6), range(6, 10)):
        of_task = [i for i in ids if i in own]
        epochs = [of_task[i : i + len(own)] for i in range(0, len(of_task), len(own))]
        assert len(epochs) == 10
        assert all(sorted(epoch) == list(own) for epoch in epochs)


def test_prompt_order_splits_step_by_shares_when_mixed():
    steps = [order(30, 30, mixed=True, shares=(3.0, 1.0), count=8).take(step) for step in range(6)]
    assert [Counter(prompt.content for prompt in prompts) for prompts in steps] == [{"0": 6, "1": 2}] * 6


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("count", [3, 7, 20])
def test_different_at_least_bounds_count_of_distinct_prompts(mixed: bool, count: int):
    one = order(5, 3, mixed=mixed, shares=(2.0, 1.0), count=count)
    least = [one.different_at_least(s) for s in range(60)]
    different = [len({p.id for p in one.take(s)}) for s in range(60)]
    assert all(at_least <= really for at_least, really in zip(least, different, strict=True))
    assert min(different) < count, "some step takes a prompt twice"
    if count == 3:
        assert 0 < least.count(3) < 60
    if count == 20:
        assert set(least) == ({8} if mixed else {3, 5}), "every step has all prompts of its tasks"


def test_different_at_least_is_never_below_half_of_step():
    """So that no step with twice as many prompts as processes has to be taken to know that each gets its own."""
    one = order(1000, 400, shares=(0.7, 0.2), count=16)
    assert min(one.different_at_least(step) for step in range(20_000)) == 8


@pytest.mark.parametrize("seed", range(20))
def test_first_turn_is_place_in_interleaved_sequence(seed: int):
    """Counted: the position of a task's first turn among the turns themselves, ties included."""
    rng = random.Random(seed)
    shares = [rng.choice([0.1, 0.25, 1.0, 1.0, 3.0, 7.5]) for _ in range(rng.randint(1, 5))]
    turns = [task for task, _ in interleave(shares, first=0, count=600)]
    for task in range(len(shares)):
        assert first_turn(shares, task) == turns.index(task)


def test_first_turn_of_tiny_share_is_exact():
    assert first_turn([1.0, 1e-300], 1) == math.ceil((1 / Fraction(1e-300) - 1) / 2)
    order = PromptOrder(prompts=([], []), shares=(1.0, 0.01), count=4, seed=0, mixed=True)
    assert order.unused_tasks(12) == {1: 12}
    assert order.unused_tasks(13) == {}
