"""Quantiles against sums of binomial probabilities and integrals in plain Python."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import t

from opd.maths.quantiles import beta_quantile, incomplete_beta, student_t_quantile


@settings(deadline=None)
@given(st.integers(1, 60).flatmap(lambda n: st.tuples(st.integers(1, n), st.just(n))), st.floats(0, 1))
def test_incomplete_beta_is_tail_of_binomial(case: tuple[int, int], x: float):
    k, n = case
    tail = math.fsum(math.comb(n, i) * x**i * (1 - x) ** (n - i) for i in range(k, n + 1))
    assert incomplete_beta(x, k, n - k + 1) == pytest.approx(tail, abs=1e-12)


@pytest.mark.parametrize(("a", "b"), [(2.5, 3.25), (1.5, 40.75), (300.5, 2.25)])
def test_incomplete_beta_is_integral_of_density(a: float, b: float):
    pieces, x = 20_000, a / (a + b)
    factor = math.exp(math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b))
    places = [x * (i + 0.5) / pieces for i in range(pieces)]
    area = math.fsum(factor * y ** (a - 1) * (1 - y) ** (b - 1) for y in places) * x / pieces
    assert incomplete_beta(x, a, b) == pytest.approx(area, abs=1e-5)


@settings(deadline=None)
@given(st.floats(0.001, 0.999), st.floats(0.01, 1e4), st.floats(0.3, 1e4))
def test_beta_quantile_inverts_incomplete_beta(share: float, a: float, b: float):
    x = beta_quantile(share, a, b)
    below, above = (incomplete_beta(y, a, b) for y in (math.nextafter(x, 0), math.nextafter(x, 1)))
    assert below - 1e-9 <= share <= above + 1e-9


def test_student_t_quantile_matches_closed_forms():
    assert student_t_quantile(0.975, 1) == pytest.approx(math.tan(math.pi * 0.475))  # Cauchy
    assert student_t_quantile(0.975, 2) == pytest.approx(0.95 * math.sqrt(2 / (1 - 0.95**2)))
    assert student_t_quantile(0.975, 10**7) == pytest.approx(1.959964, rel=1e-6)


@pytest.mark.parametrize("degrees", [1.5, 4.0755, 37.25])
def test_student_t_quantile_takes_fractional_degrees(degrees: float):
    assert student_t_quantile(0.975, degrees) == pytest.approx(t.ppf(0.975, degrees))
