"""TODO: opd/commands/check.py"""

from __future__ import annotations

from typing import TYPE_CHECKING

from opd.recipe.schema import Recipe, StageSpec
from opd.runs.tokenizers import check_template_options, check_tokenizers
from opd.stage.trackers import check_report_to

if TYPE_CHECKING:
    from opd.runs.prepare import Prepared


def check_recipe(recipe: Recipe) -> list[str]:
    """Build every stage's method, read its data, render its prompts. Returns what was looked at and what was not.

    Raises the errors that `opd train` would raise before it loads weights.
    """
    from opd.runs.prepare import Given, prepare

    check_report_to(recipe.report_to)
    lines: list[str] = []
    prepared: dict[str, Prepared] = {}
    for spec in recipe.stages:
        of_stage = prepared[spec.name] = prepare(spec, Given(), recipe.seed)
        lines += described(spec, of_stage)
        lines += [f"  {line}" for line in check_tokenizers(recipe, spec, of_stage)]
    check_template_options(recipe, prepared)
    return lines


def described(spec: StageSpec, prepared: Prepared) -> list[str]:
    """What a stage trains on: a line, and one for each of its tasks."""
    of_each: list[str] = []
    notes: list[str] = []
    for name, task in prepared.tasks.items():
        notes += [f"  {line}" if name is None else f"  task {name}: {line}" for line in task.notes]
        held_out = "no held-out prompts" if task.held_out is None else f"{len(task.held_out.prompts)} held out"
        of_each.append(f"{len(task.prompts)} prompts, {held_out}")
    if not spec.tasks:
        return [f"stage {spec.name}: {spec.method}, {of_each[0]}", *notes]
    lines = [f"stage {spec.name}: {spec.method}, {len(of_each)} tasks, {spec.task_order}"]
    for (name, part), numbers in zip(spec.tasks.items(), of_each, strict=True):
        taught = "no teacher" if part.teacher is None else f"teacher {part.teacher}"
        lines.append(f"  task {name}: {numbers}, {taught}, at most {part.sampling.max_completion_length} tokens")
    return [*lines, *notes]
