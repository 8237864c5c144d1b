"""Numbers as the paper claims them, and their opposite, for the study of weights of digits."""

from __future__ import annotations

from typing import Any

from opd_studies.claims import digit_weights as study
from support.study_numbers import spread

END = {study.BOTH: 0.9, study.PLACES: 0.7, study.CERTAIN: 0.7, study.EVEN: 0.4, study.LEVEL: 0.6}


def numbers(first: bool, second: bool) -> study.Numbers:
    """By setting, whether its numbers are the paper's."""
    good = {"A": first, "B": second}

    def courses(end: float) -> study.Courses:
        return [{0: {"inside": 0.1, "error": 90.0}, 40: {"inside": one, "error": 9.0}} for one in spread(end)]

    def arms(well: bool) -> dict[str, study.Courses]:
        return {arm: courses(end if well else 1.0 - end) for arm, end in END.items()}

    return study.Numbers(
        rates={setting: dict.fromkeys(END, 3.0) for setting in good},
        best={setting: arms(well) for setting, well in good.items()},
        same={setting: arms(well) for setting, well in good.items()},
    )


NUMBERS: dict[str, tuple[Any, Any]] = {"digit_weights": (numbers(True, True), numbers(False, False))}

SECOND: dict[str, tuple[Any, list[int]]] = {"digit_weights": (numbers(False, True), [0, 1, 2, 3, 4, 5])}
