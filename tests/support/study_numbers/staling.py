"""Numbers as the paper claims them, and their opposite, for the study of responses of older weights."""

from __future__ import annotations

from typing import Any

from opd_studies.claims import stale as study
from support.study_numbers import spread

# Accuracies at a lag as claimed, and the opposite, which no threshold lies between.
AS_CLAIMED = {
    study.FORWARD: 0.58,
    study.REVERSE: 0.6,
    study.RECORDED: 0.1,
    study.CENTRED: 0.2,
    study.HALF: 0.59,
    study.WEIGHED: 0.4,
    study.CLIPPED: 0.5,
    study.SAMPLED: 0.55,
    study.BY_TOKEN: 0.5,
    study.BY_SEQUENCE: 0.45,
    study.HALF_RATE: 0.2,
    study.EIGHTH: 0.3,
}
OPPOSITE = {
    study.FORWARD: 0.2,
    study.REVERSE: 0.3,
    study.RECORDED: 0.58,
    study.CENTRED: 0.59,
    study.HALF: 0.25,
    study.WEIGHED: 0.5,
    study.CLIPPED: 0.55,
    study.SAMPLED: 0.1,
    study.BY_TOKEN: 0.5,
    study.BY_SEQUENCE: 0.45,
    study.HALF_RATE: 0.56,
    study.EIGHTH: 0.57,
}


def numbers(first: bool, second: bool, prefixes: bool) -> dict[str, dict[str, list[float]]]:
    """`first`, `second`: whether setting A and B are as claimed; `prefixes`: whether those of old weights do harm."""
    made = {study.name_of(arm, 0): 0.6 for arm in study.FAMILIES}
    for good, lag in ((first, study.LAGS["A"]), (second, study.LAGS["B"])):
        values = AS_CLAIMED if good else OPPOSITE
        made |= {study.name_of(arm, lag): value for arm, value in values.items()}
    made[study.name_of(study.REVERSE_EIGHTH, 0)] = 0.6 if first or prefixes else 0.5
    for arm in (study.FORWARD, study.REVERSE):
        made[study.name_of(arm, study.NEVER)] = 0.4 if prefixes else 0.7
    return {name: {"sampled accuracy": spread(value), "KL": spread(1.0 - value)} for name, value in made.items()}


NUMBERS: dict[str, tuple[Any, Any]] = {"stale": (numbers(True, True, True), numbers(False, False, False))}

SECOND: dict[str, tuple[Any, list[int]]] = {"stale": (numbers(False, True, True), [0, 1, 2, 3, 4, 5, 6, 9])}
