"""Estimators against enumeration, textbook values and their own coverage."""

from __future__ import annotations

import itertools
import math

import numpy as np
import oracle
import pytest
from hypothesis import given
from hypothesis import strategies as st

from opd.errors import ConfigError, DataError
from opd.maths.statistics import (
    Interval,
    Recovery,
    auroc,
    bootstrap_mean,
    distinct_share,
    effective_share,
    gap_recovery,
    mean_interval,
    pass_at_k,
    repeat_ratio,
    repeated,
    top_share,
    wilson,
)


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
def test_pass_at_k_raises_config_error_when_k_is_out_of_range(k: int, wanted: str):
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
def test_wilson_contains_share_and_is_symmetric(case: tuple[int, int]):
    successes, n = case
    low, high = wilson(successes, n)
    assert 0.0 <= low <= successes / n <= high <= 1.0
    assert high - low > 0
    assert wilson(n - successes, n) == pytest.approx((1 - high, 1 - low), abs=1e-12)
    inner = wilson(successes, n, confidence=0.5)
    assert low <= inner[0] <= inner[1] <= high


def test_bootstrap_mean_is_deterministic_and_near_normal():
    values = np.random.default_rng(1).normal(3.0, 2.0, size=400).tolist()
    low, high = bootstrap_mean(values)
    assert (low, high) == bootstrap_mean(values)
    assert (low, high) != bootstrap_mean(values, seed=1)
    half = 1.96 * np.std(values) / math.sqrt(len(values))
    assert (low, high) == pytest.approx((np.mean(values) - half, np.mean(values) + half), abs=0.02)
    narrow = bootstrap_mean(values, confidence=0.5)
    assert low < narrow[0] < narrow[1] < high


def test_bootstrap_mean_is_near_normal_in_several_draws():
    values = np.random.default_rng(2).uniform(size=20_000).tolist()  # 209 resamples fit into one draw
    low, high = bootstrap_mean(values, resamples=500)
    half = 1.96 * np.std(values) / math.sqrt(len(values))
    assert (low, high) == pytest.approx((np.mean(values) - half, np.mean(values) + half), abs=half / 4)


def test_bootstrap_mean_covers_true_mean_at_given_rate():
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


def test_mean_interval_bootstraps_scores_and_several_samples():
    values = [0.0, 0.25, 0.5, 1.0, 1.0, 0.75]
    for binary in (True, False):
        interval = mean_interval(values, binary=binary)
        assert (interval.low, interval.high) == bootstrap_mean(values)
        assert interval.mean == pytest.approx(3.5 / 6)
    assert mean_interval([0.0, 1.0, 1.0], binary=False).low == bootstrap_mean([0.0, 1.0, 1.0])[0]


@pytest.mark.parametrize("value", [0.0, 0.5, 1.0])
def test_mean_interval_has_width_when_binary_values_are_equal(value: float):
    interval = mean_interval([value] * 8, binary=True)
    assert (interval.low, interval.high) == wilson(8 * value, 8)
    assert interval.high - interval.low > 0.3


def test_mean_interval_is_flat_when_scores_are_equal():
    assert mean_interval([2.5] * 4, binary=False) == Interval(2.5, 2.5, 2.5)


def test_mean_interval_raises_data_error_when_empty():
    with pytest.raises(DataError, match=r"at least one prompt, got none\. Check the evaluation data"):
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


def test_distinct_share_equals_unique_over_all_texts():
    assert distinct_share(["a", "b", "a", "a"]) == 0.5
    assert distinct_share(["a"]) == 1.0
    with pytest.raises(AssertionError, match="no text"):
        distinct_share([])


# --- diagnostics ------------------------------------------------------------------------------------------------------


@given(st.lists(st.integers(0, 3), max_size=30), st.integers(1, 4))
def test_repeated_marks_tokens_that_repeat_ratio_counts(ids: list[int], n: int):
    marks = repeated(ids, n)
    assert len(marks) == len(ids)
    assert repeat_ratio(ids, n) == pytest.approx(oracle.repeat_ratio(ids, n))
    assert sum(marks) == pytest.approx(oracle.repeat_ratio(ids, n) * len(ids))


def test_repeated_marks_the_token_that_ends_a_known_ngram():
    assert repeated([1, 2, 3, 1, 2, 3, 4]) == [False] * 5 + [True, False]


@given(st.lists(st.tuples(st.integers(-3, 3), st.booleans()), min_size=2, max_size=30))
def test_auroc_is_the_share_of_pairs_in_order(rows: list[tuple[int, bool]]):
    scores, right = [float(score) for score, _ in rows], [is_right for _, is_right in rows]
    found = auroc(scores, right)
    if len(set(right)) < 2:
        assert found is None
        return
    assert found == pytest.approx(oracle.auroc(scores, right))
    assert auroc([-s for s in scores], right) == pytest.approx(1 - found)
    assert auroc([math.exp(s) for s in scores], right) == pytest.approx(found)  # only the order counts


