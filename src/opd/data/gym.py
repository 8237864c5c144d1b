"""Data sets of reasoning-gym, by the name of a task and its options."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from opd.errors import ConfigError, nearest
from opd.plugins import _import_extra


def gym_task(task: str, options: Mapping[str, Any]) -> Any:
    """reasoning-gym's data set of a task. Raises ConfigError for an unknown task, unknown options or bad values."""
    gym = _import_extra("reasoning_gym", "gym")
    from reasoning_gym.factory import DATASETS

    if task not in DATASETS:
        raise ConfigError(
            f"reasoning-gym has no task {task!r}.{nearest(task, DATASETS)} It has: {', '.join(sorted(DATASETS))}."
        )
    known = [option.name for option in fields(DATASETS[task][1])]
    for name in options:
        if name not in known:
            raise ConfigError(
                f"reasoning_gym:{task} has no option {name!r}.{nearest(name, known)} It has: {', '.join(known)}."
            )
    try:
        return gym.create_dataset(task, **options)
    except Exception as error:  # mostly AssertionError, from the task's own checks
        raise ConfigError(f"reasoning_gym:{task} refuses the options {dict(options)}: {error}. Change them.") from error
