"""Numbers as the paper claims them, and their opposite, for the study of order margins."""

from __future__ import annotations

from typing import Any

from opd_studies.claims import order_margin as study
from support.study_numbers import spread

END = {
    study.OPD: 0.4,
    study.SHIFT: 0.5,
    study.MASK: 0.45,
    study.BEST_SHIFT: 0.8,
    study.BEST_SUM: 0.7,
    study.GRPO: 0.6,
}


def courses(end: float) -> list[dict[int, dict[str, float]]]:
    return [{0: dict.fromkeys(PARTS, 0.1), 100: dict.fromkeys(PARTS, one)} for one in spread(end)]


PARTS = ("all", "habit", "others")


def numbers(first: bool, second: bool) -> study.Numbers:
    """By setting, whether its numbers are the paper's."""
    good = {"A": first, "B": second}
    return study.Numbers(
        accuracy={
            setting: {name: courses(end if well else 0.9 - end) for name, end in END.items()}
            for setting, well in good.items()
        },
        best={"A": (0.4, 1.0), "B": (6.4, 4.0)},
    )


NUMBERS: dict[str, tuple[Any, Any]] = {"order_margin": (numbers(True, True), numbers(False, False))}

SECOND: dict[str, tuple[Any, list[int]]] = {"order_margin": (numbers(False, True), [0, 1, 2, 3, 4])}