@given(st.lists(st.floats(-5, 5), min_size=1, max_size=20))
def test_effective_share_equals_oracle(logs: list[float]):
    found = effective_share(logs)
    assert found == pytest.approx(oracle.effective_share([math.exp(value) for value in logs]))
    assert effective_share([value + 1000 for value in logs]) == pytest.approx(found)  # e^1000 is no number
    assert 1 / len(logs) - 1e-12 <= found <= 1 + 1e-12


def test_effective_share_equals_known_values_at_extremes():
    assert effective_share([0.3] * 7) == pytest.approx(1.0)
    assert effective_share([0.0, -1e4, -1e4, -1e4]) == pytest.approx(0.25)


@given(st.lists(st.floats(-2, 3), min_size=1, max_size=50), st.sampled_from([0.05, 0.3, 1.0]))
def test_top_share_equals_oracle(values: list[float], share: float):
    found = top_share(values, share)
    if max(values) <= 0:
        assert found is None
    elif sum(v for v in values if v > 0) > 1e-6:
        assert found == pytest.approx(oracle.top_share(values, share))


def test_top_share_equals_known_values():
    assert top_share([1.0] * 100) == pytest.approx(0.05)
    assert top_share([-1.0] * 99 + [0.5]) == 1.0


# --- gap recovery -----------------------------------------------------------------------------------------------------


def test_gap_recovery_is_the_ratio_of_the_means():
    found = gap_recovery([0, 0, 1, 0], [1, 1, 1, 0], [1, 0, 1, 0])
    assert found is not None
    assert found.share == pytest.approx(0.5)


@pytest.mark.parametrize("seed", range(5))
def test_gap_recovery_bounds_solve_fieller_equation(seed: int):
    rng = np.random.default_rng(seed)
    before, teacher = rng.normal(0.2, 0.3, 30), rng.normal(0.9, 0.3, 30)
    after = before + 0.7 * (teacher - before) + rng.normal(0, 0.3, 30)
    found = gap_recovery(list(before), list(teacher), list(after))
    assert found is not None
    assert found.bounds is not None
    for r in found.bounds:
        d = [(a - b) - r * (t - b) for a, b, t in zip(after, before, teacher, strict=True)]
        mean = sum(d) / 30
        error = math.sqrt(sum((x - mean) ** 2 for x in d) / 29 / 30)
        assert abs(mean) / error == pytest.approx(1.959964, rel=1e-5)
    assert found.bounds[0] < found.share < found.bounds[1]


def test_gap_recovery_bounds_cover_truth():
    """Right or wrong answers of 40 prompts, as in an evaluation: the truth lies inside in about 95 % of them."""
    rng, inside, bounded = np.random.default_rng(0), 0, 0
    before, teacher, after = 0.1, 0.8, 0.6
    for _ in range(1000):
        u = rng.random(40) * 0.5 + rng.random(40) * 0.5  # hard and easy prompts: answers to one are not independent
        cut = [np.quantile(u, share) for share in (before, teacher, after)]
        found = gap_recovery(*[(np.clip(u + rng.normal(0, 0.05, 40), 0, 1) < c).astype(float) for c in cut])
        truth = (after - before) / (teacher - before)
        if found is not None and found.bounds is not None:
            bounded += 1
            inside += found.bounds[0] <= truth <= found.bounds[1]
    assert bounded == 1000
    assert inside / bounded > 0.9


def test_gap_recovery_has_no_bounds_when_gap_may_be_chance():
    lead = gap_recovery([0, 1, 0, 0, 1, 0], [1, 0, 0, 0, 1, 1], [1, 0, 1, 0, 1, 0])
    assert lead is not None
    assert lead.bounds is None
    assert gap_recovery([0.0], [1.0], [0.5]) == Recovery(0.5, None)
    assert gap_recovery([1, 0], [0, 1], [1, 1]) is None  # the teacher is not ahead
    assert gap_recovery([], [], []) is None
    assert gap_recovery([0, 0], [1, 1], [1, 1]) == Recovery(1.0, (1.0, 1.0))


def test_summary_interval_is_wilson_when_all_responses_are_wrong():
    from support.models import prompts_of, rollout_of, tiny

    from opd.evaluation.evaluate import summary

    lm = tiny()
    wrong = [rollout_of(lm, prompt, [3], sample=i, reward=0.0) for prompt in prompts_of("a", "b") for i in range(4)]
    found = summary(wrong)
    assert (found["reward_low"], found["reward_high"]) == wilson(0, 2)
