"""Numbers of the cliff of extrapolation as the paper claims them, and their opposite."""

from __future__ import annotations

from typing import Any

from opd_studies.claims import cliff
from support.study_numbers import spread

P, B = 0.99, 0.85  # lambda* 1.14 at c 1.5, 1.57 at 5, 2.05 at 20


def cliff_numbers(*, claimed: bool, at_five: bool) -> cliff.Numbers:
    """`claimed`: what the paper says; `at_five`: the same at c = 5."""
    parse: dict[str, list[float]] = {}
    for name, one in cliff.SETTINGS.items():
        stays = one.weight != "teacher/student"
        well = at_five if one.bound == 5.0 and not stays and one.slower == 1 else claimed
        star = cliff.limit(P, B, one.bound)
        share = 0.5 if one.strength == 1.0 else 0.9 if stays or one.strength <= star else 0.05
        parse[name] = spread(share if well else 0.9 - 0.2 * one.strength if stays else 0.3 + 0.1 * (one.strength < 1.1))
    return cliff.Numbers(
        parse=parse,
        start={"student before": spread(0.4), "teacher": spread(0.9)},
        structure=list(zip(spread(P), spread(B), strict=True)),
        content=[(0.6, 0.5)] * 3,
    )


NUMBERS: dict[str, tuple[Any, Any]] = {
    "cliff": (cliff_numbers(claimed=True, at_five=True), cliff_numbers(claimed=False, at_five=False))
}
SECOND: dict[str, tuple[Any, list[int]]] = {"cliff": (cliff_numbers(claimed=True, at_five=False), [0, 1, 2])}
