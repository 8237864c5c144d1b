"""The tasks and prompts of each step: a function of (seed, step), so that resuming needs only the step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import ceil, lcm

from opd.plugins import np
from opd.types import Prompt


@dataclass(frozen=True, slots=True)
class Span:
    """`count` prompts of task number `task`, from position `first` of the task's endless order."""

    task: int
    first: int
    count: int


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptOrder:
    """The prompts of every step of a stage; a stage without tasks has one.

    A step takes `count` prompts of one task, and the tasks alternate by their shares (arXiv 2603.25562, Table A1: 200
    steps of mathematics and 200 of ALFWorld, alternating). With `mixed`, the prompts within a step alternate. Each task
    takes its prompts in the order of `shuffled`, independently of the other tasks.
    """

    prompts: tuple[Sequence[Prompt], ...]  # of each task
    shares: tuple[float, ...]  # of each task, above 0; only their proportions matter
    count: int  # prompts per step
    seed: int
    mixed: bool = False

    def take(self, step: int) -> list[Prompt]:
        """The prompts of a step; of a mixed one, task by task."""
        return [
            prompt
            for span in self.spans(step)
            for prompt in shuffled(self.prompts[span.task], first=span.first, count=span.count, seed=self.seed)
        ]

    def spans(self, step: int) -> list[Span]:
        """The spans of a step, one per task that it takes prompts from."""
        if not self.mixed:
            ((task, earlier),) = interleave(self.shares, first=step, count=1)
            return [Span(task, earlier * self.count, self.count)]
        firsts: dict[int, list[int]] = {}
        for task, earlier in interleave(self.shares, first=step * self.count, count=self.count):
            firsts.setdefault(task, []).append(earlier)
        return [Span(task, earlier[0], len(earlier)) for task, earlier in sorted(firsts.items())]

    def unused_tasks(self, steps: int) -> dict[int, int]:
        """The tasks without a prompt in so many steps, by number, and how many steps come before their first prompt."""
        turns = self.count if self.mixed else 1  # of a step
        firsts = {task: first_turn(self.shares, task) // turns for task in range(len(self.shares))}
        return {task: first for task, first in firsts.items() if first >= steps}

    def different_at_least(self, step: int) -> int:
        """The number of prompts of a step that are certainly different, computed without their order.

        All, unless the step passes the end of a task's prompts: then only those of one pass.
        """
        return sum(_of_one_pass(span, len(self.prompts[span.task])) for span in self.spans(step))


def _of_one_pass(span: Span, size: int) -> int:
    """The largest number of the span's prompts within one pass through a task's `size` prompts."""
    of_first = min(span.count, size - span.first % size)
    return max(of_first, min(span.count - of_first, size))


def interleave(shares: Sequence[float], *, first: int, count: int) -> list[tuple[int, int]]:
    """Turns `first` to `first + count` of an endless sequence, as (task, number of its earlier turns).

    Turn k of a task with the fraction p of all shares has the time (k + 1/2) / p. Turns are ordered by time, ties by
    task. So tasks of equal shares alternate, and after m turns every task has had m p of them, to within (number of
    tasks + 1) / 2. Exact arithmetic, no state.
    """
    fractions = [Fraction(share) for share in shares]
    scale = lcm(*(fraction.denominator for fraction in fractions))
    parts = [int(fraction * scale) for fraction in fractions]  # integers in the proportions of the shares
    whole = sum(parts)
    start = max(first - len(parts), 0)  # at most `first` turns lie before this time
    had = [max(0, -((whole - 2 * start * part) // (2 * whole))) for part in parts]  # ceil(start p - 1/2)
    between = [lcm(*parts) // part for part in parts]  # time between a task's turns, as integers
    found: list[tuple[int, int]] = []
    while len(found) < count:
        task = min(range(len(parts)), key=lambda i: ((2 * had[i] + 1) * between[i], i))
        if sum(had) >= first:
            found.append((task, had[task]))
        had[task] += 1
    return found


def first_turn(shares: Sequence[float], task: int) -> int:
    """The number of turns before the first one of a task, in the sequence of `interleave`.

    Task j has turns k with (k + 1/2) / p_j < 1 / (2 p_i), or = if j < i, before it.
    """
    fractions = [Fraction(share) for share in shares]
    own = fractions[task]
    before = 0
    for other, share in enumerate(fractions):
        latest = (share / own - 1) / 2  # k is below this
        before += 0 if other == task else max(0, ceil(latest) + (other < task and latest == ceil(latest)))
    return before


def shuffled(prompts: Sequence[Prompt], *, first: int, count: int, seed: int) -> list[Prompt]:
    """`count` prompts from position `first` of their endless order, a pure function of the seed.

    Epoch e is the permutation of `numpy.random.default_rng((seed, e))`. So no prompt repeats within an epoch.
    """
    assert prompts
    assert first >= 0 < count
    places = [divmod(position, len(prompts)) for position in range(first, first + count)]
    epochs = {epoch for epoch, _ in places}
    orders = {epoch: np.random.default_rng((seed, epoch)).permutation(len(prompts)) for epoch in epochs}
    return [prompts[int(orders[epoch][offset])] for epoch, offset in places]
