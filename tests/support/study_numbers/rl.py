"""Numbers as the papers claim them, and their opposite, for the studies of teachers made by reinforcement learning."""

from __future__ import annotations

from typing import Any

from opd_studies.claims import reverse, teacher_choice
from support.study_numbers import spread


def curves(start: float, end: float) -> list[dict[int, float]]:
    return [{0: a, 15: (a + b) / 2, 30: b} for a, b in zip(spread(start), spread(end), strict=True)]


def choice_numbers(good: bool, last: bool = True) -> teacher_choice.Numbers:
    after = {"base + GRPO": 0.9, "larger, clean": 0.7, "larger + GRPO": 0.85, "larger": 0.52, "larger, early": 0.51}
    overlap = {"base + GRPO": 0.8, "larger, clean": 0.6, "larger + GRPO": 0.65, "larger": 0.75, "larger, early": 0.7}
    score = {"base + GRPO": 0.92, "larger, clean": 0.93, "larger + GRPO": 0.97, "larger": 0.6, "larger, early": 0.55}
    if not good:
        after = {"base + GRPO": 0.7, "larger, clean": 0.9, "larger + GRPO": 0.52, "larger": 0.59, "larger, early": 0.6}
        overlap = {name: 1.4 - share for name, share in overlap.items()}
        score["larger, clean"] = 0.7
    made = {name: curves(0.5, value) for name, value in after.items()}
    if not last:  # the clean teacher catches up
        made["larger, clean"] = [{**one, 30: 0.95} for one in made["larger, clean"]]
    return teacher_choice.Numbers(
        learning_rate=dict.fromkeys(teacher_choice.TEACHERS, 2e-3),
        teacher={name: spread(value) for name, value in score.items()},
        overlap={name: spread(value) for name, value in overlap.items()},
        curve=made,
        few={name: [one[15] for one in made[name]] for name in ("base + GRPO", "larger, clean")},
    )


def reverse_numbers(good: bool, larger: bool = True) -> reverse.Numbers:
    ends = {"base": 0.46, "larger": 0.48, "larger, early": 0.47, "larger, clean": 0.9, "base + GRPO": 0.9}
    if not good:
        ends = {"base": 0.85, "larger": 0.7, "larger, early": 0.65, "larger, clean": 0.6, "base + GRPO": 0.6}
    score = {"base": 0.45, "larger": 0.5 if good else 0.4, "larger, clean": 0.95, "base + GRPO": 0.92}
    score["larger, early"] = score["larger"]
    if not larger:  # it drives the student to a level of its own
        ends["larger"] = score["larger"] = 0.7
    return reverse.Numbers(
        teacher={name: spread(value) for name, value in score.items()},
        curve={name: curves(0.92, value) for name, value in ends.items()},
        greedy={name: spread(value) for name, value in ends.items()},
        teacher_greedy={name: spread(value) for name, value in score.items()},
    )


NUMBERS: dict[str, tuple[Any, Any]] = {
    "teacher_choice": (choice_numbers(True), choice_numbers(False)),
    "reverse": (reverse_numbers(True), reverse_numbers(False)),
}

SECOND: dict[str, tuple[Any, list[int]]] = {
    "teacher_choice": (choice_numbers(True, last=False), [0]),
    "reverse": (reverse_numbers(True, larger=False), [1, 2]),
}
