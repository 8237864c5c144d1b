"""Rewards in TRL's form: f(prompts, completions, **columns) -> a number per completion, called for one at a time."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from opd.errors import ConfigError
from opd.rewards.base import FunctionReward
from opd.types import Prompt

_COLUMNS = ("answer", "response", "privileged_context", "teacher_id", "task")
_OF_TRAINERS = ("completion_ids", "trainer_state", "log_extra", "log_metric", "environments")  # TRL passes these too


def is_trl_form(function: Any) -> bool:
    """Whether a function has a parameter `completions`, which TRL passes by this name."""
    if not callable(function) or inspect.isclass(function):
        return False
    try:
        return "completions" in inspect.signature(function).parameters
    except ValueError:  # no signature
        return False


def one_at_a_time(function: Callable[..., Any], name: str, options: Mapping[str, Any]) -> FunctionReward:
    """The reward that calls the function with lists of one: prompts, completions, the row's columns, and the options.

    A conversation's prompt and completion are messages, as in TRL. Rows without a column that the function requires
    are unreadable. Raises ConfigError for a coroutine, and for a parameter that only TRL's trainers can give.
    """
    if inspect.iscoroutinefunction(function):
        raise ConfigError(
            f"The reward {name!r} is a coroutine. A reward is called and returns numbers: give a plain function."
        )
    parameters = inspect.signature(function).parameters.values()
    takes_all = any(one.kind is one.VAR_KEYWORD for one in parameters)
    named = {one.name for one in parameters if one.kind in (one.POSITIONAL_OR_KEYWORD, one.KEYWORD_ONLY)}
    required = {one.name for one in parameters if one.name in named and one.default is one.empty} - options.keys()
    if missing := sorted(required.intersection(_OF_TRAINERS)):
        raise ConfigError(
            f"The reward {name!r} requires {', '.join(missing)}, which TRL's trainers give and opd does not. Give the "
            "parameter a default, or write the reward as (prompt, text) -> float."
        )
    if unknown := sorted(set() if takes_all else options.keys() - named):
        raise ConfigError(f"The reward {name!r} has no parameter {unknown[0]!r}. Its parameters: {', '.join(named)}.")

    def _value(prompt: Prompt, text: str) -> Any:
        columns = {**_row(prompt, text), **options}
        found = list(function(**{key: value for key, value in columns.items() if takes_all or key in named}))
        if len(found) != 1:
            raise ValueError(f"it returned {len(found)} rewards for 1 completion")
        return found[0]

    def _unreadable(prompt: Prompt) -> str | None:
        lacks = sorted(required - _row(prompt, "").keys())
        return f"the function requires the column {', '.join(lacks)}, and the row has none" if lacks else None

    return FunctionReward(name=name, function=_value, undeclared=True, unreadable=_unreadable)


def _row(prompt: Prompt, text: str) -> dict[str, list[Any]]:
    """The arguments for one completion: lists of one."""
    chat = not isinstance(prompt.content, str)
    given = {key: getattr(prompt, key) for key in _COLUMNS}
    return {
        **{str(key): [value] for key, value in prompt.metadata.items()},
        **{key: [value] for key, value in given.items() if value is not None},
        "prompts": [list(prompt.content) if chat else prompt.content],
        "completions": [[{"role": "assistant", "content": text}] if chat else text],
    }
