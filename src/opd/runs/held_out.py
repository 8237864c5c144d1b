"""Prompts that occur twice, word for word: held-out ones that are trained on, and stages that should share none."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

from opd.errors import ConfigError, DataError, nearest
from opd.recipe.schema import DataSection, StageSpec
from opd.runs.prepare import Prepared
from opd.types import Prompt


def words_of(prompt: Prompt) -> str:
    """A prompt's words, to compare: without system messages, with one space for any white space, and its images."""
    return " ".join([_words(prompt), *(image.digest for image in prompt.images)])


def _words(prompt: Prompt) -> str:
    if isinstance(prompt.content, str):
        return " ".join(prompt.content.split())
    messages = [message for message in prompt.content if message["role"] != "system"]
    only = messages[0]["content"] if len(messages) == 1 else None
    if isinstance(only, str):
        return " ".join(only.split())
    return json.dumps(messages, sort_keys=True, default=str, ensure_ascii=False)


def shared(training: Collection[str], held_out: Sequence[Prompt]) -> int:
    """The number of held-out prompts whose words are in `training`."""
    return sum(words_of(prompt) in training for prompt in held_out)


def with_shared(spec: StageSpec, prepared: Prepared, seen: dict[str, set[str]]) -> Prepared:
    """The prepared stage; a task's notes count the held-out prompts that the trained model is or was trained on.

    `seen`: words of the training prompts by the stage's trained model, of the stages so far; this adds the stage's.
    """
    before = seen.setdefault(spec.train, set())
    before.update(words_of(prompt) for task in prepared.tasks.values() for prompt in task.prompts)
    tasks = dict(prepared.tasks)
    for name, task in prepared.tasks.items():
        section = spec.by_task[name]
        if task.held_out is None or section.evaluate is None:
            continue
        count = shared(before, task.held_out.prompts)
        if count:
            line = (
                f"{count} of {len(task.held_out.prompts)} held-out prompts are training prompts of {spec.train}, word "
                f"for word, so they measure memory too. {remedy(section.data, section.evaluate.data)}"
            )
            tasks[name] = replace(task, warnings=(*task.warnings, line))
    return replace(prepared, tasks=tasks)


def check_apart(spec: StageSpec, prepared: Mapping[str, Prepared]) -> None:
    """Refuse prompts that a stage of `apart_from` has too, word for word. `prepared`: stages up to this one, by name.

    Raises ConfigError for a name that is not an earlier stage, DataError for shared prompts.
    """
    earlier = [name for name in prepared if name != spec.name]
    own = [prompt for task in prepared[spec.name].tasks.values() for prompt in task.prompts]
    for name in spec.apart_from:
        if name not in earlier:
            raise ConfigError(
                f"{spec.where(None)}: `apart_from` names {name!r}, which is not an earlier stage."
                f"{nearest(name, earlier)} Earlier ones: {', '.join(earlier) or 'none'}."
            )
        theirs = {words_of(prompt) for task in prepared[name].tasks.values() for prompt in task.prompts}
        both = [prompt.id for prompt in own if words_of(prompt) in theirs]
        if both:
            rows = ", ".join(map(str, both[:5])) + (", ..." if len(both) > 5 else "")
            raise DataError(
                f"{spec.where(None)}: {len(both)} of its {len(own)} prompts are prompts of stage {name!r} too (rows "
                f"{rows}), and `apart_from` keeps the two apart. Use other rows, with `skip` or "
                "`select: {by: ..., keep: far}`, or remove `apart_from` to train on the same prompts again."
            )


def remedy(training: DataSection, held_out: DataSection) -> str:
    """What to change in `evaluate.data`."""
    if held_out.path == training.path and training.path.startswith("reasoning_gym:"):
        used = training.skip + (training.limit or training.options.get("size", 500))
        return (
            "Row i of a reasoning-gym task with seed s is row i + 1 with seed s - 1: give both data sections the same "
            f"seed, and the held-out one `skip: {used}`."
        )
    return f"Leave them out with `evaluate.data.select: {{by: {{path: {training.path}}}, keep: far}}`."
