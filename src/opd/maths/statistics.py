"""Estimates and their intervals, for evaluation. numpy and the standard library only.

Resampling is over prompts, never over tokens or samples: samples of one prompt are not independent.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

from opd.errors import ConfigError, DataError

_DRAWS_AT_ONCE = 1 << 22  # 32 MiB of indices


@dataclass(frozen=True, slots=True)
class Interval:
    """A mean and the bounds of its confidence interval."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.mean:.2f} [{self.low:.2f}, {self.high:.2f}]"


def pass_at_k(n: int, c: int, k: int) -> float:
    """Unbiased estimate of the probability that at least one of k samples is correct, given c correct of n samples.

    Chen et al. 2021, arXiv 2107.03374, section 2.1: 1 - C(n - c, k) / C(n, k), computed as a product because the
    binomials overflow.

    Raises:
        ConfigError: k < 1, or k > n.
    """
    assert 0 <= c <= n, f"{c} right of {n} samples"
    if not 1 <= k <= n:
        raise ConfigError(
            f"pass@{k} cannot be estimated from {n} samples per prompt: k must be at least 1 and at most the number "
            f"of samples. Draw at least {max(k, 1)} samples per prompt, or use a k in 1..{n}."
        )
    if n - c < k:
        return 1.0
    return float(1.0 - np.prod(1.0 - k / np.arange(n - c + 1, n + 1, dtype=np.float64)))


