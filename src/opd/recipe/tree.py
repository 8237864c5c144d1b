"""A recipe before validation, a tree of plain values: copies, merging and overrides."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import yaml

from opd.errors import ConfigError, nearest


def parse_value(text: str, where: str) -> Any:
    """The value of a key=value on the command line, parsed as YAML. Raises ConfigError."""
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{where}: {text!r} is not a YAML value ({error.__class__.__name__}). Quote it.") from error


def fresh(node: Any) -> Any:
    """A deep copy without shared nodes, so that an override changes only one use of a YAML alias."""
    if isinstance(node, Mapping):
        return {str(key): fresh(value) for key, value in node.items()}
    if isinstance(node, list | tuple):
        return [fresh(value) for value in node]
    return str(node) if isinstance(node, Path) else node


def merged(under: Any, over: Any) -> Any:
    """`under` overridden by `over`, key by key where both are mappings."""
    if isinstance(under, dict) and isinstance(over, dict):
        return {k: merged(under.get(k), over.get(k, under.get(k))) for k in {**under, **over}}
    return over


def with_whole_tasks(stage: dict[str, Any], source: str) -> dict[str, Any]:
    """The stage with its `sampling`, `teacher_sampling` and `evaluate` merged under those of each task.

    `evaluate` moves from the stage to the tasks that have one. A stage without tasks is returned unchanged. Raises
    ConfigError if the stage has an `evaluate` and no task has one, or if the stage's has `data`.
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
            f"{source}: stage {stage.get('name')!r}: `evaluate` holds shared settings of its tasks' evaluations, and "
            f"no task has one. Give a task its own prompts, e.g. tasks.{next(iter(tasks))}.evaluate: {{data: ...}}."
        )
    if isinstance(shared, dict) and shared.get("data") is not None:
        raise ConfigError(
            f"{source}: stage {stage.get('name')!r}: `evaluate.data` would be the held-out prompts of every task. Move "
            f"it into tasks.{measured[0]}.evaluate; to remove it from `defaults`, write `evaluate: {{data: null}}`."
        )
    whole: dict[str, Any] = {}
    for name, task in tasks.items():
        whole[name] = task
        if isinstance(task, dict):
            under = {key: stage.get(key) for key in ("sampling", "teacher_sampling") if stage.get(key) is not None}
            if name in measured and shared is not None:
                under["evaluate"] = shared
            whole[name] = merged(under, task)
    return {"data": None, **stage, "tasks": whole, "evaluate": None}


def override(tree: dict[str, Any], text: str, *, stage_keys: Collection[str], recipe_keys: Collection[str]) -> None:
    """Set one `dotted.key=value` in a recipe's tree, in place. Raises ConfigError."""
    key, equals, value = text.partition("=")
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
    for i, part in enumerate(parts[:-1]):
        node = _descend(node, part, ".".join(parts[: i + 1]), create=True)
    _assign(node, parts[-1], parse_value(value, f"Override {key}"), key)


def _descend(node: Any, part: str, where: str, *, create: bool) -> Any:
    if isinstance(node, list):
        names = [str(item.get("name")) for item in node if isinstance(item, dict)]
        if part in names:
            return node[names.index(part)]
        if part.isdigit() and int(part) < len(node):
            return node[int(part)]
        raise ConfigError(f"Override {where}: no such entry.{nearest(part, names)} There are {names}.")
    if isinstance(node, dict):
        if node.get(part) is None and create:
            node[part] = {}
        return node[part]
    raise ConfigError(f"Override {where}: {node!r} is a value and has no keys.")


def _assign(node: Any, key: str, value: Any, where: str) -> None:
    if not isinstance(node, dict):
        raise ConfigError(f"Override {where}: {node!r} has no keys.")
    node[key] = value
