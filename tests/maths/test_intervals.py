"""Intervals against enumeration, plain Python, published values and their own coverage."""

from __future__ import annotations

import importlib.util
import math
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import oracle
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import ttest_ind
from support.models import prompts_of, rollout_of, tiny

from opd.errors import DataError
from opd.evaluation.evaluate import summary
from opd.maths.intervals import (
    DIFFERENCE,
    SHARE,
    Interval,
    Recovery,
    bounds_of,
    clopper_pearson,
    effective_prompts,
    gap_recovery,
    jackknife_interval,
    mean_interval,
    paired_interval,
    welch_interval,
)
from opd.maths.quantiles import student_t_quantile

ROOT = Path(__file__).parents[2]


def benchmark(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"benchmark_{name}", ROOT / "benchmarks" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_clopper_pearson_matches_published_values():
    # Newcombe 1998, Statistics in Medicine 17, table I, method 5.
    for right, n, low, high in (
        (81, 263, 0.2527, 0.3676),
        (15, 148, 0.0578, 0.1617),
        (0, 20, 0.0, 0.1684),
        (1, 29, 0.0009, 0.1776),
    ):
        assert clopper_pearson(right / n, n) == pytest.approx((low, high), abs=5e-5)


@settings(deadline=None)
@given(st.floats(0, 1), st.floats(1, 1e4))
def test_clopper_pearson_contains_share_and_is_symmetric(share: float, n: float):
    low, high = clopper_pearson(share, n)
    assert 0.0 <= low <= share <= high <= 1.0
    assert high - low > 0
    mirrored = clopper_pearson(1 - share, n)
    assert mirrored == pytest.approx((1 - high, 1 - low), abs=1e-8)
    inner = clopper_pearson(share, n, confidence=0.5)
    assert low <= inner[0] <= inner[1] <= high


SHARES = st.lists(st.sampled_from([0.0, 0.125, 0.5, 0.6, 1.0]), min_size=1, max_size=40)


@settings(deadline=None)
@given(SHARES)
def test_effective_prompts_equals_oracle_and_counts_prompts(shares: list[float]):
    found = effective_prompts(shares)
    assert found == pytest.approx(oracle.effective_prompts(shares))
    assert found >= len(shares)
    assert found == pytest.approx(effective_prompts([1 - share for share in shares]))


@settings(deadline=None)
@given(st.lists(st.sampled_from([0.0, 1.0]), min_size=1, max_size=40))
def test_mean_interval_is_exact_for_single_binary_samples(values: list[float]):
    n, share = len(values), sum(values) / len(values)
    assert effective_prompts(values) == pytest.approx(n)
    found = mean_interval(values, SHARE)
    assert (found.low, found.high) == pytest.approx(clopper_pearson(share, n), abs=1e-9)


def test_mean_interval_narrows_when_prompts_are_alike():
    alike, apart = mean_interval([0.5] * 10, SHARE), mean_interval([0.0, 1.0] * 5, SHARE)
    assert alike.mean == apart.mean == 0.5
    assert alike.high - alike.low < 0.5 * (apart.high - apart.low)
    assert str(apart) == "0.50 [0.19, 0.81]"
    floor = mean_interval([0.0] * 10, SHARE)
    assert (floor.low, floor.high) == pytest.approx((0.0, 1 - 0.025 ** (1 / 10)))  # 0 of 10: (1 - p)^10 = 2.5 %


def test_mean_interval_moves_with_its_bounds():
    values = [0.0, 0.25, 0.5, 1.0, 1.0, 0.75]
    share = mean_interval(values, SHARE)
    moved = mean_interval([2 * value - 1 for value in values], DIFFERENCE)
    expected = [2 * end - 1 for end in (share.mean, share.low, share.high)]
    assert [moved.mean, moved.low, moved.high] == pytest.approx(expected)


def test_mean_interval_is_student_t_without_bounds():
    values = [1.0, 2.0, 4.0]
    found = mean_interval(values, None)
    half = 4.302653 * math.sqrt(7 / 3 / 3)  # t with 2 degrees of freedom; the variance is 7 / 3
    assert (found.low, found.high) == pytest.approx((7 / 3 - half, 7 / 3 + half), rel=1e-6)
    assert mean_interval([2.5] * 4, None) == Interval(2.5, 2.5, 2.5)


def test_mean_interval_is_infinite_for_one_unbounded_value():
    one = mean_interval([2.5], None)
    assert (one.low, one.high) == (-math.inf, math.inf)
    assert one.numbers("reward") == {"reward": 2.5}
    assert Interval(0.5, 0.25, 1.0).numbers("x") == {"x": 0.5, "x_low": 0.25, "x_high": 1.0}


def test_mean_interval_raises_data_error_when_empty():
    with pytest.raises(DataError, match=r"at least one prompt, got none\. Check the evaluation data"):
        mean_interval([], SHARE)
    with pytest.raises(AssertionError, match=r"lies in \[0.0, 1.0\]"):
        mean_interval([2.0], SHARE)


def test_paired_interval_has_width_when_all_are_equal():
    """At a floor the difference of two models is 0 on every prompt drawn, and may be larger on others."""
    zeros = [[0.0, 0.0]] * 10
    found = paired_interval(zeros, zeros)
    assert found.mean == 0.0
    assert found.high == pytest.approx(-found.low)
    assert 0.1 < found.high < 0.2
    graded = paired_interval([[2.0, 4.0], [1.0, 1.0]], [[0.0, 0.0], [1.0, 1.0]])  # no shares: Student's t
    assert graded.high - graded.mean == pytest.approx(12.7062 * math.sqrt(4.5 / 2), rel=1e-5)
    assert bounds_of([0.0, 1.0]) == SHARE
    assert bounds_of([0.0, 1.5]) is None


def test_intervals_cover_truth_on_corners_of_grid():
    """Of the grid of benchmarks/coverage.py, with as many draws as a test has time for; the previous rule fails."""
    coverage = benchmark("coverage")
    lowest = {"opd": 1.0, "bootstrap, prompts": 1.0}
    for prompts, samples, rate, clustering in (
        (10, 4, 0.05, 0.5),
        (10, 16, 0.05, 0.2),
        (20, 8, 0.2, 0.5),
        (15, 8, 0.95, 0.8),
    ):
        setting = coverage.Setting(prompts=prompts, samples=samples, rate=rate, clustering=clustering)
        for k in (1, samples):
            found = coverage.covered(setting, k, draws=500, seed=5)
            lowest = {name: min(value, found[name].share) for name, value in lowest.items()}
    assert lowest["opd"] >= 0.93
    assert lowest["bootstrap, prompts"] < 0.88


def test_summary_has_intervals_of_reward_and_pass_at_k():
    lm = tiny()
    rewards = {"a": [0.0, 0.0, 0.0, 0.0], "b": [0.0, 1.0, 0.0, 0.0]}
    rows = [
        rollout_of(lm, prompt, [3], sample=i, reward=reward)
        for prompt in prompts_of(*rewards)
        for i, reward in enumerate(rewards[prompt.content])
    ]
    found = summary(rows, pass_at=(1, 2, 4))
    for name, shares in {"reward": [0.0, 0.25], "pass@2": [0.0, 0.5], "pass@4": [0.0, 1.0]}.items():
        expected = mean_interval(shares, SHARE).numbers(name)
        assert {key: found[key] for key in expected} == pytest.approx(expected)
        assert len(expected) == 3
    assert "pass@1" not in found
    graded = summary([rollout_of(lm, prompts_of("a")[0], [3], reward=2.0)], pass_at=(1,))
    assert graded["reward"] == 2.0
    assert "reward_low" not in graded  # one prompt without known bounds


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
        assert abs(mean) / error == pytest.approx(2.045230, rel=1e-5)  # t, 29 degrees of freedom
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
    assert (lead.bounds, lead.unbounded) == (None, "the lead of the teacher may be chance")
    assert gap_recovery([0.0], [1.0], [0.5]) == Recovery(0.5, None, "there is one prompt")
    assert gap_recovery([1, 0], [0, 1], [1, 1]) is None  # the teacher is not ahead
    assert gap_recovery([], [], []) is None
    # Equal differences on two prompts say nothing about other prompts.
    equal = "the differences are equal on all prompts"
    assert gap_recovery([0, 0], [1, 1], [1, 1]) == Recovery(1.0, None, equal)
    assert gap_recovery([0.1, 0.7], [0.3, 0.9], [0.2, 0.8]) == Recovery(pytest.approx(0.5), None, equal)


def test_jackknife_interval_of_mean_is_students():
    values = [0.3, -0.2, 0.9, 0.4, 0.1]
    got = jackknife_interval(lambda sums: sums[0] / sums[1], [(value, 1.0) for value in values])
    wanted = mean_interval(values, None)
    assert got is not None
    assert (got.mean, got.low, got.high) == pytest.approx((wanted.mean, wanted.low, wanted.high))


def test_jackknife_interval_covers_ratio_of_sums():
    rng = np.random.default_rng(0)
    inside = 0
    for _ in range(400):
        pairs = [(x, 0.4 * x + rng.normal(0, 0.5)) for x in rng.uniform(0.5, 2.0, 16)]
        got = jackknife_interval(lambda sums: sums[1] / sums[0], pairs)
        assert got is not None
        inside += got.low <= 0.4 <= got.high
    assert 0.91 <= inside / 400 <= 0.98


def test_jackknife_interval_is_infinite_or_none_where_unknown():
    assert jackknife_interval(lambda sums: None, [[1.0], [2.0]]) is None
    for prompts in ([[2.0]], [[1.0], [2.0]]):
        got = jackknife_interval(lambda sums: sums[0] if sums[0] >= 2 else None, prompts)
        assert got is not None
        assert math.isinf(got.high - got.low)


def test_welch_interval_matches_scipy_and_hand_values():
    first, second = [1.0, 2.0, 3.0], [2.0, 4.0, 6.0, 8.0]
    found = welch_interval(first, second)
    # Variances of the means 1/3 and 5/3: 4 / (1/18 + 25/27) = 216/53 degrees of freedom.
    half = student_t_quantile(0.975, 216 / 53) * math.sqrt(2)
    assert (found.mean, found.low, found.high) == pytest.approx((-3, -3 - half, -3 + half))
    expected = ttest_ind(first, second, equal_var=False).confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high))


def test_welch_interval_of_a_single_value_is_infinite():
    found = welch_interval([1.0], [0.0, 0.5])
    assert (found.mean, found.low, found.high) == (0.75, -math.inf, math.inf)
    assert welch_interval([1.0, 1.0], [0.5, 0.5]) == Interval(0.5, 0.5, 0.5)
    with pytest.raises(DataError, match="got 2 and 0"):
        welch_interval([1.0, 2.0], [])
