"""Runs by recipe: those that differ in nothing but their seed form a group, over whose seeds means are taken."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from opd.errors import ConfigError, RunError, nearest
from opd.messages import visible
from opd.viewer.keys import OWN, differing
from opd.viewer.names import apart
from opd.viewer.read import RunView, StageView
from opd.viewer.results import columns_of, evaluations, tasks_of

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
BETWEEN = ("runs", "recipes", "stages")  # what can be compared
WHENS = ("before", "teacher", "after")


@dataclass(frozen=True, slots=True)
class Group:
    """Runs of one recipe by seed, rising. `name`: the recipe's, and what tells it from another group's."""

    label: str
    name: str
    runs: dict[int, RunView]

    @property
    def first(self) -> RunView:
        """The run of the lowest seed, with whose recipe those of the others agree but for the seed."""
        return next(iter(self.runs.values()))


@dataclass(frozen=True, slots=True)
class Entry:
    """An evaluation of one stage, in every run of a group: of the student before or after training, or of the teacher.

    The student after training is that of the stage's last evaluation.
    """

    name: str
    group: Group
    stage: str
    when: str  # one of WHENS

    @property
    def first(self) -> StageView:
        """The stage in the group's first run."""
        return self.view(self.group.first)

    def view(self, run: RunView) -> StageView:
        """The stage in a run of the group."""
        return run.stages[self.stage]

    def numbers(self, run: RunView, task: str | None) -> dict[str, Any]:
        """What was measured of a task in a run, by key without `eval/`; empty if nothing was."""
        return columns_of(self.view(run), task).get(self.when, {})

    def step(self, run: RunView, task: str | None) -> int | None:
        """The updates after which it was measured; None before training."""
        if self.when != "after":
            return None
        found = evaluations(self.view(run).metrics, task)["student"]
        return found[-1][0] if found else None

    def file(self, run: RunView, task: str | None) -> str:
        """The evaluation's name in the file of its responses."""
        step = self.step(run, task)
        return self.when if step is None else f"step_{step:06d}"


def seed_of(run: RunView) -> int:
    """The run's seed; that of a recipe that does not say is 0."""
    return int(run.recipe.get("seed") or 0)


def by_recipe(runs: Sequence[RunView]) -> list[list[RunView]]:
    """The runs whose recipes are equal but for `seed` and the keys of `OWN`, in the order of their first runs."""
    found: dict[str, list[RunView]] = {}
    for run in runs:
        kept = {key: value for key, value in run.recipe.items() if key not in (*OWN, "seed")}
        found.setdefault(json.dumps(kept, sort_keys=True, default=str), []).append(run)
    return list(found.values())


def between_of(runs: Sequence[RunView], between: str | None) -> str:
    """What to compare: `between`, by default the recipes if one of them has several seeds, else the runs.

    Of a single recipe with several seeds it is the stages. Raises ConfigError for another word.
    """
    if between is not None and between not in BETWEEN:
        raise ConfigError(
            f"A comparison is between {', '.join(BETWEEN[:-1])} or {BETWEEN[-1]}, not {between!r}."
            f"{nearest(between, BETWEEN)}"
        )
    groups = by_recipe(runs)
    if between is not None or all(len({seed_of(run) for run in group}) == 1 for group in groups):
        return between or "runs"
    return "stages" if len(groups) == 1 else "recipes"


def grouped(runs: Sequence[RunView], *, text: bool = True) -> list[Group]:
    """The runs as groups. Without `text` no key of a recipe is in a group's name.

    Raises ConfigError if there are too many recipes, or two runs of one recipe with the same seed.
    """
    every = [_by_seed(group) for group in by_recipe(runs)]
    if not 1 <= len(every) <= len(LETTERS):
        raise ConfigError(
            f"A comparison shows 1 to {len(LETTERS)} recipes, got {len(every)}: runs are of one recipe if they differ "
            "in nothing but `seed`, names and folders. Give the folders of fewer."
        )
    firsts = [next(iter(group.values())) for group in every]
    names = apart([run.name for run in firsts], [run.path for run in firsts], keys_of(firsts) if text else [])
    said = [visible(run.name) + (f" ({more})" if more else "") for run, more in zip(firsts, names, strict=True)]
    return [Group(*one) for one in zip(LETTERS, said, every, strict=False)]


def keys_of(firsts: Sequence[RunView]) -> list[tuple[str, list[str]]]:
    """The keys other than the seed that differ between the first runs of groups, with each one's value."""
    recipes = [{key: value for key, value in run.recipe.items() if key != "seed"} for run in firsts]
    return differing(recipes, [run.environment for run in firsts])


