"""Checks across the sections of a recipe, which the schema validates one by one. No torch here."""

from __future__ import annotations

from typing import TYPE_CHECKING

from opd.errors import ConfigError, nearest
from opd.types import teachers_in

if TYPE_CHECKING:
    from opd.recipe.schema import Recipe, StageSpec
    from opd.recipe.yaml_text import Source


def check_references(recipe: Recipe, source: Source) -> None:
    """Refuse names of models and stages that do not exist or come too late. Raises ConfigError."""
    seen: list[str] = []
    for number, stage in enumerate(recipe.stages):
        where = f"{source.at('stages', number)}: stage {stage.name!r}"
        if stage.name in seen:
            raise ConfigError(f"{where}: the name is used twice. A stage's folder carries its name; choose another.")
        check_tasks(stage, where)
        teachers = [
            ("teacher" if task is None else f"tasks.{task}.teacher", name)
            for task, part in stage.by_task.items()
            for name in teachers_in(part.teacher) or [None]
        ]
        check_several(stage, where)
        judges = [("lm", name) for name in stage.judge_models]
        peers = [("peers", name) for name in stage.peers]
        for role, name in [("train", stage.train), *peers, *teachers, ("base", stage.base), *judges]:
            place = f"{source.at('stages', number, *role.split('.'))}: stage {stage.name!r}"
            if name is not None and name not in recipe.models:
                raise ConfigError(
                    f"{place}: `{role}: {name}` is not among the models.{nearest(name, recipe.models)} "
                    f"There are {sorted(recipe.models)}."
                )
            origin = None if name is None else recipe.models[name].from_stage
            if origin is not None and origin not in seen:
                raise ConfigError(
                    f"{place}: model {name!r} comes from stage {origin!r}, and no such stage comes before this one."
                )
        check_peers(stage, where)
        if judging := [name for name in stage.trains if name in stage.judge_models]:
            raise ConfigError(
                f"{where}: its `reward` uses the model {judging[0]!r} as a judge, and the stage trains that model: "
                "cached answers would come from other weights. Use another model, or a copy under another name in "
                "`models`."
            )
        if stage.seconds_of is not None and stage.seconds_of not in seen:
            raise ConfigError(f"{where}: `seconds_of: {stage.seconds_of}` names no earlier stage. Earlier: {seen}.")
        seen.append(stage.name)


def check_several(stage: StageSpec, where: str) -> None:
    """Refuse several teachers of one row of which two are one model, or one is the student. Raises ConfigError."""
    for part in stage.by_task.values():
        names = teachers_in(part.teacher)
        if len(names) == 1:
            continue
        if twice := [name for name in dict.fromkeys(names) if names.count(name) > 1]:
            raise ConfigError(f"{where}: `teacher: {part.teacher}` names {twice[0]} twice. Name each model once.")
        if stage.train in names:
            raise ConfigError(
                f"{where}: `teacher: {part.teacher}` names the student {stage.train!r} among several teachers, and its "
                "weights change. Name a copy of it, under another name in `models`."
            )


def unused_models(recipe: Recipe) -> list[str]:
    """A line about models that no stage names; else none."""
    used = {name for stage in recipe.stages for name in stage.models}
    spare = [f"models.{name}" for name in recipe.models if name not in used]
    return [f"no stage uses {' and '.join(spare)}: nothing in it is checked"] if spare else []


def check_peers(stage: StageSpec, where: str) -> None:
    """Refuse a stage of several models without a task for each, or with settings for one. Raises ConfigError."""
    owners = {name: task.train for name, task in stage.tasks.items()}
    if not stage.peers:
        named = [name for name, owner in owners.items() if owner is not None]
        if named or stage.topology != "all":
            what = f"tasks.{named[0]}.train" if named else "topology"
            raise ConfigError(
                f"{where}: `{what}` is for several models in one stage, and this one trains {stage.train!r} alone. "
                "Name the others in `peers`, or remove it."
            )
        return
    if len(set(stage.trains)) < len(stage.trains):
        raise ConfigError(f"{where}: it trains {', '.join(stage.trains)}, one of them twice. Name each model once.")
    if wrong := [name for name, owner in owners.items() if owner not in stage.trains]:
        raise ConfigError(
            f"{where}: tasks.{wrong[0]}.train is {owners[wrong[0]]!r}. In a stage with `peers` each task names the "
            f"model whose own data it is, one of {', '.join(stage.trains)}."
        )
    if idle := [name for name in stage.trains if name not in owners.values()]:
        raise ConfigError(
            f"{where}: {idle[0]!r} has no data of its own. Give it a task with `train: {idle[0]}`, or leave it out."
        )
    if stage.save != "merged":
        raise ConfigError(
            f"{where}: save is {stage.save!r}, and several models become one, the mean of their whole weights: the "
            "mean of LoRA factors is not the mean of models. Set `save: merged`."
        )
    if stage.task_order != "mixed":
        raise ConfigError(
            f"{where}: it trains several models, and each step of each has rows of all its tasks. Set "
            "`task_order: mixed`."
        )
    unsupported = {
        "sampler": stage.sampler,
        "engine": stage.engine,
        "diagnostics.every": stage.diagnostics.every,
        "seconds_of": stage.seconds_of,
        "evaluate.until": stage.has_goal,
    }
    if what := next((name for name, value in unsupported.items() if value), None):
        raise ConfigError(f"{where}: `{what}` is not supported in a stage with `peers`. Remove it.")


def check_tasks(stage: StageSpec, where: str) -> None:
    """Refuse a stage with neither `data` nor `tasks`, or with both. Raises ConfigError."""
    if not stage.tasks:
        if stage.data is None:
            raise ConfigError(f"{where}: it has neither `data` nor `tasks`, so it has no prompts. Give one of them.")
        if stage.task_order != "alternate":
            raise ConfigError(f"{where}: `task_order` needs `tasks`, and the stage has none. Remove it, or give tasks.")
        return
    first = next(iter(stage.tasks))
    twice = [f"`{key}`" for key in ("data", "environment", "teacher", "reward") if getattr(stage, key) is not None]
    if twice:
        raise ConfigError(
            f"{where}: it has `tasks` and also {' and '.join(twice)}, which nothing reads: each task has its own. Move "
            f"the settings into the tasks (tasks.{first}), or remove `tasks`; null removes a value from `defaults`."
        )
    for key in ("sampling", "teacher_sampling"):
        counts = {name: (getattr(task, key) or task.sampling).n for name, task in stage.tasks.items()}
        if stage.task_order == "mixed" and len(set(counts.values())) > 1:
            raise ConfigError(
                f"{where}: a mixed step draws equally many responses to each prompt, and {key}.n is {counts}. Give the "
                "tasks the same n, or set `task_order: alternate`."
            )
