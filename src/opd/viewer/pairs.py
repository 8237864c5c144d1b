"""Rewards of the same prompts in two evaluations: the paired difference with its interval, and McNemar's pairs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from opd.maths.intervals import Interval, mean_interval, paired_interval
from opd.maths.statistics import mcnemar
from opd.viewer.read import Columns
from opd.viewer.responses import KEYED, keys_of

Setting: TypeAlias = tuple[str | None, str | None]  # task and sampling setting
Scores: TypeAlias = dict[Setting, dict[Any, list[float]]]  # the rewards of each prompt, by sample

SCORED = (*KEYED, "reward")  # what `scores` reads


@dataclass(frozen=True, slots=True)
class Paired:
    """Two evaluations of the same prompts, by setting. `difference` is the second's mean minus the first's.

    `only_first` and `only_second` count prompts on which that one alone has reward 1, and `p` is McNemar's; all None
    unless every prompt has one sample with a reward of 0 or 1.
    """

    prompts: int
    first: float
    second: float
    difference: Interval
    only_first: int | None = None
    only_second: int | None = None
    both: int | None = None
    p: float | None = None


def scores(columns: Columns | None, by: str = "id") -> Scores:
    """The rewards of a file of held-out responses; rows without one are left out. `by` as for `keys_of`."""
    found: Scores = {}
    if columns is None:
        return found
    for key, reward in zip(keys_of(columns, by), columns.values("reward"), strict=True):
        if reward is not None:
            found.setdefault(key[:2], {}).setdefault(key[2], []).append(float(reward))
    return found


def paired(first: dict[Any, list[float]], second: dict[Any, list[float]]) -> Paired | None:
    """The comparison on the prompts that both have; None without any."""
    prompts = [key for key in first if key in second]
    if not prompts:
        return None
    a, b = ([one[key] for key in prompts] for one in (first, second))
    means = [sum(map(_mean, one)) / len(one) for one in (a, b)]
    found = Paired(len(prompts), means[0], means[1], paired_interval(b, a))
    if any(len(one) != 1 or one[0] not in (0.0, 1.0) for one in (*a, *b)):
        return found
    wins = [(x[0], y[0]) for x, y in zip(a, b, strict=True)]
    one, two, both = (wins.count(pair) for pair in ((1.0, 0.0), (0.0, 1.0), (1.0, 1.0)))
    return Paired(found.prompts, found.first, found.second, found.difference, one, two, both, mcnemar(one, two))


def unpaired(rewards: Iterable[Sequence[float]]) -> Interval | None:
    """The mean over prompts of one evaluation with its own interval; None without prompts."""
    means = [_mean(one) for one in rewards]
    if not means:
        return None
    return mean_interval(means, (0.0, 1.0) if all(0 <= mean <= 1 for mean in means) else None)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
