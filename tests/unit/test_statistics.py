"""Estimators against enumeration, textbook values and their own coverage."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from opd.errors import ConfigError, DataError
from opd.statistics import Interval, bootstrap_mean, distinct_share, mean_interval, pass_at_k, repeat_ratio, wilson


@pytest.mark.parametrize("n", range(1, 7))
def test_pass_at_k_is_the_share_of_subsets_with_a_right_sample(n: int):
    for c, k in itertools.product(range(n + 1), range(1, n + 1)):
        subsets = list(itertools.combinations(range(n), k))
        share = sum(any(i < c for i in subset) for subset in subsets) / len(subsets)
        assert pass_at_k(n, c, k) == pytest.approx(share, abs=1e-12)


def test_pass_at_k_does_not_overflow_or_cancel():
    expected = 1 - math.prod((10_000 - 3 - i) / (10_000 - i) for i in range(5_000))
    assert pass_at_k(10_000, 3, 5_000) == pytest.approx(expected, rel=1e-9)
    assert pass_at_k(10_000, 0, 10_000) == 0.0
    assert pass_at_k(10_000, 1, 10_000) == 1.0


@given(st.integers(1, 60).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n), st.integers(1, n))))
def test_pass_at_k_grows_with_k_and_with_right_samples(case: tuple[int, int, int]):
    n, c, k = case
    value = pass_at_k(n, c, k)
    assert 0.0 <= value <= 1.0
    assert pass_at_k(n, c, 1) == pytest.approx(c / n)
    if k < n:
        assert pass_at_k(n, c, k + 1) >= value - 1e-12
    if c < n:
        assert pass_at_k(n, c + 1, k) >= value - 1e-12


@pytest.mark.parametrize(("k", "wanted"), [(9, "Draw at least 9 samples"), (0, "Draw at least 1 samples")])
def test_pass_at_k_says_what_is_missing(k: int, wanted: str):
    with pytest.raises(ConfigError, match=rf"pass@{k} cannot be estimated from 8 samples .*{wanted}.*a k in 1\.\.8"):
        pass_at_k(8, 2, k)
    with pytest.raises(ValueError, match="pass@9"):
        pass_at_k(8, 2, 9)


def test_wilson_matches_published_values():
    # Newcombe 1998, Statistics in Medicine 17, table I, method 3.
    for successes, n, low, high in ((81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611)):
        assert wilson(successes, n) == pytest.approx((low, high), abs=5e-5)
    assert wilson(29, 29) == pytest.approx((0.8830, 1.0), abs=5e-5)


@given(st.integers(1, 400).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_contains_the_share_is_symmetric_and_never_flat(case: tuple[int, int]):
    successes, n = case
    low, high = wilson(successes, n)
    assert 0.0 <= low <= successes / n <= high <= 1.0
    assert high - low > 0
    assert wilson(n - successes, n) == pytest.approx((1 - high, 1 - low), abs=1e-12)
    inner = wilson(successes, n, confidence=0.5)
    assert low <= inner[0] <= inner[1] <= high


def test_bootstrap_is_deterministic_and_close_to_the_normal_interval():
    values = np.random.default_rng(1).normal(3.0, 2.0, size=400).tolist()
    low, high = bootstrap_mean(values)
    assert (low, high) == bootstrap_mean(values)
    assert (low, high) != bootstrap_mean(values, seed=1)
    half = 1.96 * np.std(values) / math.sqrt(len(values))
    assert (low, high) == pytest.approx((np.mean(values) - half, np.mean(values) + half), abs=0.02)
    narrow = bootstrap_mean(values, confidence=0.5)
    assert low < narrow[0] < narrow[1] < high


def test_bootstrap_in_several_draws_is_as_good_as_in_one():
    values = np.random.default_rng(2).uniform(size=20_000).tolist()  # 209 resamples fit into one draw
    low, high = bootstrap_mean(values, resamples=500)
    half = 1.96 * np.std(values) / math.sqrt(len(values))
    assert (low, high) == pytest.approx((np.mean(values) - half, np.mean(values) + half), abs=half / 4)


def test_bootstrap_covers_the_true_mean_about_as_often_as_it_says():
    rng = np.random.default_rng(3)
    samples = rng.binomial(4, 0.6, size=(300, 60)) / 4
    hits = 0
    for i, sample in enumerate(samples):
        low, high = bootstrap_mean(sample.tolist(), resamples=500, seed=i)
        hits += low <= 0.6 <= high
    assert 0.90 <= hits / len(samples) <= 0.985


def test_mean_interval_picks_wilson_for_single_binary_samples():
    values = [1.0] * 21 + [0.0] * 5
    interval = mean_interval(values, binary=True)
    assert (interval.low, interval.high) == wilson(21, 26)
    assert str(interval) == "0.81 [0.62, 0.91]"


def test_mean_interval_bootstraps_several_samples_a_prompt_and_scores():
    values = [0.0, 0.25, 0.5, 1.0, 1.0, 0.75]
    for binary in (True, False):
        interval = mean_interval(values, binary=binary)
        assert (interval.low, interval.high) == bootstrap_mean(values)
        assert interval.mean == pytest.approx(3.5 / 6)
    assert mean_interval([0.0, 1.0, 1.0], binary=False).low == bootstrap_mean([0.0, 1.0, 1.0])[0]


@pytest.mark.parametrize("value", [0.0, 0.5, 1.0])
def test_equal_binary_values_never_give_certainty(value: float):
    interval = mean_interval([value] * 8, binary=True)
    assert (interval.low, interval.high) == wilson(8 * value, 8)
    assert interval.high - interval.low > 0.3


def test_equal_scores_have_no_spread_to_resample():
    assert mean_interval([2.5] * 4, binary=False) == Interval(2.5, 2.5, 2.5)


def test_mean_interval_needs_a_prompt():
    with pytest.raises(DataError, match=r"at least one prompt, and there is none\. Check the evaluation data"):
        mean_interval([], binary=True)
    with pytest.raises(AssertionError, match=r"lies in \[0, 1\]"):
        mean_interval([2.0], binary=True)


def test_repeat_ratio_counts_tokens_that_end_a_known_ngram():
    assert repeat_ratio([]) == repeat_ratio([1, 1]) == repeat_ratio([1, 2, 3, 4, 5]) == 0.0
    assert repeat_ratio([1, 2, 3, 1, 2, 3]) == 1 / 6  # only the last 3 ends "1 2 3" again
    assert repeat_ratio([7] * 10) == 7 / 10  # the first "7 7 7" ends at the third token
    assert repeat_ratio([1, 2] * 50) == 96 / 100
    assert repeat_ratio([1, 2, 1, 3, 1], n=1) == 2 / 5
    assert repeat_ratio([1, 1], n=2) == 0.0


def test_distinct_share():
    assert distinct_share(["a", "b", "a", "a"]) == 0.5
    assert distinct_share(["a"]) == 1.0
    with pytest.raises(AssertionError, match="no text"):
        distinct_share([])
