"""Numbers of two models that teach each other as the paper claims them, and their opposite."""

from __future__ import annotations

from typing import Any

from opd_studies.claims import copd as study
from opd_studies.lab.ablation import START, Numbers
from support.study_numbers import spread

END = {
    START: 0.2,
    study.MIXED: 0.6,
    study.MIXED_MORE: 0.65,
    study.STATIC: 0.5,
    study.STATIC_EXPERT: 0.45,
    study.MERGED: 0.3,
    study.EXPERTS: 0.7,
    study.ONE: 0.71,
    study.OTHER: 0.72,
    study.COPD: 0.8,
}


def setting(good: bool) -> Numbers:
    columns = (study.BOTH, study.FIRST, study.SECOND)
    numbers = {name: {what: spread(end if good else 1 - end, 5) for what in columns} for name, end in END.items()}
    for name, apart in ((study.EXPERTS, 0.9), (study.COPD, 0.1)):
        numbers[name][study.APART] = spread(apart if good else 1 - apart, 5)
    return numbers


def numbers(first: bool, second: bool) -> dict[str, Numbers]:
    """By setting, whether its numbers are the paper's."""
    return {"A": setting(first), "B": setting(second)}


NUMBERS: dict[str, tuple[Any, Any]] = {"copd": (numbers(True, True), numbers(False, False))}

SECOND: dict[str, tuple[Any, list[int]]] = {"copd": (numbers(False, True), [0, 1, 2, 3, 4, 5, 6])}
