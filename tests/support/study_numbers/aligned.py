"""Numbers as claimed, and their opposite, for the study of alignment."""

from __future__ import annotations

from typing import Any

from opd_studies.claims import alignment as study
from support.study_numbers import spread

VISITS = (10, 40)
GOOD, BAD = 0.6, 0.4  # accuracies


def probed(well: bool) -> dict[str, list[float]]:
    """Of one setting."""
    off = 0.0 if well else 0.3
    values = {study.EXACT: 0.8, study.RIGHT: 0.7 + off, study.WRONG: 0.9 - off, study.VECTOR: 0.6, study.SHARPER: 0.5}
    for n in VISITS:
        values |= {
            f"{n}: {study.MEAN}": 0.6 + off,
            f"{n}: {study.SAME}": 0.75,
            f"{n}: {study.CEILING}": 0.8,
            f"{n}: {study.TOGETHER}": 0.6 + off,
            f"{n}: {study.COVERED}": 1.0,
            f"{n}: {study.NOISE}": 0.01 + off,
        }
    return {name: spread(value) for name, value in values.items()}


def curve(early: float, end: float) -> list[dict[int, float]]:
    return [{0: 0.1, 20: a, 40: (a + b) / 2, 60: b} for a, b in zip(spread(early), spread(end), strict=True)]


def numbers(first: bool, second: bool) -> study.Numbers:
    """Whether setting A, and setting B, are as claimed."""
    better = curve(GOOD if second else BAD, GOOD if first else BAD)
    return study.Numbers(
        visits=VISITS,
        probed={"A": probed(first), "B": probed(second)},
        curve={arm: better if arm == study.BETTER else curve(0.5, 0.5) for arm in study.ARMS},
        learning_rate=dict.fromkeys(study.ARMS, 1e-3),
    )


NUMBERS: dict[str, tuple[Any, Any]] = {"alignment": (numbers(True, True), numbers(False, False))}

SECOND: dict[str, tuple[Any, list[int]]] = {"alignment": (numbers(False, True), [0, 1, 2, 3, 4, 5])}
