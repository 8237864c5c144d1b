"""Numbers of the alignment of teachers as claimed, and their opposite."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from opd_studies.claims import alignment as study
from support.study_numbers import spread

FEW, MANY = 10, 40
EARLY, END = 20, 60


def probed(good: bool) -> dict[str, Sequence[float]]:
    exact = spread(0.6)
    right, wrong = (0.3, 0.5) if good else (0.5, 0.3)
    found: dict[str, Sequence[float]] = {
        study.EXACT: exact,
        study.RIGHT: spread(right),
        study.WRONG: spread(wrong),
        study.VECTOR: exact,
        study.SHARPER: spread(0.2),
    }
    for n, ceiling in ((FEW, 0.5), (MANY, 0.8)):
        found |= {
            f"{n}: {study.MEAN}": spread(0.6 * ceiling if good else 0.9),
            f"{n}: {study.SAME}": exact,
            f"{n}: {study.CEILING}": spread(ceiling),
            f"{n}: {study.TOGETHER}": exact if good else spread(0.9),
            f"{n}: {study.COVERED}": [1.0] * 3,
            f"{n}: {study.NOISE}": spread(0.01 if good else 0.5),
        }
    return found


def numbers(a: bool, b: bool) -> study.Numbers:
    """`a`, `b`: whether the numbers of that setting are as claimed; B of the training is the earlier update."""
    gains = {study.BETTER: (0.4, 0.8), study.RANDOM: (0.3, 0.6), study.ALIVE: (0.35, 0.7)}
    curve: dict[str, list[dict[int, float]]] = {}
    for arm in study.ARMS:
        early, end = gains.get(arm, (0.3, 0.6))
        at = {0: 0.1, EARLY: early if b else 0.9 - early, 2 * EARLY: 0.5, END: end if a else 0.9 - end}
        values = {update: spread(value) for update, value in at.items()}
        curve[arm] = [{update: seeds[i] for update, seeds in values.items()} for i in range(3)]
    return study.Numbers(
        visits=[FEW, MANY],
        probed={"A": probed(a), "B": probed(b)},
        curve=curve,
        learning_rate=dict.fromkeys(study.ARMS, 1e-3),
    )


NUMBERS: dict[str, tuple[Any, Any]] = {"alignment": (numbers(True, True), numbers(False, False))}
SECOND: dict[str, tuple[Any, list[int]]] = {"alignment": (numbers(False, True), [0, 1, 2, 3, 4, 5])}
