"""Numbers of two teachers and one student as the paper claims them, and their opposite."""

from __future__ import annotations

from typing import Any

from opd_studies.claims.two_teachers import SETTINGS
from opd_studies.lab.ablation import START, TEACHER, Numbers
from support.study_numbers import spread


def two_teacher_numbers(good_a: bool, good_b: bool) -> Numbers:
    """`good_b` is about what setting B alone measures: mixed and small steps, one task for half of the updates."""

    def of(ascending: float, descending: float) -> dict[str, list[float]]:
        return {
            "ascending": spread(ascending),
            "descending": spread(descending),
            "both": spread((ascending + descending) / 2),
        }

    reached = 0.9 if good_a else 0.4
    numbers = {START: of(0.3, 0.3), TEACHER: of(1.0, 1.0)} | {name: of(reached, reached) for name in SETTINGS}
    numbers |= {f"sampled, {order}": of(0.6, 0.6) for order in ("alternate", "mixed")}
    numbers["matching, small"] = of(0.5, 0.5)
    numbers["sampled, small"] = of(0.1, 0.1) if good_b else of(0.6, 0.6)
    for task, alone in (("ascending", of(0.9, 0.0)), ("descending", of(0.0, 0.9))):
        numbers[f"{task} alone"] = alone if good_a else of(0.9, 0.9)
        numbers[f"{task} alone, half"] = of(0.4, 0.4) if good_b else of(0.9, 0.9)
    numbers["matching, swapped"] = of(0.0, 0.0) if good_a else of(0.9, 0.9)
    if not good_a:
        mixed = of(0.9, 0.9) if good_b else of(0.3, 0.3)
        numbers |= {f"{name}, mixed": mixed for name in ("sampled", "matching")}
    return numbers


NUMBERS: dict[str, tuple[Any, Any]] = {
    "two_teachers": (two_teacher_numbers(True, True), two_teacher_numbers(False, False)),
}
SECOND: dict[str, tuple[Any, list[int]]] = {"two_teachers": (two_teacher_numbers(False, True), [0, 1, 2])}