def _by_seed(runs: Sequence[RunView]) -> dict[int, RunView]:
    found: dict[int, RunView] = {}
    for run in sorted(runs, key=seed_of):
        seed = seed_of(run)
        if seed in found:
            raise ConfigError(
                f"{found[seed].path} and {run.path} have one recipe and one seed, {seed}: a mean over seeds would "
                "count it twice. Leave one of them out, or compare each run with --between runs."
            )
        found[seed] = run
    return found


def entries(groups: Sequence[Group], between: str, stage: str | None) -> list[Entry]:
    """What to compare, by group.

    `between` recipes: one stage after its training; `stage`, or the last that all recipes have and evaluate. `between`
    stages: all evaluations of all stages, or of `stage` alone.

    Raises:
        ConfigError: not all recipes have the stage, or nothing was evaluated. RunError: a run has not finished it.
    """
    stages = _stages(groups, between, stage)
    for group in groups:
        _check_finished(group, stages[group.label])
    found = list(_entries(groups, stages, between))
    if not found:
        raise ConfigError(
            f"These runs evaluated nothing in the compared stages ({_listed(stages)}). A stage measures what its "
            "`evaluate` section says: docs/evaluation.md."
        )
    return found


def planned(recipe: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The sections of a recipe's stages by name; another model of a stage is STAGE/MODEL, as in `RunView.stages`."""
    found: dict[str, dict[str, Any]] = {}
    for spec in recipe.get("stages") or []:
        name = str(spec.get("name"))
        found |= {name: spec} | {f"{name}/{peer}": spec for peer in spec.get("peers") or []}
    return found


def _stages(groups: Sequence[Group], between: str, stage: str | None) -> dict[str, list[str]]:
    """The names of the stages to compare, by group."""
    own = {group.label: list(planned(group.first.recipe)) for group in groups}
    shared = [name for name in own[groups[0].label] if all(name in names for names in own.values())]
    if stage is not None and stage not in shared:
        known = dict.fromkeys(name for names in own.values() for name in names)
        raise ConfigError(
            f"Not all runs have a stage {stage!r} ({_listed(own)}). Name one that all have with --stage."
            f"{nearest(stage, known)}"
        )
    if between == "stages" and stage is None:
        return own
    if not shared:
        raise ConfigError(
            f"The recipes have no stage of one name ({_listed(own)}). Compare all their stages with --between stages."
        )
    measured = [name for name in shared if all(_is_evaluated(planned(one.first.recipe)[name]) for one in groups)]
    return {label: [stage or (measured or shared)[-1]] for label in own}


def _listed(names: Mapping[str, Sequence[str]]) -> str:
    return "; ".join(f"{label}: {', '.join(own) or 'none'}" for label, own in names.items())


def _check_finished(group: Group, stages: Sequence[str]) -> None:
    """Raise RunError if a run has not finished one of these stages, of those that are evaluated."""
    behind: list[str] = []
    for run in group.runs.values():
        for name, spec in planned(run.recipe).items():
            whole = run.stages.get(str(spec.get("name")))  # of a stage with peers the one that has the end of all
            if name in stages and _is_evaluated(spec) and (whole is None or whole.done is None):
                made = 0 if whole is None else whole.steps_done
                behind.append(f"{run.path}, stage {spec.get('name')!r}: {made} of {spec.get('steps')} steps")
                break
    if behind:
        more = ", name a finished stage with --stage" if len(stages) > 1 else ""
        raise RunError(
            f"A mean over seeds needs the last evaluation of every run, and not all have finished ({'; '.join(behind)})"
            f". `opd train RUN/recipe.yaml` continues a run; or leave it out{more}, or use --between runs."
        )


def _is_evaluated(spec: Mapping[str, Any]) -> bool:
    return bool(spec.get("evaluate")) or any(
        (task or {}).get("evaluate") for task in (spec.get("tasks") or {}).values()
    )


def _entries(groups: Sequence[Group], stages: Mapping[str, Sequence[str]], between: str) -> Iterator[Entry]:
    for group in groups:
        for stage in stages[group.label]:
            views = [run.stages[stage] for run in group.runs.values() if stage in run.stages]
            measured = {when for view in views for task in tasks_of(view) for when in columns_of(view, task)}
            for when in WHENS if between == "stages" else WHENS[-1:]:
                if when in measured:
                    yield Entry(_name(group, stage, when, between, len(groups) > 1), group, stage, when)


def _name(group: Group, stage: str, when: str, between: str, several: bool) -> str:
    if between == "recipes":
        return group.label
    own = visible(stage) + ("" if when == "after" else f", {when}")
    return f"{group.label} {own}" if several else own