def wilson(successes: float, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson score interval of a proportion: (low, high) in [0, 1], wider than 0.

    `successes` may be fractional: a sum of shares over prompts with several samples.
    """
    assert 0 <= successes <= n != 0, f"{successes} successes of {n}"
    assert 0 < confidence < 1, f"confidence {confidence}"
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    share = successes / n
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    # At 0 and n successes one bound is exactly 0 or 1; rounding would miss it.
    low = 0.0 if successes == 0 else centre - half
    high = 1.0 if successes == n else centre + half
    return max(low, 0.0), min(high, 1.0)


def bootstrap_mean(
    values: Sequence[float], confidence: float = 0.95, resamples: int = 10_000, seed: int = 0
) -> tuple[float, float]:
    """Percentile bootstrap of the mean over prompts: (low, high), in the unit of the values.

    The same values and seed give the same bounds. Equal values, or a single value, give an interval of zero width.
    """
    data = np.asarray(values, dtype=np.float64)
    assert data.ndim == 1, f"values of shape {data.shape}"
    assert len(data) > 0, "no value to resample"
    assert 0 < confidence < 1, f"confidence {confidence}"
    rng = np.random.default_rng(seed)
    rows = max(1, _DRAWS_AT_ONCE // len(data))
    means = np.concatenate(
        [
            data[rng.integers(0, len(data), size=(min(rows, resamples - start), len(data)))].mean(axis=1)
            for start in range(0, resamples, rows)
        ]
    )
    low, high = np.quantile(means, [0.5 - confidence / 2, 0.5 + confidence / 2])
    return float(low), float(high)


def mean_interval(per_prompt: Sequence[float], binary: bool) -> Interval:
    """The mean over prompts with its 95% interval.

    `per_prompt` holds one number per prompt: its score, or the mean score of its samples. `binary`: each sample is
    right or wrong. Wilson if every prompt has one binary sample (all values are 0 or 1), or if all values of binary
    data are equal, where a bootstrap would have zero width. Otherwise a bootstrap over prompts.

    Raises:
        DataError: no prompts.
    """
    n = len(per_prompt)
    if n == 0:
        raise DataError("A mean needs at least one prompt, got none. Check the evaluation data and its filter.")
    total = math.fsum(per_prompt)
    if binary:
        assert all(0 <= value <= 1 for value in per_prompt), "the share of right samples lies in [0, 1]"
        if all(value in (0, 1) for value in per_prompt) or len(set(per_prompt)) == 1:
            return Interval(total / n, *wilson(min(total, n), n))
    return Interval(total / n, *bootstrap_mean(per_prompt))


def repeated(ids: Sequence[int], n: int = 3) -> list[bool]:
    """For each token of a response, whether the n-gram that ends there occurred earlier in the response.

    arXiv 2605.11182, released diagnostics (n = 3).
    """
    assert n >= 1
    seen: set[tuple[int, ...]] = set()
    out = [False] * len(ids)
    for end in range(n, len(ids) + 1):
        gram = tuple(ids[end - n : end])
        out[end - 1] = gram in seen
        seen.add(gram)
    return out


def repeat_ratio(ids: Sequence[int], n: int = 3) -> float:
    """Share of a response's tokens at which `repeated` holds.

    0.0 for a response shorter than n; close to 1.0 for a response that loops.
    """
    return sum(repeated(ids, n)) / len(ids) if len(ids) else 0.0


def distinct_share(texts: Sequence[str]) -> float:
    """Share of different texts: 1.0 if no two are equal, 1 / len(texts) if all are."""
    assert texts, "no text to compare"
    return len(set(texts)) / len(texts)


def auroc(scores: Sequence[float] | np.ndarray, right: Sequence[bool] | np.ndarray) -> float | None:
    """Probability that a right response scores higher than a wrong one, ties count half; None without both kinds.

    The area under the ROC curve as Mann and Whitney's U (1947): 0.5 for uninformative scores.
    """
    values, labels = np.asarray(scores, dtype=np.float64), np.asarray(right, dtype=bool)
    assert values.shape == labels.shape, f"{values.shape} scores of {labels.shape} responses"
    wrong = np.sort(values[~labels])
    if not labels.any() or not len(wrong):
        return None
    below = np.searchsorted(wrong, values[labels], side="left")
    not_above = np.searchsorted(wrong, values[labels], side="right")
    return float((below + not_above).sum() / (2 * labels.sum() * len(wrong)))


def effective_share(log_weights: Sequence[float] | np.ndarray) -> float:
    """Kish's effective sample size (sum w)^2 / sum w^2 as a share of the n samples, from log w: in [1/n, 1].

    Computed on w / max w, so that no weight overflows.
    """
    logs = np.asarray(log_weights, dtype=np.float64)
    assert len(logs) > 0, "no weight"
    weights = np.exp(logs - logs.max())
    return float(weights.sum() ** 2 / np.square(weights).sum() / len(logs))


def top_share(values: Sequence[float] | np.ndarray, share: float = 0.05) -> float | None:
    """Share of the sum of positive values that the largest `share` of all values (rounded up) holds.

    None if no value is positive. 1.0: the other values add nothing.
    """
    assert 0 < share <= 1
    data = np.sort(np.asarray(values, dtype=np.float64))[::-1].clip(min=0.0)
    total = math.fsum(data)
    return math.fsum(data[: math.ceil(share * len(data))]) / total if total > 0 else None


@dataclass(frozen=True, slots=True)
class Recovery:
    """Share of a gap that was closed; without bounds if the gap may be 0."""

    share: float
    bounds: tuple[float, float] | None


def gap_recovery(
    before: Sequence[float], teacher: Sequence[float], after: Sequence[float], confidence: float = 0.95
) -> Recovery | None:
    """(after - before) / (teacher - before) of means over the same prompts, in the same order, with its interval.

    The gap recovery rate of arXiv 2604.13016. None unless the teacher's mean is above the mean before. The interval is
    Fieller's (1954) for a ratio of means, from the prompts' paired differences: all r for which the mean of after -
    before - r (teacher - before) lies within z standard errors of 0. It is bounded only if the gap is more than z
    standard errors from 0. Otherwise, and for a single prompt, there are no bounds. Equal differences on all prompts
    give an interval of zero width.
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
        return Recovery(ratio, None)
    spread = np.cov(gain, gap) / n * NormalDist().inv_cdf(0.5 + confidence / 2) ** 2
    # gap^2 r^2 - 2 gain gap r + gain^2 <= z^2 Var: a parabola in r that is at most 0 between its roots.
    square = gap.mean() ** 2 - spread[1, 1]
    if square <= 0:
        return Recovery(ratio, None)
    middle = (gain.mean() * gap.mean() - spread[0, 1]) / square
    constant = (gain.mean() ** 2 - spread[0, 0]) / square
    half = math.sqrt(max(middle * middle - constant, 0.0))
    return Recovery(ratio, (float(middle - half), float(middle + half)))
