"""A study's outcome: claims, numbers over seeds, and verdicts that follow by a rule. No torch here.

The rule is a `Check`: an interval compared with the claim's threshold. Thresholds are constants of a study's file; its
`judge(numbers)` only compares numbers with them, so the verdict depends on the numbers alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, TypeAlias

from opd.errors import ConfigError
from opd.maths.intervals import Interval

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Verdict: TypeAlias = Literal["holds", "does not hold", "holds in setting B only"]


# 97.5 % points of Student's t with 1, 2, ... 19 degrees of freedom.
_T_975 = (
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228),
    *(2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """A number that a claim is about, and the claim's bounds on it.

    It holds if the whole `interval` is above `above`, below `below`, or between them if both are given.
    """

    what: str  # with its unit
    interval: Interval
    above: float | None = None
    below: float | None = None

    def __post_init__(self) -> None:
        assert self.above is not None or self.below is not None, f"{self.what}: a check without a threshold cannot fail"

    @property
    def holds(self) -> bool:
        """Whether the whole interval is within the claim's bounds; never with a NaN."""
        low, high = self.interval.low, self.interval.high
        if math.isnan(low) or math.isnan(high):
            return False
        return (self.above is None or low > self.above) and (self.below is None or high < self.below)

    def __str__(self) -> str:
        i = self.interval
        return f"{self.what} {short(i.mean)} [{short(i.low)}, {short(i.high)}] ({self.rule})"

    @property
    def rule(self) -> str:
        """The threshold in words."""
        sides = [("above", self.above), ("below", self.below)]
        return "claim: " + " and ".join(f"{side} {short(bound)}" for side, bound in sides if bound is not None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One claim of a paper, the measured numbers and the verdict."""

    claim: str
    citation: str  # arXiv id, and equation, figure or section
    measured: str  # numbers with 95 % intervals over seeds, and the rule
    verdict: Verdict


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """The result of a study's `run`. `table` holds more numbers; its first row is the header."""

    setup: str  # models, data, scale, number of seeds
    findings: tuple[Finding, ...]
    figure: Figure
    table: tuple[tuple[str, ...], ...] = field(default=())


def over_seeds(values: Sequence[float]) -> Interval:
    """The mean and its 95 % interval over independent seeds, by Student's t. `values` has one number per seed.

    Raises ConfigError for fewer than three seeds or more than twenty.
    """
    n = len(values)
    if not 3 <= n <= len(_T_975) + 1:
        raise ConfigError(f"An interval over seeds needs 3 to {len(_T_975) + 1} seeds, got {n}. Give more seeds.")
    mean = math.fsum(values) / n
    half = _T_975[n - 2] * math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (n - 1) / n)
    return Interval(mean, mean - half, mean + half)


def differences(first: Sequence[float], second: Sequence[float]) -> Interval:
    """`first` minus `second`, paired by seed, so that effects of the seed cancel. Raises as `over_seeds` does."""
    return over_seeds([a - b for a, b in zip(first, second, strict=True)])


def finding(claim: str, citation: str, checks: Sequence[Check], second: Sequence[Check] = ()) -> Finding:
    """The claim holds if all `checks` hold; in setting B only, if only all of `second` hold."""
    measured = "; ".join(map(str, checks))
    if second:
        measured = f"A: {measured}. B: " + "; ".join(map(str, second))
    return Finding(claim=claim, citation=citation, measured=measured, verdict=verdict(checks, second))


def verdict(checks: Sequence[Check], second: Sequence[Check] = ()) -> Verdict:
    """Whether all of `checks` hold; if not, whether all of `second` (setting B) do."""
    assert checks, "a finding without a check cannot fail"
    if all(check.holds for check in checks):
        return "holds"
    return "holds in setting B only" if second and all(check.holds for check in second) else "does not hold"


def short(value: float) -> str:
    """The number with three significant digits, without exponent where possible."""
    return f"{value:.2e}" if value and (abs(value) < 1e-3 or abs(value) >= 1e5) else f"{value:.3g}"
