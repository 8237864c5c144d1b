"""How well a teacher's gradient points towards right responses, from the rewards after the likely tokens of nodes.

The maths is `opd.maths.node_gradients`. A mean is over the visits of a prompt by their weights, then over prompts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from opd.evaluation.response_tree import NodeKey, Visit, depths_of
from opd.maths.intervals import DIFFERENCE, Interval, jackknife_interval, mean_interval
from opd.maths.node_gradients import (
    ceiling,
    cosine,
    node_gradient,
    same_direction,
    symmetric_noise,
    teacher_values,
)

FORMS = ("reverse_kl", "forward_kl")
SHARPER, NOISE = "the student, sharper", "noise"
CONTROLS = (SHARPER, NOISE)
ALL, RIGHT, WRONG = "all", "right", "wrong"
GAP = (-2.0, 2.0)  # of two cosines


@dataclass(frozen=True, slots=True, kw_only=True)
class Compared:
    """A teacher with a context, and the divergence that is descended; or a control, whose `form` is empty."""

    name: str
    form: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """The numbers of one visit. `cosines` has None where the gradient has no direction: the models agree there."""

    prompt: int
    groups: tuple[str, ...]
    weight: float
    flat: bool  # all tokens have the same mean reward: no ideal gradient
    halves: float  # cosine between the ideal gradients of both halves; 0 if one has no direction
    cosines: Mapping[Compared, float | None]
    sums: Mapping[Compared, Mapping[str, float]]  # for `same_direction`


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """The alignment of one `Compared`: cosines by group of visits, and of all visits as one vector."""

    of: Compared
    cosine: Mapping[str, Interval]
    together: Interval | None  # None: too noisy
    silent: int  # visits left out: student and teacher agree
    by_prompt: Mapping[int, float]  # cosine over all visits of a prompt


@dataclass(frozen=True, slots=True, kw_only=True)
class Alignment:
    """The alignment of all teachers with all contexts, and of the controls."""

    rows: tuple[Row, ...]
    visits: Mapping[str, int]  # with an ideal gradient, by group
    ceiling: Mapping[str, float]  # of the cosine, by group
    flat: int  # visits without an ideal gradient

    def row(self, name: str, form: str) -> Row:
        return next(row for row in self.rows if row.of == Compared(name=name, form=form))


def alignment(visits: Sequence[Visit], rewards: Mapping[NodeKey, Tensor], seed: int) -> Alignment:
    """The alignment over `visits`. `rewards` has those after each token of a node, [S, n] with n >= 2.

    The first half of the n against the second gives the ceiling. `seed` draws the control `NOISE`.
    """
    measured = [_measured(visit, rewards[visit.node.key], (seed, place)) for place, visit in enumerate(visits)]
    with_ideal = [one for one in measured if not one.flat]
    groups = [group for group in _groups(visits) if any(group in one.groups for one in with_ideal)]
    names = list(dict.fromkeys(of for one in measured for of in one.cosines))
    return Alignment(
        rows=tuple(_row(of, measured, groups) for of in names),
        visits={group: sum(group in one.groups for one in with_ideal) for group in groups},
        ceiling={group: _ceiling(with_ideal, group) for group in groups},
        flat=len(measured) - len(with_ideal),
    )


def group_of(window: int) -> str:
    """The name of a window of depths."""
    first, last = depths_of(window)
    return f"depth {first}" if first == last else f"depth {first} to {last}"


def ideal_gradient(student_logp: Tensor, rewards: Tensor) -> Tensor:
    """g* [S] from the rewards after each token, [S, n]."""
    return node_gradient(student_logp.softmax(-1), rewards.mean(-1))


def values_of(student_logp: Tensor, teachers: Mapping[str, Tensor], seed: tuple[int, ...]) -> dict[Compared, Tensor]:
    """f [S] of every teacher in both forms, and of the controls: log P, which makes P sharper, and noise."""
    values = {
        Compared(name=name, form=form): f
        for name, logp in teachers.items()
        for form, f in teacher_values(student_logp, logp).items()
    }
    values[Compared(name=SHARPER, form="")] = student_logp.log_softmax(-1)
    values[Compared(name=NOISE, form="")] = symmetric_noise(tuple(student_logp.shape), seed)
    return values


def _measured(visit: Visit, rewards: Tensor, seed: tuple[int, ...]) -> Measured:
    node = visit.node
    probs = node.student_logp.softmax(-1)
    means = rewards.mean(-1)
    half = rewards.shape[-1] // 2
    ideal = node_gradient(probs, means)
    halves = [ideal_gradient(node.student_logp, part) for part in (rewards[:, :half], rewards[:, half : 2 * half])]
    gradients = {of: node_gradient(probs, f) for of, f in values_of(node.student_logp, node.teacher_logp, seed).items()}
    return Measured(
        prompt=node.prompt.id,
        groups=(ALL, RIGHT if visit.right else WRONG, group_of(visit.window)),
        weight=visit.weight,
        flat=bool(means.min() == means.max()),
        halves=cosine(*halves) or 0.0,
        cosines={of: cosine(ideal, gradient) for of, gradient in gradients.items()},
        sums={
            of: {
                "product": visit.weight * float(ideal @ gradient),
                "halves": visit.weight * float(halves[0] @ halves[1]),
                "teacher": visit.weight * float(gradient @ gradient),
            }
            for of, gradient in gradients.items()
        },
    )


def _row(of: Compared, measured: Sequence[Measured], groups: Sequence[str]) -> Row:
    keys = ("product", "halves", "teacher")
    by_prompt: dict[int, list[float]] = {}
    for one in measured:
        terms = by_prompt.setdefault(one.prompt, [0.0] * len(keys))
        terms[:] = [term + one.sums[of][key] for key, term in zip(keys, terms, strict=True)]

    def together(totals: Sequence[float]) -> float | None:
        return same_direction(dict(zip(keys, totals, strict=True)))

    # A visit without an ideal gradient is in no mean of cosines, but its teacher's gradient is part of the one vector:
    # left out by what few continuations show, it would make that vector's direction depend on their number.
    ideal = [one for one in measured if not one.flat]
    of_group = {group: _by_prompt(ideal, group, lambda one: one.cosines[of]) for group in groups}
    means = {group: list(values.values()) for group, values in of_group.items() if values}
    return Row(
        of=of,
        cosine={group: mean_interval(values, DIFFERENCE) for group, values in means.items()},
        together=jackknife_interval(together, list(by_prompt.values())),
        silent=sum(one.cosines[of] is None for one in ideal),
        by_prompt=of_group.get(ALL, {}),
    )


def _ceiling(measured: Sequence[Measured], group: str) -> float:
    values = list(_by_prompt(measured, group, lambda one: one.halves).values())
    return ceiling(math.fsum(values) / len(values))


def _by_prompt(measured: Sequence[Measured], group: str, value: Callable[[Measured], float | None]) -> dict[int, float]:
    """The weighted mean of `value` over each prompt's visits in a group, where it has a number."""
    sums: dict[int, tuple[float, float]] = {}
    for one in measured:
        number = value(one)
        if group in one.groups and number is not None:
            total, weight = sums.get(one.prompt, (0.0, 0.0))
            sums[one.prompt] = total + one.weight * number, weight + one.weight
    return {prompt: total / weight for prompt, (total, weight) in sums.items()}


