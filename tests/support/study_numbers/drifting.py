"""Numbers as the paper claims them, and their opposite, for responses that end where the teacher is lost."""

from __future__ import annotations

from typing import Any

from opd_studies.claims import prune
from opd_studies.lab.ablation import START
from support.study_numbers import spread


def prune_numbers(good_a: bool, good_b: bool) -> dict[str, Any]:
    plain = {"tokens": spread(1e5), "seconds": spread(20.0), "KL": spread(1.0), "sampled accuracy": spread(0.3)}
    better = {"tokens": spread(5e4), "seconds": spread(10.0), "KL": spread(0.9), "sampled accuracy": spread(0.4)}
    worse = {"tokens": spread(9e4), "seconds": spread(18.0), "KL": spread(1.2), "sampled accuracy": spread(0.2)}
    numbers: dict[str, Any] = {START: {"KL": spread(2.0)}, "unpruned": plain, f"cap {prune.SHORT}": plain}
    for name in prune.SETTINGS:
        if name[:3] in ("A: ", "B: "):
            numbers[name] = better if (good_a if name[0] == "A" else good_b) else worse
    return numbers


NUMBERS: dict[str, tuple[Any, Any]] = {"prune": (prune_numbers(True, True), prune_numbers(False, False))}
SECOND: dict[str, tuple[Any, list[int]]] = {"prune": (prune_numbers(False, True), [0, 3, 4])}
