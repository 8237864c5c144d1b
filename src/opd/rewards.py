"""Rewards: (prompt, response text) -> a number, or of a whole group (`group_rewards`).

Ours stand in `REWARDS`, yours is `my_package.mine:function`.
"""

from __future__ import annotations

import importlib
import json
import math
import re
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from decimal import Decimal
from numbers import Real
from typing import Any, TypeAlias

import numpy as np

from opd.errors import ConfigError, DataError, TrainingError, nearest
from opd.group_rewards import GroupReward
from opd.judges.section import Asks
from opd.needs import needing, needs_of
from opd.plugins import check_options, import_function
from opd.rubric_reward import rubric
from opd.types import Prompt, Rollout

RewardFn: TypeAlias = Callable[[Prompt, str], float]
AnyReward: TypeAlias = RewardFn | GroupReward

# A sign counts unless it can be a minus between two terms; commas count between groups of three digits.
NUMBER = re.compile(
    r"(?:(?<![\w)\]}.])[-+])?(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?(?:[eE][-+]?[0-9]{1,3}(?![0-9]))?"
    r"|(?<![\w.])[-+]?\.[0-9]+"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Reward:
    """A reward that knows its name, for messages, and the data columns that it reads."""

    name: str
    function: RewardFn
    needs: frozenset[str]

    def __call__(self, prompt: Prompt, response: str) -> float:
        return self.function(prompt, response)


def load_reward(name: str, options: Mapping[str, Any]) -> AnyReward:
    """A reward of `REWARDS`, or a user's `package.module:function`, which is called (prompt, response, **options).

    The parameters of a built-in reward's function are its options. `opd.needs.needs_of(reward)` says which data columns
    it reads. Raises ConfigError for an unknown name or option, or when a package is not installed.
    """
    if ":" in name:
        function = import_function(name)
        check_options(f"The reward {name!r}", function, options, given=2)
        return Reward(
            name=name, function=lambda prompt, text: function(prompt, text, **options), needs=needs_of(function)
        )
    if name not in REWARDS:
        raise ConfigError(
            f"There is no reward {name!r}.{nearest(name, REWARDS)} There are: {', '.join(REWARDS)}, "
            "and your own as `my_package.mine:function`."
        )
    check_options(f"The reward {name!r}", REWARDS[name], options, beside=tuple(Asks.model_fields))
    made = REWARDS[name](**options)
    if isinstance(made, GroupReward):
        return made
    return Reward(name=name, function=made, needs=needs_of(made))


def one_by_one(name: str) -> RewardFn:
    """A reward, with its defaults, that looks at one response at a time. Raises ConfigError for one of whole groups."""
    reward = load_reward(name, {})
    if isinstance(reward, GroupReward):
        raise ConfigError(f"Reward {name!r} grades all responses to a prompt at once. Use one that grades one by one.")
    return reward


def score(reward: RewardFn, rollouts: Sequence[Rollout]) -> list[float]:
    """The reward of each rollout's text. [B]

    Raises TrainingError when the reward raises (the original error is its cause) or its result is no finite number.
    """
    name = getattr(reward, "name", None) or getattr(reward, "__name__", type(reward).__name__)
    scores: list[float] = []
    for rollout in rollouts:
        about = f"on prompt {rollout.prompt.id}, response {rollout.text[:200]!r}"
        try:
            value = reward(rollout.prompt, rollout.text)
        except Exception as error:  # a user's function may raise anything
            raise TrainingError(
                f"The reward {name!r} raised {type(error).__name__} {about}: {error}. "
                "A reward answers every text: correct it, or the row."
            ) from error
        if not isinstance(value, (Real, np.bool_)) or not math.isfinite(value):
            raise TrainingError(
                f"The reward {name!r} returned {value!r:.80} ({type(value).__name__}) {about}. Return a finite number."
            )
        scores.append(float(value))
    return scores


def exact(ignore_case: bool = False) -> RewardFn:
    """1 when response and answer are the same text after stripping white space."""

    def reward(prompt: Prompt, response: str) -> float:
        one, other = response.strip(), str(_answer(prompt)).strip()
        return float(one.casefold() == other.casefold() if ignore_case else one == other)

    return needing(reward, "answer")


def regex(pattern: str, group: int | str | None = None) -> RewardFn:
    """1 when `pattern` is found (re.search); with `group`, when that group of the first match is the answer's text."""
    try:
        compiled = re.compile(pattern)
    except (re.error, TypeError) as error:
        raise ConfigError(
            f"The reward 'regex' got the pattern {pattern!r}, which does not compile: {error}."
        ) from error
    groups = [*range(compiled.groups + 1), *compiled.groupindex]
    if group is not None and group not in groups:
        raise ConfigError(f"The reward 'regex' got `group: {group}`, and the pattern {pattern!r} has only {groups}.")

    def reward(prompt: Prompt, response: str) -> float:
        match = compiled.search(response)
        if match is None or group is None:
            return float(match is not None)
        return float((match[group] or "").strip() == str(_answer(prompt)).strip())

    return reward if group is None else needing(reward, "answer")


def final_number() -> RewardFn:
    """1 when the last number of the response equals the last number of the answer: `#### 1,234` is `1234.0`.

    Numbers are decimals, compared exactly; of a fraction 1/2 the last number is 2 (`math_verify` reads fractions).
    """

    def reward(prompt: Prompt, response: str) -> float:
        wanted = _last_number(str(_answer(prompt)))
        if wanted is None:
            raise DataError(f"The answer {prompt.answer!r:.80} of prompt {prompt.id} holds no number.")
        return float(_last_number(response) == wanted)

    return needing(reward, "answer")


def max_words(n: int) -> RewardFn:
    """1 when the response has at least one and at most `n` words (separated by white space)."""
    if not isinstance(n, int) or n < 1:
        raise ConfigError(f"The reward 'max_words' got `n: {n!r}`. Give a number of words, at least 1.")
    return lambda prompt, response: float(1 <= len(response.split()) <= n)


def math_verify(timeout_s: int = 5) -> RewardFn:
    """1 when math-verify finds the response's final expression equal to the answer, LaTeX or plain mathematics.

    A parse or comparison that takes longer than `timeout_s` whole seconds counts as unequal, and math-verify logs it;
    0 waits for ever. The timeout is an alarm signal, which only the main thread can set: other threads have none.
    """
    if not isinstance(timeout_s, int) or timeout_s < 0:
        raise ConfigError(f"The reward 'math_verify' got `timeout_s: {timeout_s!r}`. Give whole seconds, 0 for none.")
    verifier = _import_extra("math_verify", "math")

    def reward(prompt: Prompt, response: str) -> float:
        alarm = timeout_s if threading.current_thread() is threading.main_thread() else 0
        text = str(_answer(prompt))
        # Bare LaTeX is recognised between dollars only.
        text = text if "$" in text or "\\boxed" in text else f"${text}$"
        gold = verifier.parse(text, parsing_timeout=alarm)
        if not gold:
            raise DataError(
                f"math-verify finds no expression in the answer {prompt.answer!r:.80} of prompt {prompt.id}."
            )
        return float(verifier.verify(gold, verifier.parse(response, parsing_timeout=alarm), timeout_seconds=alarm))

    return needing(reward, "answer")


def reasoning_gym(tag: str | None = None, malformed: float | None = None) -> RewardFn:
    """The score that the row's own reasoning-gym task gives, in [0, 1]; the data is `reasoning_gym:TASK`.

    `tag` scores the text between the last <tag> and </tag> (0 when there is none) instead of the whole response.
    Some tasks' scorers raise on an answer that they cannot read (prime_factorization on a word): `malformed` is the
    score of such an answer; without it the error stops the run. The scorer of n_queens evaluates the answer as Python.
    """
    gym = _import_extra("reasoning_gym", "gym")
    from reasoning_gym.utils import extract_answer

    tasks: dict[str, Any] = {}

    def reward(prompt: Prompt, response: str) -> float:
        """The score of the task's own scorer, whose dataset is made once for each set of options."""
        origin = prompt.metadata.get("reasoning_gym")
        if origin is None:
            raise DataError(f"Prompt {prompt.id} is not a reasoning-gym row. Use data with `path: reasoning_gym:TASK`.")
        key = origin["task"] + json.dumps(origin["options"], sort_keys=True, default=str)
        if key not in tasks:
            tasks[key] = gym.create_dataset(origin["task"], **origin["options"])
        answer = response.strip() if tag is None else extract_answer(response, tag_name=tag)
        try:
            return 0.0 if answer is None else float(tasks[key].score_answer(answer=answer, entry=origin["entry"]))
        except Exception:  # the scorers raise whatever their parsing raises
            if malformed is None:
                raise
            return malformed

    return reward


REWARDS: dict[str, Callable[..., AnyReward]] = {
    "exact": exact,
    "regex": regex,
    "final_number": final_number,
    "max_words": max_words,
    "math_verify": math_verify,
    "reasoning_gym": reasoning_gym,
    "rubric": rubric,
}


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


def _import_extra(module: str, extra: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ConfigError(
            f"{module} is not installed ({error}). Install it with `pip install 'opd[{extra}]'`."
        ) from error


def _answer(prompt: Prompt) -> Any:
    if prompt.answer is None:
        raise DataError(f"Prompt {prompt.id} has no `answer`, which this reward compares with. Fill the column.")
    return prompt.answer


def _last_number(text: str) -> Decimal | None:
    found = NUMBER.findall(text.replace("$", "").replace("\N{MINUS SIGN}", "-"))
    return Decimal(found[-1].replace(",", "")) if found else None
