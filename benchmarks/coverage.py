"""How often the 95 % intervals of an evaluation contain the truth, and how wide they are, beside other rules.

    python benchmarks/coverage.py [--draws 1000]

Prompts have different rates of right samples, drawn from a beta distribution. Its `clustering` is the correlation of
two samples of one prompt: 0 is one rate for all prompts, and near 1 a prompt is always right or always wrong. The truth
is the mean over all prompts that could have been drawn: of avg@n the mean rate, of pass@k that of 1 - (1 - rate)^k.
A second grid has prompts of two kinds, few easy ones among many hard ones, which no beta distribution describes. A
third has the difference of two models on the same prompts. Prints the tables of docs/diagnostics.md. Needs no model.
"""

from __future__ import annotations

import argparse
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from statistics import NormalDist

import numpy as np

from opd.maths.intervals import SHARE, clopper_pearson, effective_prompts, mean_interval, paired_interval
from opd.maths.quantiles import student_t_quantile
from opd.maths.statistics import pass_at_k

Z = NormalDist().inv_cdf(0.975)
RESAMPLES = 1000
POOL = 100_000  # rates of prompts, from which those of a paired evaluation are drawn


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """An evaluation: `samples` of each of `prompts`, whose rates are drawn around `rate`, or are of two `kinds`."""

    prompts: int
    samples: int
    rate: float  # or, with two kinds, the share of the first
    clustering: float = 0.0
    kinds: tuple[float, float] | None = None  # the rates of both kinds

    def draw(self, rng: np.random.Generator, draws: int) -> np.ndarray:
        """Numbers of right samples [draws, prompts]."""
        return rng.binomial(self.samples, self.rates(rng.random((draws, self.prompts)), rng))

    def rates(self, uniform: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        if self.kinds is not None:
            return np.where(uniform < self.rate, *self.kinds)
        return np.full(uniform.shape, self.rate) if not self.clustering else rng.beta(*self.beta, size=uniform.shape)

    @property
    def beta(self) -> tuple[float, float]:
        total = 1 / self.clustering - 1
        return self.rate * total, (1 - self.rate) * total

    def truth(self, k: int) -> float:
        """The mean over prompts of 1 - (1 - rate)^k."""
        if self.kinds is not None:
            first, second = (1 - (1 - rate) ** k for rate in self.kinds)
            return self.rate * first + (1 - self.rate) * second
        if not self.clustering:
            return 1 - (1 - self.rate) ** k
        a, b = self.beta
        return 1 - math.prod((b + i) / (a + b + i) for i in range(k))

    def __str__(self) -> str:
        what = f"{self.rate:.2f}, {self.clustering:.2f}" if self.kinds is None else f"{self.rate:.2f} at {self.kinds}"
        return f"{self.prompts} x {self.samples}, {what}"


RATES, CLUSTERING = (0.05, 0.2, 0.5, 0.95), (0.0, 0.05, 0.2, 0.5, 0.8)


GRID = [
    Setting(prompts=n, samples=m, rate=rate, clustering=clustering)
    for n, m, rate, clustering in itertools.product((10, 15, 20), (4, 8, 16), RATES, CLUSTERING)
]


TWO_KINDS = [
    Setting(prompts=n, samples=m, rate=share, kinds=kinds)
    for n, m, share, kinds in itertools.product(
        (10, 20), (4, 16), (0.02, 0.05, 0.1, 0.3), ((1.0, 0.0), (0.9, 0.02), (0.5, 0.0))
    )
]


@dataclass(frozen=True, slots=True)
class Coverage:
    share: float
    width: float


Ends = tuple[np.ndarray, np.ndarray]


def by_moments(rule: Callable[[np.ndarray], tuple[float, float]]) -> Callable[[np.ndarray], Ends]:
    """`rule` (values of one draw) -> (low, high) over all draws; once for draws of equal sum and sum of squares."""

    def apply(values: np.ndarray) -> Ends:
        moments = np.stack([values.sum(1), np.square(values).sum(1)], 1).round(9)
        _, first, where = np.unique(moments, axis=0, return_index=True, return_inverse=True)
        ends = np.array([rule(values[i]) for i in first])
        return ends[where.ravel(), 0], ends[where.ravel(), 1]

    return apply


def ours(values: np.ndarray) -> tuple[float, float]:
    found = mean_interval(values.tolist(), SHARE)
    return found.low, found.high


def wilson(share: float, n: float, z: float = Z) -> tuple[float, float]:
    """Wilson 1927."""
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return centre - half, centre + half


def student(values: np.ndarray) -> tuple[float, float]:
    half = student_t_quantile(0.975, len(values) - 1) * values.std(ddof=1) / math.sqrt(len(values))
    return values.mean() - half, values.mean() + half


def measured_size(values: np.ndarray, samples: int) -> float:
    """p (1 - p) over the measured variance of the mean, at most all samples; where it is unknown, the prompts."""
    n, mean, variance = len(values), values.mean(), values.var(ddof=1) / len(values)
    if not 0 < mean < 1:
        return float(n)
    return min(mean * (1 - mean) / variance, n * samples) if variance > 0 else float(n * samples)


def korn_graubard(values: np.ndarray, samples: int) -> tuple[float, float]:
    """Korn and Graubard 1998: Clopper and Pearson's with the effective size, less for its few degrees of freedom."""
    size = measured_size(values, samples) * (Z / student_t_quantile(0.975, len(values) - 1)) ** 2
    return clopper_pearson(values.mean(), max(size, 1.0))


def bootstrap(values: np.ndarray) -> Ends:
    """Percentiles of means of resampled prompts; Wilson's on prompts where all are equal."""
    n = values.shape[1]
    weights = np.random.default_rng(0).multinomial(n, [1 / n] * n, size=RESAMPLES) / n
    low, high = np.quantile(values @ weights.T, [0.025, 0.975], axis=1)
    flat = values.min(1) == values.max(1)
    wide = np.array([wilson(share, n) for share in values.mean(1)])
    return np.where(flat, wide[:, 0], low), np.where(flat, wide[:, 1], high)


def rules(samples: int) -> dict[str, Callable[[np.ndarray], Ends]]:
    """Rules by name; each takes shares [draws, prompts] from `samples` samples a prompt."""
    one_draw: dict[str, Callable[[np.ndarray], tuple[float, float]]] = {
        "opd": ours,
        "Wilson, effective prompts": lambda x: wilson(x.mean(), effective_prompts(x.tolist())),
        "Korn and Graubard": lambda x: korn_graubard(x, samples),
        "Wilson, effective samples": lambda x: wilson(x.mean(), measured_size(x, samples)),
        "Clopper-Pearson, prompts": lambda x: clopper_pearson(x.mean(), len(x)),
        "Wilson, prompts": lambda x: wilson(x.mean(), len(x)),
        "Wilson, samples": lambda x: wilson(x.mean(), len(x) * samples),
        "Student's t, prompts": student,
    }
    return {**{name: by_moments(rule) for name, rule in one_draw.items()}, "bootstrap, prompts": bootstrap}


def covered(setting: Setting, k: int, draws: int, seed: int) -> dict[str, Coverage]:
    """Coverage and mean width of every rule for pass@k; k = 1 is avg@n."""
    counts = setting.draw(np.random.default_rng(seed), draws)
    table = np.array([pass_at_k(setting.samples, right, k) for right in range(setting.samples + 1)])
    return {
        name: coverage_of(rule(table[counts]), setting.truth(k))
        for name, rule in rules(max(setting.samples // k, 1)).items()
    }


def coverage_of(ends: Ends, truth: float) -> Coverage:
    low, high = ends
    inside = (low <= truth + 1e-12) & (truth - 1e-12 <= high)
    return Coverage(float(inside.mean()), float((high - low).mean()))


def paired(setting: Setting, gain: float, link: bool, draws: int, seed: int) -> dict[str, Coverage]:
    """Of the difference from a model whose rate is larger by `gain`; `link`: the same prompts are hard for both."""
    rng = np.random.default_rng(seed)
    better = replace(setting, rate=setting.rate + gain)
    # Rates by quantile, so that one number per prompt can choose those of both models.
    low, high = (np.sort(one.rates(rng.random(POOL), rng)) for one in (setting, better))
    shape = (draws, setting.prompts)
    place = rng.integers(0, POOL, shape)
    other = place if link else rng.integers(0, POOL, shape)
    first, second = (rng.binomial(setting.samples, one) / setting.samples for one in (low[place], high[other]))

    def rule(row: np.ndarray) -> tuple[float, float]:
        found = paired_interval([[value] for value in np.maximum(row, 0)], [[value] for value in np.maximum(-row, 0)])
        return found.low, found.high

    found: dict[str, Callable[[np.ndarray], Ends]] = {
        "opd": by_moments(rule),
        "Student's t, prompts": by_moments(student),
        "bootstrap, prompts": bootstrap_of_differences,
    }
    truth = float(high.mean() - low.mean())
    return {name: coverage_of(one(second - first), truth) for name, one in found.items()}


def bootstrap_of_differences(values: np.ndarray) -> Ends:
    n = values.shape[1]
    weights = np.random.default_rng(0).multinomial(n, [1 / n] * n, size=RESAMPLES) / n
    low, high = np.quantile(values @ weights.T, [0.025, 0.975], axis=1)
    return low, high


Row = tuple[str, dict[str, Coverage]]


def rows_of(grid: Sequence[Setting], draws: int, passes: bool) -> Iterator[Row]:
    for seed, setting in enumerate(grid):
        for k in (2, 4, 8, 16) if passes else (1,):
            if k <= setting.samples:
                yield f"{setting}" + (f", k = {k}" if passes else ""), covered(setting, k, draws, seed)


def paired_rows(draws: int) -> Iterator[Row]:
    grid = itertools.product((10, 20), (1, 4, 16), (0.05, 0.2, 0.5, 0.9), (0.0, 0.2, 0.8), (0.0, 0.05), (False, True))
    for seed, (n, m, rate, clustering, gain, link) in enumerate(grid):
        if link and not clustering:  # all prompts have one rate
            continue
        setting = Setting(prompts=n, samples=m, rate=rate, clustering=clustering)
        said = f"{setting}, gain {gain:.2f}" + (", alike" if link else "")
        yield said, paired(setting, gain, link, draws, seed)


def print_table(title: str, rows: Iterable[Row]) -> None:
    """One line per rule: its lowest coverage and where, the share of settings below .93, mean coverage and width."""
    found = list(rows)
    print(f"\n**{title}** ({len(found)} settings)\n")
    print("| rule | lowest coverage | where | settings below .93 | mean coverage | mean width |")
    print("|---|--:|---|--:|--:|--:|")
    for name in found[0][1]:
        cells = [(covering[name], where) for where, covering in found]
        low, where = min(cells, key=lambda cell: cell[0].share)
        below = sum(one.share < 0.93 for one, _ in cells)
        share, width = (np.mean([getattr(one, what) for one, _ in cells]) for what in ("share", "width"))
        print(f"| {name} | {low.share:.3f} | {where} | {below} | {share:.3f} | {width:.3f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, default=1000, help="evaluations drawn per setting")
    draws: int = parser.parse_args().draws
    print_table("avg@n", rows_of(GRID, draws, passes=False))
    print_table("pass@k", rows_of(GRID, draws, passes=True))
    print_table("avg@n, two kinds of prompts", rows_of(TWO_KINDS, draws, passes=False))
    print_table("pass@k, two kinds of prompts", rows_of(TWO_KINDS, draws, passes=True))
    print_table("difference of two models", paired_rows(draws))


if __name__ == "__main__":
    main()
