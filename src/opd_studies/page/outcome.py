"""A study's outcome: claims, numbers over seeds, and verdicts that follow by a rule. No torch here.

The rule is a `Check`: an interval compared with the claim's threshold. Thresholds are constants of a study's file; its
`judge(numbers)` only compares numbers with them, so the verdict depends on the numbers alone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from opd.errors import ConfigError
from opd.maths.intervals import Interval, mean_interval

if TYPE_CHECKING:
    from matplotlib.figure import Figure

State: TypeAlias = Literal["holds", "contradicted", "undecided"]  # of a claim in one setting


Verdict: TypeAlias = State | Literal["holds in A only", "holds in B only"]


VERDICTS: tuple[Verdict, ...] = ("holds", "holds in A only", "holds in B only", "contradicted", "undecided")


@dataclass(frozen=True, slots=True)
class SeedInterval(Interval):
    """A mean over seeds with its interval. `at_floor`: every measured number is 0, or every one is 1.

    There the interval has no width because the measured share cannot go further, not because the seeds agree.
    """

    at_floor: bool = False


INTERVAL = ("mean", "low", "high", "at_floor")


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """A number that a claim is about, and the claim's bounds on it."""

    what: str  # with its unit
    interval: SeedInterval
    above: float | None = None
    below: float | None = None

    def __post_init__(self) -> None:
        assert self.above is not None or self.below is not None, f"{self.what}: a check without a threshold cannot fail"

    @property
    def state(self) -> State:
        """Holds if the whole interval is within the claim's bounds, contradicted if all of it is beyond one of them.

        Otherwise, at a floor and with a NaN: undecided.
        """
        low, high = self.interval.low, self.interval.high
        if self.interval.at_floor or math.isnan(low) or math.isnan(high):
            return "undecided"
        if (self.above is not None and high <= self.above) or (self.below is not None and low >= self.below):
            return "contradicted"
        within = (self.above is None or low > self.above) and (self.below is None or high < self.below)
        return "holds" if within else "undecided"

    def __str__(self) -> str:
        i = self.interval
        floor = "at the end of its range; " if i.at_floor else ""
        return f"{self.what} {ranged(i)} ({floor}{self.rule})"

    @property
    def rule(self) -> str:
        """The threshold in words."""
        sides = [("above", self.above), ("below", self.below)]
        return "claim: " + " and ".join(f"{side} {short(bound)}" for side, bound in sides if bound is not None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One claim of a paper, and the checks of it: in setting A, and in setting B if the study has one."""

    claim: str
    citation: str  # arXiv id, and equation, figure or section
    checks: tuple[Check, ...]
    second: tuple[Check, ...] = ()

    def __post_init__(self) -> None:
        assert self.checks, f"{self.claim}: a finding without a check cannot fail"

    @property
    def verdict(self) -> Verdict:
        """Of setting A, which is the paper's own or the nearest to it, unless A and B differ in whether it holds."""
        first = state(self.checks)
        if not self.second or state(self.second) == first:
            return first
        if first == "holds":
            return "holds in A only"
        return "holds in B only" if state(self.second) == "holds" else first

    @property
    def measured(self) -> str:
        """The numbers with 95 % intervals over seeds, each with its rule; with a second setting, the state in each."""
        if not self.second:
            return "; ".join(map(str, self.checks))
        return ". ".join(
            f"{setting} ({state(checks)}): {'; '.join(map(str, checks))}"
            for setting, checks in (("A", self.checks), ("B", self.second))
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """The result of a study's `run`. `table` holds more numbers; its first row is the header."""

    setup: str  # models, data, scale, number of seeds
    findings: tuple[Finding, ...]
    figure: Figure
    table: tuple[tuple[str, ...], ...] = field(default=())


def over_seeds(values: Sequence[float]) -> SeedInterval:
    """The mean and its 95 % interval over independent seeds, by Student's t. `values` has one number per seed.

    Raises ConfigError for fewer than three seeds.
    """
    if len(values) < 3:
        raise ConfigError(f"An interval over seeds needs at least 3 seeds, got {len(values)}. Give more seeds.")
    found = mean_interval(values, None)
    return SeedInterval(found.mean, found.low, found.high, at_floor=set(values) == {0.0})


def differences(first: Sequence[float], second: Sequence[float]) -> SeedInterval:
    """`first` minus `second`, paired by seed, so that effects of the seed cancel. Raises as `over_seeds` does.

    At a floor are two measurements that are both 0, or both 1, on every seed; equal ones that differ by seed are not.
    """
    found = over_seeds([a - b for a, b in zip(first, second, strict=True)])
    return replace(found, at_floor={*first, *second} in ({0.0}, {1.0}))


def ranged(one: Interval) -> str:
    """The mean and the interval as text, for a table."""
    return f"{short(one.mean)} [{short(one.low)}, {short(one.high)}]"


def chosen(rates: Mapping[str, Mapping[str, float]]) -> str:
    """Learning rates by setting and arm as text, for a study's setup."""
    by_setting = {setting: ", ".join(f"{arm} {rate:g}" for arm, rate in own.items()) for setting, own in rates.items()}
    return "; ".join(f"{setting}: {text}" for setting, text in by_setting.items())


def finding(claim: str, citation: str, checks: Sequence[Check], second: Sequence[Check] = ()) -> Finding:
    return Finding(claim=claim, citation=citation, checks=tuple(checks), second=tuple(second))


def state(checks: Sequence[Check]) -> State:
    """Of a claim in one setting: holds if all checks hold, contradicted if at least one is."""
    states = {check.state for check in checks}
    if states == {"holds"}:
        return "holds"
    return "contradicted" if "contradicted" in states else "undecided"


def as_record(one: Finding) -> dict[str, Any]:
    """A finding as JSON values: the numbers and thresholds, from which `from_record` has the verdict."""
    settings = {"A": one.checks, "B": one.second}
    return {"claim": one.claim, "citation": one.citation} | {
        setting: [_flat(check) for check in checks] for setting, checks in settings.items() if checks
    }


def from_record(record: Mapping[str, Any]) -> Finding:
    """The finding of `as_record`. Raises KeyError or TypeError for another record."""
    sides = [tuple(_check(row) for row in record.get(setting, ())) for setting in ("A", "B")]
    return Finding(claim=record["claim"], citation=record["citation"], checks=sides[0], second=sides[1])


def _flat(check: Check) -> dict[str, Any]:
    interval = {name: getattr(check.interval, name) for name in INTERVAL}
    return {"what": check.what, **interval, "above": check.above, "below": check.below}


def _check(row: Mapping[str, Any]) -> Check:
    interval = SeedInterval(**{name: row[name] for name in INTERVAL})
    return Check(what=row["what"], interval=interval, above=row["above"], below=row["below"])


def short(value: float) -> str:
    """The number with three significant digits, without exponent where possible."""
    return f"{value:.2e}" if value and (abs(value) < 1e-3 or abs(value) >= 1e5) else f"{value:.3g}"
