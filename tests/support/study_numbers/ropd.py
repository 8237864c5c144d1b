"""Numbers as the paper claims them, and their opposite, for the study of rubrics."""

from __future__ import annotations

from typing import Any

from opd_studies.claims import ropd
from opd_studies.lab.ablation import START, TEACHER
from support.study_numbers import spread

GOOD = {ropd.RUBRIC: 0.8, ropd.ONE: 0.6, ropd.TOLD: 0.65, ropd.OWN: 0.7, ropd.TEXTS: 0.5}


def numbers(good: bool, students: bool = True, digits: bool = True) -> ropd.Measured:
    """`students` and `digits`: whether they show what the table of letters shows."""
    sign = 1 if good else -1
    end = {name: 0.5 + sign * (value - 0.5) for name, value in GOOD.items()}
    trained = {START: 0.3} | {name: end[name] if students else 0.3 for name in GOOD}
    if not good:
        trained[ropd.RUBRIC] = 0.2
    variance = {ropd.RUBRIC: 0.2, ropd.OWN: 0.2 + 0.2 * sign}
    tables = {
        name: {
            f"{kind}: {what}": spread(values.get(name, 0.3) if digits or kind == "letters" else 0.3)
            for kind in ropd.TABLES
            for what, values in {
                "quality": end,
                "rank correlation": end,
                "variance of the advantage": variance,
            }.items()
        }
        for name in ropd.OPTIONS
    }
    for name in (START, TEACHER):
        tables[name] = {f"{kind}: quality": spread(0.5) for kind in ropd.TABLES}
    return ropd.Measured(
        students={name: {"sampled accuracy": spread(value)} for name, value in trained.items()}, tables=tables
    )


NUMBERS: dict[str, tuple[Any, Any]] = {"ropd": (numbers(True), numbers(False))}

SECOND: dict[str, tuple[Any, list[int]]] = {
    "ropd": (numbers(True, students=False, digits=False), [0, 1, 2, 3, 4, 5, 6])
}