def _groups(visits: Sequence[Visit]) -> list[str]:
    return [ALL, RIGHT, WRONG, *(group_of(window) for window in sorted({visit.window for visit in visits}))]


# --- which to take ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """Which teacher and context to take, if any. The differences are over prompts, paired."""

    highest: str
    cosine: Interval  # of the highest
    over_sharper: Interval  # the highest minus the control SHARPER
    others: Mapping[str, Interval]  # the highest minus each other one

    @property
    def best(self) -> str | None:
        """The highest, if its cosine is above 0, the mean of a teacher that knows nothing; else None."""
        return self.highest if self.cosine.low > 0 else None

    @property
    def tied(self) -> list[str]:
        """The others whose difference from the highest may be 0."""
        return [name for name, gap in self.others.items() if gap.low <= 0]


def choice(found: Alignment, form: str) -> Choice | None:
    """The teacher and context with the highest mean cosine in `form`.

    None if no visit has both gradients.
    """
    rows = [row for row in found.rows if row.of.form == form and ALL in row.cosine]
    if not rows:
        return None
    first = max(rows, key=lambda row: row.cosine[ALL].mean)
    return Choice(
        highest=first.of.name,
        cosine=first.cosine[ALL],
        over_sharper=_difference(first, found.row(SHARPER, "")),
        others={row.of.name: _difference(first, row) for row in rows if row is not first},
    )


def _difference(first: Row, second: Row) -> Interval:
    """The mean difference of cosines over the prompts that both have; unknown without one."""
    both = first.by_prompt.keys() & second.by_prompt.keys()
    gaps = [first.by_prompt[i] - second.by_prompt[i] for i in sorted(both)]
    return mean_interval(gaps, GAP) if gaps else Interval(0.0, *GAP)
