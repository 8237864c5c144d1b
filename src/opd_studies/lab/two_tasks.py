"""Recipes of one student and two tasks, each with a teacher that knows only that task.

The tasks are sorting digits in ascending and in descending order; a sign in the prompt tells which.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from opd_studies.lab.distilling import HELD_OUT
from opd_studies.lab.lab import SORTERS, SORTING, Lab, PairSize, Task, optimizer, student_recipe, teacher_recipe

CHARACTERS = "0123456789<>"


TASKS = {
    "ascending": replace(SORTING, characters=CHARACTERS),
    "descending": replace(SORTING, characters=CHARACTERS, options={"descending": True}),
}


OTHER = {"ascending": "descending", "descending": "ascending"}


# Sampling of held-out responses; the divergence is measured on those of the first setting.
EVALUATED = {"top-p 1": {"temperature": 1}, "top-p 0.9": {"temperature": 1, "top_p": 0.9}}


NEVER = 1e-9  # share of a task that is never taken


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """A setting: method, trained tasks and their order, teachers, and the share of the usual size."""

    method: str
    options: Mapping[str, Any] = field(default_factory=dict[str, Any])
    top_p: float = 1.0  # of the rollouts
    order: Literal["alternate", "mixed"] = "alternate"
    tasks: Sequence[str] = tuple(TASKS)
    swapped: bool = False
    steps: float = 1.0
    prompts: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """Seeds (two teachers and one student each), updates, and prompts per step."""

    seeds: Sequence[int] = (0, 1, 2)
    steps: int = 100
    prompts_per_step: int = 64
    pair: PairSize = SORTERS


def models_of(lab: Lab, size: Size) -> dict[int, dict[str, Path]]:
    """Folders by seed: of the two teachers, by task, and of the student."""
    taught = [teacher_recipe(seed, replace(size.pair, task=task)) for seed in size.seeds for task in TASKS.values()]
    begun = [beginner(seed, size.pair) for seed in size.seeds]
    folders = lab.run_all([*taught, *begun])
    teachers = iter(folder / "teacher" / "model" for folder in folders[: len(taught)])
    students = iter(folder / "warm-up" / "model" for folder in folders[len(taught) :])
    return {seed: {**{task: next(teachers) for task in TASKS}, "student": next(students)} for seed in size.seeds}


def beginner(seed: int, pair: PairSize, of: Mapping[str, Task] = TASKS) -> dict[str, Any]:
    """The recipe of a student that saw a few worked rows of both tasks, in mixed steps."""
    made = student_recipe(seed, replace(pair, task=next(iter(of.values()))))
    tasks = {name: {"data": task.rows(pair.student_rows, seed=2)} for name, task in of.items()}
    return {**made, "stages": [{**made["stages"][0], "data": None, "tasks": tasks, "task_order": "mixed"}]}


def distillation(
    name: str, seed: int, models: Mapping[str, Path], setting: Setting, size: Size, before: bool
) -> dict[str, Any]:
    """A recipe of one stage, measured on both tasks. `before`: also measure the start and the teachers."""
    return {
        "name": f"{name}-{seed}".replace(", ", "-").replace(" ", "-"),
        "seed": seed,
        "models": {model: {"path": str(path)} for model, path in models.items()},
        "stages": [
            {
                "name": "distil",
                "train": "student",
                "method": setting.method,
                "options": dict(setting.options),
                "tasks": {task: task_section(task, setting, before) for task in TASKS},
                "task_order": setting.order,
                "checkpoint": {"every": 100_000, "keep": 1},
                "samples_every": 0,
                "prompts_per_step": max(round(setting.prompts * size.prompts_per_step), 1),
                "steps": max(round(setting.steps * size.steps), 1),
                "optimizer": optimizer(2e-3, 10),
            }
        ],
    }


def task_section(task: str, setting: Setting, before: bool) -> dict[str, Any]:
    """One task of a distillation: its prompts, its teacher (or the other one), its share, its evaluation."""
    one = TASKS[task]
    return {
        "data": one.rows(10_000, seed=3),
        "teacher": OTHER[task] if setting.swapped else task,
        "share": 1.0 if task in setting.tasks else NEVER,
        "reward": {"name": one.reward},
        "sampling": {"max_completion_length": one.longest, "top_p": setting.top_p},
        "evaluate": {
            "data": one.rows(HELD_OUT, part="held_out"),
            "sampling": {how: {**fields, "max_completion_length": one.longest} for how, fields in EVALUATED.items()},
            "before": before,
            "teacher": before,
            "kl": True,
        },
    }
