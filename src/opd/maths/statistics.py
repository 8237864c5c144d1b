"""Estimates for evaluation. numpy and the standard library only."""

from __future__ import annotations

import math
from collections.abc import Sequence

from opd.errors import ConfigError
from opd.plugins import np


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


def mcnemar(only_first: int, only_second: int) -> float:
    """Exact two-sided p-value of McNemar's test (1947): of pairs that differ, each side has half by chance.

    `only_first` and `only_second` count the pairs in which that one alone succeeded; without such a pair it is 1.
    """
    assert min(only_first, only_second) >= 0
    n = only_first + only_second
    tail = sum(math.comb(n, k) for k in range(min(only_first, only_second) + 1))
    return min(1.0, 2 * tail / 2**n)
