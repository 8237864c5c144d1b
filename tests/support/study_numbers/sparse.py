"""Numbers of scarce labels on the teacher as the paper claims them, and their opposite."""

from __future__ import annotations

from typing import Any

from opd_studies.claims import sparse_to_dense as study
from opd_studies.lab.ablation import Numbers
from support.study_numbers import spread

CLAIMED = {
    study.BRIDGE_RAW: 0.2,
    study.BRIDGE_RAW_MORE: 0.25,
    study.GRPO: 0.3,
    study.GRPO_MORE: 0.4,
    study.LATER: 0.5,
    study.ON_POLICY: 0.55,
    study.BRIDGE: 0.6,
    study.REPLAY: 0.65,
    study.WHOLE: 0.7,
}


def sparse_numbers(good_a: bool, good_b: bool) -> dict[str, Numbers]:
    def of(setting: str, good: bool) -> Numbers:
        ends = {name: CLAIMED[name] if good else 1 - CLAIMED[name] for name in study.Size().arms(setting)}
        return {name: {"sampled accuracy": spread(end, 5)} for name, end in ends.items()}

    return {"A": of("A", good_a), "B": of("B", good_b)}


NUMBERS: dict[str, tuple[Any, Any]] = {"sparse_to_dense": (sparse_numbers(True, True), sparse_numbers(False, False))}
SECOND: dict[str, tuple[Any, list[int]]] = {"sparse_to_dense": (sparse_numbers(False, True), [0, 1, 2, 3, 5, 6, 7])}
