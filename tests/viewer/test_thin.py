"""What a page leaves out: never a spike, never the first or the last, never more than the budget."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from opd.viewer.thin import Budget, evenly, kept_tokens, m4, picked, spread, strongest


def test_m4_keeps_spikes_and_ends():
    ys = [0.0] * 10_000
    ys[1234], ys[5678] = 9.0, -7.0
    xs, kept = m4(list(range(10_000)), ys, 400)
    assert len(xs) <= 400
    assert (max(kept), min(kept)) == (9.0, -7.0)
    assert (xs[0], xs[-1]) == (0, 9999)
    assert all(ys[int(x)] == y for x, y in zip(xs, kept, strict=True))


def test_m4_returns_short_series_whole():
    assert m4([1, 2, 3], [3.0, 1.0, 2.0], 4) == ([1, 2, 3], [3.0, 1.0, 2.0])


def test_evenly_has_first_and_last():
    assert evenly(5, 10) == [0, 1, 2, 3, 4]
    assert evenly(101, 3) == [0, 50, 100]
    assert evenly(7, 1) == [0]
    assert evenly(0, 3) == []


def test_picked_takes_one_of_each_rule_first():
    picks = ["chance", "chance", "follow", "most", "least", None, "longest", "shortest"]
    assert picked(picks, 5) == [0, 3, 4, 6, 7]
    assert picked(picks, 6) == [0, 1, 3, 4, 6, 7]
    assert picked(picks, 9) == [0, 1, 3, 4, 5, 6, 7]


def test_spread_has_least_middle_and_most():
    means = [5.0, -9.0, 0.0, 9.0, 1.0, 2.0, 3.0]
    assert {1, 3} <= set(spread(means, 3))
    assert spread(means, 3) == [1, 3, 5]
    assert spread([], 3) == []
    assert spread(means, 20) == list(range(7))


@given(n=st.integers(0, 3000), cap=st.integers(16, 400), seed=st.integers(0, 5))
def test_kept_tokens_fit_cap_and_hold_ends(n, cap, seed):
    values = np.random.default_rng(seed).normal(size=n)
    parts = kept_tokens(n, cap, values)
    places = [i for a, b in parts for i in range(a, b)]
    assert len(places) == len(set(places)) <= max(cap, 0)
    assert all(a < b for a, b in parts)
    if n:
        assert places[0] == 0
        assert places[-1] == n - 1


def test_kept_tokens_hold_the_largest_values():
    values = np.zeros(30_000)
    values[[7_000, 20_000]] = [5.0, -8.0]
    parts = kept_tokens(30_000, 1024, values)
    for place in (7_000, 20_000):
        assert any(a <= place < b for a, b in parts)
    assert sum(b - a for a, b in parts) <= 1024


def test_strongest_are_in_order():
    assert strongest(np.array([0.1, -3.0, 2.0, np.nan]), 4, 2) == [1, 2]
    assert strongest(None, 5, 2) == [0, 1]
    assert strongest(np.array([1.0]), 1, 2) == [0]


@pytest.mark.parametrize(("lengths", "cap"), [([10, 20, 30], 30), ([1000] * 10, 500), ([10, 2000], 1990)])
def test_budget_is_the_largest_cap_that_fits(lengths, cap):
    tokens = {30: 100, 500: 5000, 1990: 2000}[cap]
    assert Budget.of(tokens, lengths).cap == cap


def test_budget_keeps_least_of_many_responses():
    assert Budget.of(1000, [500] * 100).cap == 128
