"""Quantiles of the beta distribution and of Student's t, in plain Python: the library does not depend on SciPy."""

from __future__ import annotations

import math

_TINY = 1e-300  # takes the place of a denominator of 0 (Thompson and Barnett 1986)
_ROUNDS = 100_000  # of the continued fraction, which needs about sqrt(max(a, b))


def incomplete_beta(x: float, a: float, b: float) -> float:
    """The regularised incomplete beta function I_x(a, b): the share of Beta(a, b) below x, for a, b > 0.

    By its continued fraction (DLMF 8.17.22), which converges fast below the mean; above it by I_x(a, b) =
    1 - I_{1-x}(b, a).
    """
    assert a > 0 < b, f"Beta({a}, {b})"
    if x <= 0 or x >= 1:
        return 0.0 if x <= 0 else 1.0
    if x > (a + 1) / (a + b + 2):
        return 1.0 - incomplete_beta(1 - x, b, a)
    log_front = math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log1p(-x)
    return math.exp(log_front) / a / _fraction(x, a, b)


def _fraction(x: float, a: float, b: float) -> float:
    """1 + d_1 / (1 + d_2 / (1 + ...)) with the coefficients d_n of DLMF 8.17.23, by Lentz's method."""
    value = c = 1.0
    d = 0.0
    for n in range(1, _ROUNDS):
        m = n // 2
        if n % 2:
            coefficient = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        else:
            coefficient = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        d = 1 / ((1 + coefficient * d) or _TINY)
        c = (1 + coefficient / c) or _TINY
        value *= c * d
        if abs(c * d - 1) < 1e-15:
            return value
    raise ArithmeticError(f"The continued fraction of I_{x}({a}, {b}) did not converge in {_ROUNDS} rounds.")


def beta_quantile(share: float, a: float, b: float) -> float:
    """The x in [0, 1] with I_x(a, b) = share: Newton's steps, and a bisection where one leaves the bracket.

    For a and b of at least 0.01: smaller ones have quantiles below the smallest float.
    """
    assert 0 < share < 1, f"share {share}"
    log_beta = math.lgamma(a) + math.lgamma(b) - math.lgamma(a + b)
    low, high, x = 0.0, 1.0, a / (a + b)
    while low < x < high:
        above = incomplete_beta(x, a, b) - share
        low, high = (low, x) if above > 0 else (x, high)
        density = math.exp((a - 1) * math.log(x) + (b - 1) * math.log1p(-x) - log_beta)
        step = above / density if density > 0 else math.inf
        if abs(step) <= 1e-15 * x:
            break
        x = x - step if low < x - step < high else (low + high) / 2
    return x


def student_t_quantile(share: float, degrees: float) -> float:
    """The quantile of Student's t with `degrees` >= 1 degrees of freedom, also fractional, for a `share` above 1/2."""
    assert degrees >= 1, f"{degrees} degrees of freedom"
    assert 0.5 < share < 1, f"share {share}"
    square = beta_quantile(2 * share - 1, 0.5, degrees / 2)  # t^2 / (degrees + t^2)
    return math.sqrt(degrees * square / (1 - square))
