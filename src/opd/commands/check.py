"""`opd check`: check a recipe without loading weights."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from opd.errors import OPDError
from opd.recipe.schema import Recipe, StageSpec

if TYPE_CHECKING:
    from opd.runs.prepare import Prepared


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckedStage:
    """What was checked of a stage, and what was not: one line each, the first with the stage's name."""

    name: str
    method: str
    lines: list[str]


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckedRecipe:
    """A recipe in which nothing wrong was found."""

    notes: list[str]  # about the whole recipe
    stages: list[CheckedStage]

    @property
    def lines(self) -> list[str]:
        """All lines, in the order in which `opd check` prints them."""
        return [*self.notes, *(line for stage in self.stages for line in stage.lines)]

    def as_json(self, name: str) -> str:
        """The same as JSON, for the recipe that was given as `name`."""
        return json.dumps({"recipe": name, "ok": True, **asdict(self)}, indent=1, ensure_ascii=False)


def refusal_as_json(name: str, error: OPDError) -> str:
    """The error that refuses a recipe as JSON: its type and its message."""
    refused = {"type": type(error).__name__, "message": str(error)}
    return json.dumps({"recipe": name, "ok": False, "error": refused}, indent=1, ensure_ascii=False)


def check_recipe(recipe: Recipe, *, live: bool = False) -> list[str]:
    """The lines of `checked_recipe`."""
    return checked_recipe(recipe, live=live).lines


def checked_recipe(recipe: Recipe, *, live: bool = False) -> CheckedRecipe:
    """Build every stage's method, load its data, render its prompts. Returns what was checked and what was not.

    `live`: contact the servers of teachers and engines too. Raises the errors that `opd train` raises before it loads
    weights.
    """
    from opd.runs.checks import check_stages
    from opd.runs.prepare import Given

    checked = check_stages(recipe, Given())
    stages: list[CheckedStage] = []
    for spec in recipe.stages:
        prepared = checked.prepared[spec.name]
        more = [*audited(spec, prepared), *checked.lines[spec.name]]
        more += of_servers(recipe, spec, prepared) if live else []
        lines = [*described(spec, prepared), *(f"  {line}" for line in more)]
        stages.append(CheckedStage(name=spec.name, method=spec.method, lines=lines))
    return CheckedRecipe(notes=list(checked.notes), stages=stages)


def of_servers(recipe: Recipe, spec: StageSpec, prepared: Prepared) -> list[str]:
    """What the servers of a stage say and can do: see `opd.commands.live`."""
    from opd.commands.live import live_lines

    found: list[str] = []
    for view in spec.views:
        found += [
            line for line in live_lines(recipe, view, prepared.peers.get(view.train, prepared)) if line not in found
        ]
    return found or ["no servers to contact"]


def audited(spec: StageSpec, prepared: Prepared) -> list[str]:
    """What the rewards of a stage pay for wrong texts and for forms of the right answer: see `opd.rewards.audit`."""
    from opd.rewards.audit import audit

    lines: list[str] = []
    for name, task in prepared.tasks.items():
        of_evaluation = spec.by_task[name].evaluate
        own = task.held_out is not None and of_evaluation is not None and of_evaluation.reward is not None
        pairs = [("", task.reward, task.prompts)]
        if task.held_out is not None and (own or task.reward is None):
            pairs.append(("evaluate: ", task.held_out.reward, list(task.held_out.prompts)))
        for where, reward, prompts in pairs:
            found = None if reward is None else audit(reward, prompts)
            if found is not None:
                says = [found.line] if found.verdict is None else [found.line, found.verdict]
                lines += [f"{'' if name is None else f'task {name}: '}{where}{one}" for one in says]
    return lines


def described(spec: StageSpec, prepared: Prepared) -> list[str]:
    """A stage's prompts: one line, and one per task."""
    counts: list[str] = []
    notes: list[str] = []
    for name, task in prepared.tasks.items():
        notes += [f"  {line}" if name is None else f"  task {name}: {line}" for line in task.notes]
        held_out = "no held-out prompts" if task.held_out is None else f"{len(task.held_out.prompts)} held out"
        counts.append(f"{len(task.prompts)} prompts, {held_out}")
    if not spec.tasks:
        return [f"stage {spec.name}: {spec.method}, {counts[0]}", *notes]
    lines = [f"stage {spec.name}: {spec.method}, {len(counts)} tasks, {spec.task_order}"]
    for (name, section), count in zip(spec.tasks.items(), counts, strict=True):
        teacher = "no teacher" if section.teacher is None else f"teacher {section.teacher}"
        lines.append(f"  task {name}: {count}, {teacher}, at most {section.sampling.max_completion_length} tokens")
    return [*lines, *notes]
