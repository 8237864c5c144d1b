"""lambda*: against bisection, at published values, and its limits."""

from __future__ import annotations

import math

import oracle
import pytest

from opd.errors import ConfigError
from opd.maths.extrapolation import extrapolated_mass, largest_strength

GRID = [(p, b, c) for p in (0.6, 0.9, 0.99, 0.9993) for b in (0.02, 0.3, 0.5) for c in (1.5, 5.0, 20.0)]


@pytest.mark.parametrize(("p", "b", "c"), GRID)
def test_largest_strength_equals_bisection(p: float, b: float, c: float):
    got = largest_strength(p, b, c)
    assert got > 1.0
    assert got == pytest.approx(oracle.largest_strength(p, b, c), rel=1e-9)
    assert (1.0 - extrapolated_mass(p, b, got)) * c / (1.0 - p) == pytest.approx(1.0, rel=1e-9)


@pytest.mark.parametrize(
    ("p", "b", "c", "value"),
    [
        (0.9993, 0.5, 5.0, 1.222),  # the paper's base-neutral value is 1.22
        (0.99, 0.5, 5.0, 1.352),
        (0.9999, 0.5, 5.0, 1.175),
        (0.99, 0.1, 5.0, 1.238),
        (0.99, 0.9, 5.0, 1.675),
        (0.9993, 0.5, 1.5, 1.056),
    ],
)
def test_largest_strength_equals_known_values(p: float, b: float, c: float, value: float):
    assert largest_strength(p, b, c) == pytest.approx(value, abs=6e-4)


def test_largest_strength_grows_with_bound_and_falls_with_mass():
    by_bound = [largest_strength(0.99, 0.5, c) for c in (1.001, 1.5, 5.0, 20.0)]
    assert by_bound == sorted(by_bound)
    assert by_bound[0] == pytest.approx(1.0, abs=1e-3)
    by_mass = [largest_strength(p, 0.5, 5.0) for p in (0.9, 0.99, 0.999, 0.9999)]
    assert by_mass == sorted(by_mass, reverse=True)


@pytest.mark.parametrize("b", [0.7, 0.9])
def test_largest_strength_is_infinite_when_base_has_as_much(b: float):
    assert largest_strength(0.7, b, 5.0) == math.inf
    assert extrapolated_mass(0.7, b, 2.0) <= 0.7  # beyond the teacher the class loses mass


@pytest.mark.parametrize(
    ("p", "b", "message"),
    [(1.0, 0.5, "of the teacher, is 1"), (0.9, 0.0, "of the base, is 0"), (0.9, 1.0, "of the base, is 1")],
)
def test_largest_strength_refuses_infinite_odds(p: float, b: float, message: str):
    with pytest.raises(ConfigError, match=message):
        largest_strength(p, b, 5.0)


@pytest.mark.parametrize("bound", [1.0, 0.5, math.inf, math.nan])
def test_largest_strength_refuses_bound(bound: float):
    with pytest.raises(ConfigError, match="must be above 1 and finite"):
        largest_strength(0.9, 0.5, bound)


@pytest.mark.parametrize("strength", [0.0, 0.5, 1.0, 1.7])
def test_extrapolated_mass_equals_power_of_two_bernoullis(strength: float):
    p, b = 0.93, 0.4
    head = p**strength * b ** (1 - strength)
    tail = (1 - p) ** strength * (1 - b) ** (1 - strength)
    assert extrapolated_mass(p, b, strength) == pytest.approx(head / (head + tail), rel=1e-12)
