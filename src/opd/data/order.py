"""Which task a step takes, and which of its prompts: a function of (seed, step), so that the step alone resumes it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import lcm

import numpy as np

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

    A step takes `count` prompts of one task, and the tasks take turns by their shares (arXiv 2603.25562, Table A1: 200
    steps of mathematics and 200 of ALFWorld, alternating); or, `mixed`, the prompts of a step take those turns. Each
    task goes through its own prompts in the order of `shuffled`, however often the others have theirs.
    """

    prompts: tuple[Sequence[Prompt], ...]  # of each task
    shares: tuple[float, ...]  # of each task, above 0; only their proportions matter
    count: int  # prompts a step
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
        """What a step takes of each task that it takes from."""
        if not self.mixed:
            ((task, earlier),) = interleave(self.shares, first=step, count=1)
            return [Span(task, earlier * self.count, self.count)]
        firsts: dict[int, list[int]] = {}
        for task, earlier in interleave(self.shares, first=step * self.count, count=self.count):
            firsts.setdefault(task, []).append(earlier)
        return [Span(task, earlier[0], len(earlier)) for task, earlier in sorted(firsts.items())]

    def different_at_least(self, step: int) -> int:
        """How many prompts of a step are certainly different, without a look at their order.

        All of them, unless the step goes past the end of a task's prompts: then those of one pass through them.
        """
        return sum(_of_one_pass(span, len(self.prompts[span.task])) for span in self.spans(step))


def _of_one_pass(span: Span, size: int) -> int:
    """The most prompts of a span that belong to one pass through a task's `size` prompts."""
    of_first = min(span.count, size - span.first % size)
    return max(of_first, min(span.count - of_first, size))


def interleave(shares: Sequence[float], *, first: int, count: int) -> list[tuple[int, int]]:
    """Turns number `first` to `first + count` of an endless sequence: (task, how many turns it had before).

    Turn k of a task that has the part p of all shares lies at the time (k + 1/2) / p. Turns follow each other in the
    order of these times, at the same time in the order of the tasks. So equal shares alternate, and after m turns every
    task has had m p of them to within (number of tasks + 1) / 2. Exact arithmetic, no state.
    """
    fractions = [Fraction(share) for share in shares]
    scale = lcm(*(fraction.denominator for fraction in fractions))
    parts = [int(fraction * scale) for fraction in fractions]  # whole numbers in the proportions of the shares
    whole = sum(parts)
    start = max(first - len(parts), 0)  # at most `first` turns lie before this time
    had = [max(0, -((whole - 2 * start * part) // (2 * whole))) for part in parts]  # ceil(start p - 1/2)
    between = [lcm(*parts) // part for part in parts]  # two turns of a task, in a unit in which all are whole
    found: list[tuple[int, int]] = []
    while len(found) < count:
        task = min(range(len(parts)), key=lambda i: ((2 * had[i] + 1) * between[i], i))
        if sum(had) >= first:
            found.append((task, had[task]))
        had[task] += 1
    return found


def shuffled(prompts: Sequence[Prompt], *, first: int, count: int, seed: int) -> list[Prompt]:
    """`count` prompts from position `first` of their endless order, a pure function of the seed.

    Epoch e is the permutation of `numpy.random.default_rng((seed, e))`: no prompt comes twice before its end, and it is
    followed by the next epoch's beginning.
    """
    assert prompts
    assert first >= 0 < count
    places = [divmod(position, len(prompts)) for position in range(first, first + count)]
    epochs = {epoch for epoch, _ in places}
    orders = {epoch: np.random.default_rng((seed, epoch)).permutation(len(prompts)) for epoch in epochs}
    return [prompts[int(orders[epoch][offset])] for epoch, offset in places]
