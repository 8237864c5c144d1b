"""Which task a step takes, and which of its prompts: a function of (seed, step), so that the step alone resumes it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import ceil

from opd.data import shuffled
from opd.types import Prompt


@dataclass(frozen=True, slots=True)
class Span:
    """`count` prompts of task number `task`, from position `first` of the task's endless order."""

    task: int
    first: int
    count: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """The prompts of every step of a stage; a stage without tasks has one.

    A step takes `count` prompts of one task, and the tasks take turns by their shares (arXiv 2603.25562, Table A1: 200
    steps of mathematics and 200 of ALFWorld, alternating); or, `mixed`, the prompts of a step take those turns. Each
    task goes through its own prompts in the order of `data.shuffled`, however often the others have theirs.
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
            ((task, earlier),) = turns(self.shares, first=step, count=1)
            return [Span(task, earlier * self.count, self.count)]
        firsts: dict[int, list[int]] = {}
        for task, earlier in turns(self.shares, first=step * self.count, count=self.count):
            firsts.setdefault(task, []).append(earlier)
        return [Span(task, earlier[0], len(earlier)) for task, earlier in sorted(firsts.items())]

    def may_repeat(self, step: int) -> bool:
        """Whether a step goes past the end of a task's prompts, so that it may take one twice."""
        sizes = [len(prompts) for prompts in self.prompts]
        return any(s.first // sizes[s.task] < (s.first + s.count - 1) // sizes[s.task] for s in self.spans(step))


def turns(shares: Sequence[float], *, first: int, count: int) -> list[tuple[int, int]]:
    """Turns number `first` to `first + count` of an endless sequence: (task, how many turns it had before).

    Turn k of a task that has the part p of all shares lies at the time (k + 1/2) / p. Turns follow each other in the
    order of these times, at the same time in the order of the tasks. So equal shares alternate, and after m turns every
    task has had m p of them to within (number of tasks + 1) / 2. Exact arithmetic, no state.
    """
    whole = sum(map(Fraction, shares))
    parts = [Fraction(share) / whole for share in shares]
    half = Fraction(1, 2)
    start = max(first - len(parts), 0)  # at most `first` turns lie before this time
    had = [max(0, ceil(start * part - half)) for part in parts]
    found: list[tuple[int, int]] = []
    while len(found) < count:
        task = min(range(len(parts)), key=lambda i: ((had[i] + half) / parts[i], i))
        if sum(had) >= first:
            found.append((task, had[task]))
        had[task] += 1
    return found
