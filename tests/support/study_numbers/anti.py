"""Numbers as the paper claims them, and their opposite, for the study of the ascent from a self that knows."""

from __future__ import annotations

from typing import Any

from opd_studies.claims import anti_sd
from support.study_numbers import spread

END = {anti_sd.GRPO: 0.5, anti_sd.TOWARDS: 0.3, anti_sd.AWAY: 0.6, anti_sd.UNGATED: 0.4}
LEFT = {anti_sd.GRPO: 0.9, anti_sd.TOWARDS: 0.5, anti_sd.AWAY: 0.95, anti_sd.UNGATED: 0.2}


def curve(end: float) -> dict[int, float]:
    """Accuracy rises in a straight line from 0.2, by update."""
    return {update: 0.2 + (end - 0.2) * update / 100 for update in range(0, 101, 10)}


def numbers(good: dict[str, bool]) -> anti_sd.Numbers:
    """By setting, whether its numbers are the paper's."""
    end = {s: END if well else {name: 0.9 - value for name, value in END.items()} for s, well in good.items()}
    left = {s: LEFT if well else {name: 1.5 - value for name, value in LEFT.items()} for s, well in good.items()}
    return anti_sd.Numbers(
        accuracy={s: {name: [curve(one) for one in spread(v)] for name, v in end[s].items()} for s in good},
        length={s: {name: spread(3.0) for name in END} for s in good},
        entropy={s: {name: spread(v) for name, v in left[s].items()} for s in good},
        rate={s: dict.fromkeys(END, 0.1) for s in good},
    )


def settings(first: bool, tuned: bool, second: bool) -> anti_sd.Numbers:
    return numbers({anti_sd.A: first, anti_sd.TUNED: tuned, anti_sd.B: second})


NUMBERS: dict[str, tuple[Any, Any]] = {"anti_sd": (settings(True, True, True), settings(False, False, False))}

SECOND: dict[str, tuple[Any, list[int]]] = {"anti_sd": (settings(False, True, True), [0, 1, 3])}
