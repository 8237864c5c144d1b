"""Sorting pairs in which the student ends its responses (setting A), or never learned to and adds other rows (B)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from opd_studies.lab.lab import SORTING, Lab, Pair, PairSize, Task, student_recipe, teacher_recipe

LONG = 48  # tokens of a response of setting B's student


ROWS = replace(SORTING, reward="opd_studies.worlds.boundaries:first_answer")


RAMBLING = replace(ROWS, data="opd_studies.worlds.boundaries:rambling", options={"longest": LONG})


def pairs_of(lab: Lab, keys: Sequence[tuple[str, int]], size: PairSize) -> list[Pair]:
    """One pair per setting and seed; both settings have the same teacher."""
    learned: Mapping[str, Task] = {"A": SORTING, "B": RAMBLING}
    recipes = [
        recipe
        for setting, seed in keys
        for recipe in (
            teacher_recipe(seed, replace(size, task=SORTING)),
            student_recipe(seed, replace(size, task=learned[setting])),
        )
    ]
    made = lab.run_all(recipes)
    return [
        Pair(teacher=teacher / "teacher" / "model", student=student / "warm-up" / "model")
        for teacher, student in zip(made[::2], made[1::2], strict=True)
    ]
