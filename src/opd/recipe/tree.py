"""A recipe before validation, a tree of plain values: copies, merging and overrides."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from opd.errors import ConfigError, nearest
from opd.recipe.yaml_text import Place, Source, parse_value


def fresh(node: Any) -> Any:
    """A deep copy without shared nodes, so that an override changes only one use of a YAML alias."""
    if isinstance(node, Mapping):
        return {str(key): fresh(value) for key, value in node.items()}
    if isinstance(node, list | tuple):
        return [fresh(value) for value in node]
    return str(node) if isinstance(node, Path) else node


def merged(under: Any, over: Any, where: str) -> Any:
    """`under` overridden by `over`, key by key where both are mappings.

    Raises ConfigError, which begins with `where`, for a plain value under a mapping, which nothing would read.
    """
    if isinstance(under, dict) and isinstance(over, dict):
        return {k: merged(under.get(k), over.get(k, under.get(k)), f"{where}.{k}") for k in {**under, **over}}
    if isinstance(over, dict) and under is not None:
        raise ConfigError(f"{where} is {under!r:.80}, and another place gives a mapping: give a mapping, or remove it.")
    return over


def with_whole_tasks(stage: dict[str, Any], where: str) -> dict[str, Any]:
    """The stage with its `sampling`, `teacher_sampling` and `evaluate` merged under those of each task.

    `evaluate` moves from the stage to the tasks that have one. A stage without tasks is returned unchanged. `where` is
    the start of messages. Raises ConfigError if the stage has an `evaluate` and no task has one, or if the stage's has
    `data`.
    """
    tasks = stage.get("tasks")
    if not isinstance(tasks, dict) or not tasks:
        return stage
    shared = stage.get("evaluate")
    if not isinstance(shared, dict | None):
        return {"data": None, **stage}  # not a mapping: validation refuses it
    measured = [name for name, task in tasks.items() if isinstance(task, dict) and task.get("evaluate") is not None]
    if shared is not None and not measured:
        raise ConfigError(
            f"{where}: stage {stage.get('name')!r}: `evaluate` holds shared settings of its tasks' evaluations, and "
            f"no task has one. Give a task its own prompts, e.g. tasks.{next(iter(tasks))}.evaluate: {{data: ...}}."
        )
    if isinstance(shared, dict) and shared.get("data") is not None:
        raise ConfigError(
            f"{where}: stage {stage.get('name')!r}: `evaluate.data` would be the held-out prompts of every task. Move "
            f"it into tasks.{measured[0]}.evaluate; to remove it from `defaults`, write `evaluate: {{data: null}}`."
        )
    whole: dict[str, Any] = {}
    for name, task in tasks.items():
        whole[name] = task
        if isinstance(task, dict):
            under = {key: stage.get(key) for key in ("sampling", "teacher_sampling") if stage.get(key) is not None}
            if name in measured and shared is not None:
                under["evaluate"] = shared
            whole[name] = merged(under, task, f"{where}: stage {stage.get('name')!r}")
    return {"data": None, **stage, "tasks": whole, "evaluate": None}


def override(
    tree: dict[str, Any], text: str, source: Source, *, stage_keys: Collection[str], recipe_keys: Collection[str]
) -> Source:
    """Set one `dotted.key=value` in a recipe's tree, in place. Returns the source with it. Raises ConfigError."""
    key, equals, value = text.partition("=") if isinstance(text, str) else ("", "", "")  # Python may give another kind
    if not equals or not key:
        raise ConfigError(f"An override has the form key=value, e.g. seed=1 or stages.distil.steps=5; got {text!r}.")
    parts = key.split(".")
    stages = tree.get("stages")
    if parts[0] in stage_keys and parts[0] not in recipe_keys:
        if not isinstance(stages, list) or len(stages) != 1:
            names = [s.get("name") for s in stages or [] if isinstance(s, dict)]
            raise ConfigError(
                f"{key!r} belongs to a stage, and the recipe has several: write stages.NAME.{key} (NAME of {names})."
            )
        parts = ["stages", "0", *parts]
    node: Any = tree
    place: Place = ()
    for i, part in enumerate(parts[:-1]):
        found, node = _descend(node, part, ".".join(parts[: i + 1]))
        place = (*place, found)
    _assign(node, parts[-1], parse_value(value, f"Override {key}"), key)
    return source.overridden((*place, parts[-1]), key)


def _descend(node: Any, part: str, where: str) -> tuple[str, Any]:
    """(the key or the position of a part, its value; an empty mapping for a missing one)."""
    if isinstance(node, list):
        names = [str(item.get("name")) for item in node if isinstance(item, dict)]
        at = names.index(part) if part in names else int(part) if part.isdecimal() else len(node)
        if at < len(node):
            return str(at), node[at]
        raise ConfigError(f"Override {where}: no such entry.{nearest(part, names)} There are {names}.")
    if isinstance(node, dict):
        if node.get(part) is None:
            node[part] = {}
        return part, node[part]
    raise ConfigError(f"Override {where}: {node!r} is a value and has no keys.")


def _assign(node: Any, key: str, value: Any, where: str) -> None:
    if not isinstance(node, dict):
        raise ConfigError(f"Override {where}: {node!r} has no keys.")
    node[key] = value
