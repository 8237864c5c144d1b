"""Units and words of scale in a final answer."""

from __future__ import annotations

import pytest

from opd.rewards.quantities import unit_of, without_scales


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("3 million", "3000000"),
        ("1.5 Billion dollars", "1500000000 dollars"),
        ("12\\text{ million}", "12000000"),
        ("12\\text{ million people}", "12000000\\text{ people}"),
        ("5 hundred thousand", "500000"),
        ("1,200 thousand", "1200000"),
        ("\\boxed{3\\,\\text{thousand}}", "\\boxed{3000}"),
        ("a million", "a million"),
        ("2^3 million", "2^3 million"),
        ("3 millionaires", "3 millionaires"),
    ],
)
def test_without_scales_multiplies(text: str, expected: str):
    assert without_scales(text) == expected


@pytest.mark.parametrize(
    ("text", "unit"),
    [
        ("5 km", "km"),
        ("5\\,\\mathrm{km/h}", "km/h"),
        ("60 miles per hour", "mph"),
        ("12 \\text{ cm}^2", "cm^2"),
        ("12 square cm", "cm^2"),
        ("12 \\text{ cubic feet}", "ft^3"),
        ("\\$18.90", "$"),
        ("18 dollars", "$"),
        ("-$5", "$"),
        ("25\\%", "%"),
        ("25 percent", "%"),
        ("90^\\circ", "\u00b0"),
        ("90 degrees", "\u00b0"),
        ("1/2 hour", "h"),
        ("5", None),
        ("5x", None),
        ("10 apples", None),
        ("x m", None),
        ("5 m + 3 m", None),
    ],
)
def test_unit_of_reads_number_with_unit(text: str, unit: str | None):
    assert unit_of(text) == unit
