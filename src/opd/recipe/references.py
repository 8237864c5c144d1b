"""What has to be right between the parts of a recipe, where its schema sees each alone. No torch here."""

from __future__ import annotations

from typing import TYPE_CHECKING

from opd.errors import ConfigError, nearest

if TYPE_CHECKING:
    from opd.recipe.schema import Recipe, StageSpec


def check_references(recipe: Recipe, source: str) -> None:
    """Refuse names of models and stages that are not there, or come too late. Raises ConfigError."""
    seen: list[str] = []
    for stage in recipe.stages:
        where = f"{source}: stage {stage.name!r}"
        if stage.name in seen:
            raise ConfigError(f"{where}: the name is used twice. A stage's folder carries its name; choose another.")
        check_tasks(stage, where)
        taught = [("teacher" if t is None else f"tasks.{t}.teacher", part.teacher) for t, part in stage.by_task.items()]
        judges = [("lm", name) for name in stage.judge_models]
        for role, name in [("train", stage.train), *taught, *judges]:
            if name is not None and name not in recipe.models:
                raise ConfigError(
                    f"{where}: `{role}: {name}` is not among the models.{nearest(name, recipe.models)} "
                    f"There are {sorted(recipe.models)}."
                )
            origin = None if name is None else recipe.models[name].from_stage
            if origin is not None and origin not in seen:
                raise ConfigError(
                    f"{where}: model {name!r} is what stage {origin!r} leaves, and no such stage comes before this one."
                )
        if stage.train in stage.judge_models:
            raise ConfigError(
                f"{where}: its `reward` asks the model {stage.train!r}, which it trains: what is kept of its answers "
                "would be those of other weights. Ask another model, or a copy of it under another name in `models`."
            )
        if stage.seconds_of is not None and stage.seconds_of not in seen:
            raise ConfigError(f"{where}: `seconds_of: {stage.seconds_of}` is no earlier stage. Earlier ones: {seen}.")
        seen.append(stage.name)


def check_tasks(stage: StageSpec, where: str) -> None:
    """Refuse a stage that says twice, or never, what it trains on. Raises ConfigError."""
    if not stage.tasks:
        if stage.data is None:
            raise ConfigError(f"{where}: it has neither `data` nor `tasks`, so there are no prompts. Give one of them.")
        if stage.task_order != "alternate":
            raise ConfigError(f"{where}: `task_order` is about `tasks`, and there are none. Remove it, or give tasks.")
        return
    first = next(iter(stage.tasks))
    twice = [f"`{key}`" for key in ("data", "teacher", "reward") if getattr(stage, key) is not None]
    if twice:
        raise ConfigError(
            f"{where}: it has `tasks`, and {' and '.join(twice)} of its own, which nothing reads: each task has "
            f"its own. Move what is meant into the tasks (tasks.{first}), or remove `tasks`; what `defaults` gave is "
            "taken back by null."
        )
    for key in ("sampling", "teacher_sampling"):
        counts = {name: (getattr(task, key) or task.sampling).n for name, task in stage.tasks.items()}
        if stage.task_order == "mixed" and len(set(counts.values())) > 1:
            raise ConfigError(
                f"{where}: a mixed step draws equally many responses to each prompt, and {key}.n is {counts}. Give the "
                "tasks the same n, or set `task_order: alternate`."
            )
