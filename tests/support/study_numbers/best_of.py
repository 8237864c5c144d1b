"""Numbers of the best of N responses as the paper claims them, and their opposite."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from opd_studies.claims import brts
from opd_studies.lab.ablation import Numbers
from support.study_numbers import spread

GOOD = {
    brts.PLAIN: 0.2,
    brts.MORE: 0.3,
    brts.ONE: 0.35,
    brts.ONE_TIER_2: 0.4,
    brts.TWO: 0.5,
    brts.RANDOM: 0.55,
    brts.SHORTEST: 0.6,
    brts.FOUR: 0.7,
}


def setting(name: str, good: bool) -> Numbers:
    return {arm: {"sampled accuracy": spread(GOOD[arm] if good else 1 - GOOD[arm])} for arm in brts.ARMS[name]}


def numbers(a: bool, b: bool) -> Mapping[str, Numbers]:
    return {"A": setting("A", a), "B": setting("B", b)}


NUMBERS: dict[str, tuple[Any, Any]] = {"brts": (numbers(True, True), numbers(False, False))}
SECOND: dict[str, tuple[Any, list[int]]] = {"brts": (numbers(False, True), [0, 1, 2, 3])}
