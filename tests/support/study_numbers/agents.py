"""Numbers as the paper claims them, and their opposite, for the study of agents' mistakes."""

from __future__ import annotations

from typing import Any

from opd_studies.claims import agent_errors as study
from support.study_numbers import spread

END = {
    study.SOD: 0.9,
    study.EVEN: 0.5,
    study.LEVEL: 0.6,
    study.SHUFFLED: 0.6,
    study.MASK: 0.7,
    study.GRPO: 0.4,
    study.BATCH: 0.9,
}


def numbers(first: bool, second: bool) -> study.Numbers:
    """By setting, whether its numbers are the paper's."""
    good = {"A": first, "B": second}

    def courses(end: float) -> study.Courses:
        return [{0: {"all": 0.1, "without": 0.1}, 60: {"all": one, "without": one}} for one in spread(end)]

    return study.Numbers(
        rates={setting: dict.fromkeys(END, 0.1) for setting in good},
        success={
            setting: {arm: courses(end if well else 1.0 - end) for arm, end in END.items()}
            for setting, well in good.items()
        },
        apart={setting: spread(0.5 if well else -0.5) for setting, well in good.items()},
    )


NUMBERS: dict[str, tuple[Any, Any]] = {"agent_errors": (numbers(True, True), numbers(False, False))}

SECOND: dict[str, tuple[Any, list[int]]] = {"agent_errors": (numbers(False, True), [0, 1, 2, 3, 4, 5])}
