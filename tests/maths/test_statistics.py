"""Estimators against enumeration and plain Python."""

from __future__ import annotations

import itertools
import math

import oracle
import pytest
from hypothesis import given
from hypothesis import strategies as st

from opd.errors import ConfigError
from opd.maths.statistics import (
    auroc,
    distinct_share,
    effective_share,
    mcnemar,
    pass_at_k,
    repeat_ratio,
    repeated,
    top_share,
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


@pytest.mark.parametrize(("first", "second"), [(0, 0), (1, 0), (3, 1), (7, 7), (0, 34), (12, 25), (150, 190)])
def test_mcnemar_equals_exact_binomial_test(first, second):
    from scipy.stats import binomtest

    expected = binomtest(first, first + second, 0.5).pvalue if first + second else 1.0
    assert mcnemar(first, second) == pytest.approx(expected, rel=1e-12)
    assert mcnemar(second, first) == mcnemar(first, second)
