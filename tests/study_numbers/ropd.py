"""Numbers as the paper claims them, and their opposite, for the study of rubrics."""

from __future__ import annotations

from typing import Any

from opd.studies import ropd
from opd.studies.ablation import START
from study_numbers import spread

GOOD = {ropd.RUBRIC: 0.8, ropd.ONE: 0.6, ropd.TOLD: 0.65, ropd.OWN: 0.7, ropd.TEXTS: 0.5}


def numbers(good: bool, students: bool = True) -> ropd.Measured:
    """`students`: whether they show what the table shows."""
    sign = 1 if good else -1
    end = {name: 0.5 + sign * (value - 0.5) for name, value in GOOD.items()}
    trained = {START: 0.3} | {name: end[name] if students or name == ropd.TEXTS else 0.8 for name in GOOD}
    if not good:
        trained[ropd.RUBRIC] = 0.2
        trained[ropd.TEXTS] = 0.9
    variance = {ropd.RUBRIC: 0.2, ropd.OWN: 0.2 + 0.2 * sign}
    return ropd.Measured(
        students={name: {"sampled accuracy": spread(value)} for name, value in trained.items()},
        table={
            name: {
                "quality": spread(end[name]),
                "rank correlation": spread(end[name]),
                "variance of the advantage": spread(variance.get(name, 0.3)),
            }
            for name in ropd.OPTIONS
        },
    )


NUMBERS: dict[str, tuple[Any, Any]] = {"ropd": (numbers(True), numbers(False))}

SECOND: dict[str, tuple[Any, list[int]]] = {"ropd": (numbers(True, students=False), [2, 4, 5])}
