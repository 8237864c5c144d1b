"""Numbers as the paper claims them, and their opposite, for the study of two tokenizers."""

from __future__ import annotations

from typing import Any

from opd_studies.claims import simct
from opd_studies.lab.ablation import START, Numbers
from support.study_numbers import spread


def measured(accuracy: float, distance: float, coverage: float) -> dict[str, list[float]]:
    return {
        "sampled accuracy": spread(accuracy),
        "KL a response": spread(distance),
        "coverage": spread(coverage),
        "shared coverage": spread(0.5),
    }


def of(good: bool, ending: str) -> Numbers:
    """One setting's numbers, as claimed or not."""
    numbers: Numbers = {f"{START}{ending}": {"sampled accuracy": spread(0.3)}}
    for name in simct.SETTINGS:
        numbers[f"{name}{ending}"] = measured(0.6, 0.8, 0.5)
    numbers[f"simct{ending}"] = measured(0.8, 0.3, 1.0) if good else measured(0.4, 1.2, 0.55)
    return numbers


def numbers(good: bool, second: bool) -> Numbers:
    """`second`: whether setting B is as claimed."""
    return of(good, "") | of(second, simct.OTHER)


NUMBERS: dict[str, tuple[Any, Any]] = {"simct": (numbers(True, True), numbers(False, False))}
SECOND: dict[str, tuple[Any, list[int]]] = {"simct": (numbers(False, True), [0, 1, 2, 3, 4])}
