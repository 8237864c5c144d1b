"""A recipe before it is validated, a tree of plain values: overrides, merging, and what is said of its mistakes."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError

from opd.errors import ConfigError, nearest

# What other trainers call a key, and what is said of it here.
OTHER_NAMES = {
    "lr": "Here it is `optimizer.learning_rate`.",
    "learning_rate": "Here it is `optimizer.learning_rate`.",
    "lr_scheduler_type": "Here it is `optimizer.schedule`.",
    "warmup_ratio": "Here it is `optimizer.warmup_steps`, a number of steps.",
    "batch_size": "Here it is `prompts_per_step`, times `sampling.n` responses.",
    "per_device_train_batch_size": "Here it is `prompts_per_step`, of all devices, times `sampling.n` responses.",
    "gradient_accumulation_steps": "There is none: `prompts_per_step` is the whole step, and `micro_batch_tokens` what "
    "is in memory at once.",
    "epochs": "There is none: `steps` says how long; all prompts / `prompts_per_step` of them are an epoch.",
    "num_train_epochs": "There is none: `steps` says how long; all prompts / `prompts_per_step` of them are an epoch.",
    "max_steps": "Here it is `steps`.",
    "save_steps": "Here it is `checkpoint.every`.",
    "eval_steps": "Here it is `evaluate.every`.",
    "num_generations": "Here it is `sampling.n`.",
    "max_new_tokens": "Here it is `sampling.max_completion_length`.",
    "max_length": "Here it is `sampling.max_completion_length` for responses, `max_prompt_length` for prompts.",
    "max_seq_length": "Here it is `sampling.max_completion_length` for responses, `max_prompt_length` for prompts.",
    "temperature": "Here it is `sampling.temperature`.",
    "model": "Here it is `models.NAME.path`, and `train: NAME`.",
    "model_name_or_path": "Here it is `models.NAME.path`, and `train: NAME`.",
    "dataset": "Here it is `data.path`.",
    "train_dataset": "Here it is `data.path`.",
    "lora": "Here it is `models.NAME.lora`, e.g. {rank: 16}.",
    "bf16": "Here it is `models.NAME.autocast`, or `models.NAME.dtype: bfloat16`.",
    "beta": "There is none: what weighs a divergence is a method's option, if it has one (`opd describe METHOD`). "
    "AdamW has `optimizer.betas`.",
    "kl_coef": "There is none: what weighs a divergence is a method's option, if it has one (`opd describe METHOD`).",
}
_NOT_OURS = ("RewardSection", "JudgeSection")  # where these names would mean something else
_EXAMPLES = {  # of the shortest section, where a plain value was given
    "RewardSection": "{{name: {}}}",
    "DataSection": "{{path: {}}}",
    "ModelSpec": "{{path: {}}}",
    "JudgeSection": "{{url: http://localhost:8000/v1, model: NAME}}",
    "Lora": "{{rank: 16}}, or null for full weights",
}


def parse_value(text: str, where: str) -> Any:
    """The value of a key=value on the command line, read as YAML. Raises ConfigError."""
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{where}: {text!r} is not a YAML value ({error.__class__.__name__}). Quote it.") from error


def fresh(node: Any) -> Any:
    """A copy in which nothing is shared: what YAML aliases say twice can be overridden once."""
    if isinstance(node, Mapping):
        return {str(key): fresh(value) for key, value in node.items()}
    if isinstance(node, list | tuple):
        return [fresh(value) for value in node]
    return str(node) if isinstance(node, Path) else node


def merged(under: Any, over: Any) -> Any:
    """`over` on top of `under`, key by key where both are mappings."""
    if isinstance(under, dict) and isinstance(over, dict):
        return {k: merged(under.get(k), over.get(k, under.get(k))) for k in {**under, **over}}
    return over


def with_whole_tasks(stage: dict[str, Any], source: str) -> dict[str, Any]:
    """A stage whose tasks have all of their `sampling`, `teacher_sampling` and `evaluate`: their own on the stage's.

    `evaluate` goes to the tasks that have one, and leaves the stage. A stage without tasks stays as it is. Raises
    ConfigError for an `evaluate` that no task takes up, or whose prompts would be those of every task.
    """
    tasks = stage.get("tasks")
    if not isinstance(tasks, dict) or not tasks:
        return stage
    shared = stage.get("evaluate")
    if not isinstance(shared, dict | None):
        return {"data": None, **stage}  # it is no section, which validation says
    measured = [name for name, task in tasks.items() if isinstance(task, dict) and task.get("evaluate") is not None]
    if shared is not None and not measured:
        raise ConfigError(
            f"{source}: stage {stage.get('name')!r}: `evaluate` holds what the evaluations of its tasks share, and no "
            f"task has one. Give a task its own prompts, e.g. tasks.{next(iter(tasks))}.evaluate: {{data: ...}}."
        )
    if isinstance(shared, dict) and shared.get("data") is not None:
        raise ConfigError(
            f"{source}: stage {stage.get('name')!r}: `evaluate.data` would be the held-out prompts of every task. Move "
            f"it into tasks.{measured[0]}.evaluate; what comes from `defaults` is taken back by `evaluate: {{data: "
            "null}`."
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
                f"{key!r} belongs to a stage, and there are several: write stages.NAME.{key} (NAME of {names})."
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


def explain(
    error: ValidationError,
    source: str,
    section: type[BaseModel],
    *,
    stage_keys: Collection[str] = (),
    overrides: Sequence[str] = (),
) -> str:
    """A validation error as lines that say the key, what it got, and the nearest known key.

    The first part of an override's key may be one of `stage_keys`, so that it may also be a misspelt one.
    """
    short = {text.partition("=")[0].partition(".")[0] for text in overrides}
    lines: list[str] = []
    for one in error.errors():
        path = ".".join(str(part) for part in one["loc"])
        if one["type"] == "extra_forbidden":
            key, top = str(one["loc"][-1]), len(one["loc"]) == 1
            lines.append(_unknown(path, key, _section_at(one["loc"][:-1], section), stage_keys if top else (), short))
        elif one["type"] == "missing":
            lines.append(f"`{path}` is missing")
        elif one["type"] == "model_type":
            lines.append(_no_section(path, one["input"], _section_at(one["loc"], section)))
        else:
            # A section that its own check refuses is not repeated: it may hold what no log should.
            own = one["type"] == "value_error" and isinstance(one["input"], Mapping)
            got = "" if own else f" (got {one['input']!r:.80})"
            lines.append(f"`{path}`: {one['msg']}{got}")
    return f"{source} is not valid:\n  " + "\n  ".join(lines)


def _unknown(
    path: str, key: str, section: type[BaseModel] | None, stage_keys: Collection[str], short: Collection[str]
) -> str:
    """The line about an unknown key of `section`; there are `stage_keys` only at the top of a recipe."""
    known = [] if section is None else list(section.model_fields)
    listed = ", ".join(known)
    if key in stage_keys:
        return f"unknown key `{path}`. It is a key of a stage. Known here: {listed}"
    if key in OTHER_NAMES and section is not None and section.__name__ not in _NOT_OURS:
        return f"unknown key `{path}`. {OTHER_NAMES[key]} Known here: {listed}"
    near, also = nearest(key, known), ""
    if key in short and stage_keys:
        top, near = near, nearest(key, [*known, *stage_keys])
        also = "" if near and near == top else f"; of a stage: {', '.join(stage_keys)}"
    return f"unknown key `{path}`.{near} Known here: {listed}{also}"


def _no_section(path: str, got: Any, section: type[BaseModel] | None) -> str:
    """The line about a plain value where a section belongs."""
    line = f"`{path}`: Input should be a valid dictionary (got {got!r:.80})"
    if section is None:
        return line
    example = _EXAMPLES.get(section.__name__)
    if example is None:
        return f"{line}. Its keys: {', '.join(section.model_fields)}"
    return f"{line}. Write {example.format(got if isinstance(got, str) else '...')}"


def _section_at(loc: Sequence[int | str], top: type[BaseModel]) -> type[BaseModel] | None:
    """The section at a location below `top`."""
    section: Any = top
    for part in loc:
        if part == getattr(section, "__name__", None):  # pydantic names the branch of a union
            continue
        if isinstance(section, type) and issubclass(section, BaseModel):
            section = section.model_fields[str(part)].annotation if part in section.model_fields else None
        else:  # the value of a dict or an item of a list
            section = get_args(section)[-1] if get_args(section) else section
        section = _first_section(section)
    return section if isinstance(section, type) and issubclass(section, BaseModel) else None


def _first_section(annotation: Any) -> Any:
    """`X | None` -> X; containers and sections stay."""
    options = [a for a in get_args(annotation) if a is not type(None)]
    if options and not hasattr(annotation, "__origin__"):
        sections = [a for a in options if isinstance(a, type) and issubclass(a, BaseModel)]
        return sections[0] if sections else options[0]
    return annotation
