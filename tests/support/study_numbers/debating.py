"""Numbers of teachers that debate as the paper claims them, and their opposite."""

from __future__ import annotations

from typing import Any

from opd_studies.claims.debate import DEBATE, GUESSING, SETTINGS
from opd_studies.lab.ablation import START, TEACHER, Numbers
from support.study_numbers import spread


def debate_numbers(good_a: bool, good_b: bool) -> Numbers:
    def of(accuracy: float) -> dict[str, list[float]]:
        return {name: spread(accuracy, 5) for name in ("sampled accuracy", "greedy accuracy")}

    numbers: Numbers = {}
    for kind, good, names in (("A", good_a, SETTINGS), ("B", good_b, GUESSING)):
        numbers |= {f"{kind}: {START}": of(0.001), f"{kind}: {TEACHER} l": of(0.07), f"{kind}: {TEACHER} r": of(0.07)}
        numbers |= {f"{kind}: {name}": of(0.08) for name in names}
        numbers[f"{kind}: {DEBATE}"] = of(0.9 if good else 0.08)
    return numbers


NUMBERS: dict[str, tuple[Any, Any]] = {"debate": (debate_numbers(True, True), debate_numbers(False, False))}
SECOND: dict[str, tuple[Any, list[int]]] = {"debate": (debate_numbers(False, True), [0, 1, 2])}
