"""Numbers as the paper claims them, and their opposite, for the study of advantages that a hint sizes."""

from __future__ import annotations

from typing import Any

from opd_studies.claims import visd as study
from support.study_numbers import spread

# Updates to the level, accuracy at the end, and gain in right tokens: as claimed, and their opposite.
AS_CLAIMED = {
    study.GRPO: (100, 0.8, 0.6),
    study.VISD: (50, 0.9, 0.6),
    study.OTHER_TOKENS[study.VISD]: (70, 0.8, 0.6),
    study.WIDE: (40, 0.9, 0.6),
    study.OTHER_TOKENS[study.WIDE]: (60, 0.8, 0.6),
    study.OTHER_REWARDS[study.VISD]: (110, 0.6, 0.1),
    study.OTHER_REWARDS[study.WIDE]: (110, 0.6, 0.1),
}
OPPOSITE = AS_CLAIMED | {
    study.GRPO: (50, 0.9, 0.6),
    study.VISD: (100, 0.8, 0.6),
    study.WIDE: (100, 0.8, 0.6),
    study.OTHER_REWARDS[study.VISD]: (110, 0.6, 0.5),
    study.OTHER_REWARDS[study.WIDE]: (110, 0.6, 0.5),
}


def courses(updates: int, end: float, gain: float) -> list[dict[int, dict[str, float]]]:
    return [
        {
            0: {"all": 0.0, "tokens": 0.25},
            updates + i: {"all": study.LEVEL, "tokens": 0.3},
            120: {"all": one, "tokens": 0.25 + gain},
        }
        for i, one in enumerate(spread(end))
    ]


def numbers(first: bool, second: bool) -> study.Numbers:
    """By setting, whether its numbers are the paper's."""
    good = {"A": first, "B": second}
    return study.Numbers(
        accuracy={
            setting: {name: courses(*values) for name, values in (AS_CLAIMED if well else OPPOSITE).items()}
            for setting, well in good.items()
        },
        sizes={},
        rates={},
    )


NUMBERS: dict[str, tuple[Any, Any]] = {"visd": (numbers(True, True), numbers(False, False))}

SECOND: dict[str, tuple[Any, list[int]]] = {"visd": (numbers(False, True), [0, 1, 2, 3, 4, 5, 6, 7])}
