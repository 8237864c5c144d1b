"""Means over prompts with their 95 % intervals. benchmarks/coverage.py measures how often they contain the truth.

Samples of one prompt are not independent, so an interval is over prompts, never over samples or tokens. Of means over
seeds, with one number per run, it is Student's t: `mean_interval` without bounds, and `welch_interval`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from opd.errors import DataError
from opd.maths.quantiles import beta_quantile, student_t_quantile
from opd.plugins import np

Bounds: TypeAlias = tuple[float, float]

SHARE: Bounds = (0.0, 1.0)  # a probability, or a reward of right and wrong
DIFFERENCE: Bounds = (-1.0, 1.0)  # of two shares


@dataclass(frozen=True, slots=True)
class Interval:
    """A mean and the bounds of its confidence interval."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.mean:.2f} [{self.low:.2f}, {self.high:.2f}]"

    def numbers(self, name: str) -> dict[str, float]:
        """NAME, NAME_low and NAME_high; NAME alone if the interval is infinite."""
        ends = {f"{name}_low": self.low, f"{name}_high": self.high} if math.isfinite(self.high - self.low) else {}
        return {name: self.mean, **ends}


def clopper_pearson(share: float, n: float, confidence: float = 0.95) -> Bounds:
    """The interval of Clopper and Pearson (1934) of a share of n trials: it covers at least as often as it says.

    `n` and the number of successes `share * n` may be fractional, as an effective number is (Korn and Graubard 1998).
    """
    assert 0 <= share <= 1 <= n, f"share {share} of {n}"
    assert 0 < confidence < 1, f"confidence {confidence}"
    tail = (1 - confidence) / 2
    right, wrong = share * n, (1 - share) * n
    # With less than 0.01 of a success (0, but for rounding) the bound is below 1e-158.
    low = beta_quantile(tail, right, wrong + 1) if right > 0.01 else 0.0
    high = beta_quantile(1 - tail, right + 1, wrong) if wrong > 0.01 else 1.0
    return low, high


def effective_prompts(shares: Sequence[float]) -> float:
    """The number of single right-or-wrong samples whose share is as certain as the mean of the prompts' `shares`.

    n p (1 - p) / s^2, n over Kish's design effect (1965), with the mean p and the variance s^2 of the shares in [0, 1]
    and of one more prompt, half always right and half always wrong (Jeffreys's prior of a share). It is n if all shares
    are 0 or 1, and larger the more alike the prompts are; about n^2 if they are equal. The additional prompt keeps the
    variance from 0, where the few prompts that were drawn happen to be alike.
    """
    data = np.asarray(shares, dtype=np.float64)
    assert len(data) > 0, "no share"
    assert ((data >= 0) & (data <= 1)).all(), "a share lies in [0, 1]"
    n = len(data)
    mean = (data.sum() + 0.5) / (n + 1)
    variance = (np.square(data - mean).sum() + 0.5 * mean**2 + 0.5 * (1 - mean) ** 2) / (n + 1)
    return max(float(n * mean * (1 - mean) / variance), float(n))


def mean_interval(per_prompt: Sequence[float], bounds: Bounds | None) -> Interval:
    """The mean over prompts with its 95 % interval.

    `per_prompt` has one number per prompt: its score, the mean of its samples' scores, or its pass@k. With `bounds`,
    between which all numbers must lie, the interval is that of Clopper and Pearson with `effective_prompts`: for one
    right-or-wrong sample per prompt the exact one. Without, it is Student's t: infinite for a single prompt, and of
    zero width for equal numbers.

    Raises:
        DataError: no prompts.
    """
    n = len(per_prompt)
    if n == 0:
        raise DataError("A mean needs at least one prompt, got none. Check the evaluation data and its filter.")
    mean = math.fsum(per_prompt) / n
    if bounds is None:
        half = _half(per_prompt, mean)
        return Interval(mean, mean - half, mean + half)
    low, high = bounds
    assert all(low <= value <= high for value in per_prompt), f"a value lies in [{low}, {high}]"
    shares = [min((value - low) / (high - low), 1.0) for value in per_prompt]
    ends = clopper_pearson(min(math.fsum(shares) / n, 1.0), effective_prompts(shares))
    return Interval(mean, *(low + (high - low) * end for end in ends))


def bounds_of(values: Iterable[float]) -> Bounds | None:
    """`SHARE` if all values lie in [0, 1], the bounds that `mean_interval` then takes; else None."""
    return SHARE if all(0 <= value <= 1 for value in values) else None


def paired_interval(first: Sequence[Sequence[float]], second: Sequence[Sequence[float]]) -> Interval:
    """The mean over prompts of `first` minus `second`, both scores [prompts][samples] of the same prompts.

    Within [-1, 1] if all scores are shares, else by Student's t. Raises as `mean_interval` does.
    """
    gains = [math.fsum(a) / len(a) - math.fsum(b) / len(b) for a, b in zip(first, second, strict=True)]
    known = bounds_of(score for group in (*first, *second) for score in group)
    return mean_interval(gains, None if known is None else DIFFERENCE)


def welch_interval(first: Sequence[float], second: Sequence[float]) -> Interval:
    """The mean of `first` minus that of `second`, of two independent samples whose variances may differ.

    Student's t with the degrees of freedom of Welch (1947): (a + b)^2 / (a^2 / (n - 1) + b^2 / (m - 1)), where a and b
    are the variances of the two means, n and m their numbers of values. Infinite if a sample has a single value, of
    zero width if both have equal values alone.

    Raises:
        DataError: a sample has no values.
    """
    if not first or not second:
        raise DataError(
            f"A difference of means needs a value in each sample, got {len(first)} and {len(second)}. Give both."
        )
    means = [math.fsum(values) / len(values) for values in (first, second)]
    difference = means[0] - means[1]
    if min(len(first), len(second)) == 1:
        return Interval(difference, -math.inf, math.inf)
    a, b = (_variance(values, mean) / len(values) for values, mean in zip((first, second), means, strict=True))
    if a + b == 0:
        return Interval(difference, difference, difference)
    degrees = (a + b) ** 2 / (a**2 / (len(first) - 1) + b**2 / (len(second) - 1))
    half = student_t_quantile(0.975, degrees) * math.sqrt(a + b)
    return Interval(difference, difference - half, difference + half)


def jackknife_interval(
    statistic: Callable[[Sequence[float]], float | None], prompts: Sequence[Sequence[float]]
) -> Interval | None:
    """A function of sums over prompts, with its 95 % interval by leaving out each prompt in turn.

    Each prompt gives its terms of the sums, of which `statistic` gets the totals: of a ratio of means, numerator and
    denominator. Tukey's jackknife (1958): Student's t of the pseudo-values n s - (n - 1) s_without_i, around s. None if
    the statistic of all prompts is; of infinite width for a single prompt, or if one is missing without some prompt.
    """
    n, totals = len(prompts), [math.fsum(terms) for terms in zip(*prompts, strict=True)]
    if (whole := statistic(totals)) is None:
        return None
    rests = [[total - term for total, term in zip(totals, terms, strict=True)] for terms in prompts]
    without = [statistic(rest) for rest in rests] if n > 1 else [None]
    pseudo = [n * whole - (n - 1) * one for one in without if one is not None]
    half = _half(pseudo, math.fsum(pseudo) / n) if len(pseudo) == n else math.inf
    return Interval(whole, whole - half, whole + half)


def _half(values: Sequence[float], mean: float, confidence: float = 0.95) -> float:
    """Half the width of Student's t interval of a mean; infinite for a single value."""
    n = len(values)
    if n == 1:
        return math.inf
    return student_t_quantile(0.5 + confidence / 2, n - 1) * math.sqrt(_variance(values, mean) / n)


def _variance(values: Sequence[float], mean: float) -> float:
    """The unbiased variance of at least two values with this mean."""
    return math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1)


@dataclass(frozen=True, slots=True)
class Recovery:
    """Share of a gap that was closed, with its interval, or why it has none."""

    share: float
    bounds: Bounds | None
    unbounded: str = ""  # why there are no bounds


def gap_recovery(
    before: Sequence[float], teacher: Sequence[float], after: Sequence[float], confidence: float = 0.95
) -> Recovery | None:
    """(after - before) / (teacher - before) of means over the same prompts, in the same order, with its interval.

    The gap recovery rate of arXiv 2604.13016. None unless the teacher's mean is above the mean before. The interval is
    Fieller's (1954) for a ratio of means, from the prompts' paired differences: all r for which the mean of after -
    before - r (teacher - before) lies within t standard errors of 0, t of Student's distribution with n - 1 degrees of
    freedom. It is bounded only if the gap is more than t standard errors from 0. Otherwise, and for a single prompt,
    there are no bounds; nor if the differences are equal on all prompts, which say nothing about other prompts.
    """
    b, t, a = (np.asarray(values, dtype=np.float64) for values in (before, teacher, after))
    assert b.shape == t.shape == a.shape, f"{b.shape}, {t.shape} and {a.shape} prompts"
    assert 0 < confidence < 1, f"confidence {confidence}"
    n = len(b)
    if n == 0 or t.mean() <= b.mean():
        return None
    gain, gap = a - b, t - b
    ratio = float(gain.mean() / gap.mean())
    if n == 1:
        return Recovery(ratio, None, "there is one prompt")
    if max(np.ptp(gain), np.ptp(gap)) < 1e-9:  # but for rounding
        return Recovery(ratio, None, "the differences are equal on all prompts")
    spread = np.cov(gain, gap) / n * student_t_quantile(0.5 + confidence / 2, n - 1) ** 2
    # gap^2 r^2 - 2 gain gap r + gain^2 <= t^2 Var: a parabola in r that is at most 0 between its roots.
    square = gap.mean() ** 2 - spread[1, 1]
    if square <= 0:
        return Recovery(ratio, None, "the lead of the teacher may be chance")
    middle = (gain.mean() * gap.mean() - spread[0, 1]) / square
    constant = (gain.mean() ** 2 - spread[0, 0]) / square
    half = math.sqrt(max(middle * middle - constant, 0.0))
    return Recovery(ratio, (float(middle - half), float(middle + half)))
