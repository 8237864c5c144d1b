"""The built-in rewards that are functions of a response's text. `registry.py` names them."""

from __future__ import annotations

import json
import re
from decimal import Decimal
from typing import Any

from opd.errors import ConfigError, DataError
from opd.plugins import _import_extra
from opd.rewards.base import FunctionReward
from opd.types import Prompt

ANSWER = frozenset({"answer"})  # the data's column that most rewards read

# A sign belongs to the number unless it can be a minus between two terms; commas may separate groups of three digits.
NUMBER = re.compile(
    r"(?:(?<![\w)\]}.])[-+])?(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?(?:[eE][-+]?[0-9]{1,3}(?![0-9]))?"
    r"|(?<![\w.])[-+]?\.[0-9]+"
)


def exact(ignore_case: bool = False) -> FunctionReward:
    """1 if response and answer are the same text after stripping white space."""

    def reward(prompt: Prompt, response: str) -> float:
        one, other = response.strip(), str(_answer(prompt)).strip()
        return float(one.casefold() == other.casefold() if ignore_case else one == other)

    return FunctionReward(
        name="exact", function=reward, needs=ANSWER, correctness=True, extract=lambda _, text: text.strip()
    )


def regex(pattern: str, group: int | str | None = None) -> FunctionReward:
    """1 if `pattern` is found (re.search); with `group`, if that group of the first match equals the answer."""
    try:
        compiled = re.compile(pattern)
    except (re.error, TypeError) as error:
        raise ConfigError(
            f"The reward 'regex' got the pattern {pattern!r}, which does not compile: {error}."
        ) from error
    groups = [*range(compiled.groups + 1), *compiled.groupindex]
    if group is not None and group not in groups:
        raise ConfigError(f"The reward 'regex' got `group: {group}`, but the pattern {pattern!r} has only {groups}.")

    def reward(prompt: Prompt, response: str) -> float:
        match = compiled.search(response)
        if match is None or group is None:
            return float(match is not None)
        return float((match[group] or "").strip() == str(_answer(prompt)).strip())

    def extract(_: Prompt, text: str) -> str | None:
        match = compiled.search(text)
        return None if match is None else match[0 if group is None else group]

    needs = frozenset[str]() if group is None else ANSWER
    return FunctionReward(name="regex", function=reward, needs=needs, correctness=group is not None, extract=extract)


def final_number() -> FunctionReward:
    """1 if the last number of the response equals the last number of the answer: `#### 1,234` equals `1234.0`.

    Numbers are decimals, compared exactly. The last number of the fraction 1/2 is 2 (`math_verify` reads fractions).
    """

    def reward(prompt: Prompt, response: str) -> float:
        wanted = _last_number(str(_answer(prompt)))
        if wanted is None:
            raise DataError(f"The answer {prompt.answer!r:.80} of prompt {prompt.id} holds no number.")
        return float(_last_number(response) == wanted)

    def unreadable(prompt: Prompt) -> str | None:
        """Why a row has no number to compare with."""
        if _last_number(str(_answer(prompt))) is None:
            return f"its answer {prompt.answer!r:.80} holds no number"
        return None

    def extract(_: Prompt, text: str) -> str | None:
        number = _last_number(text)
        return None if number is None else str(number)

    return FunctionReward(
        name="final_number",
        function=reward,
        needs=ANSWER,
        unreadable=unreadable,
        correctness=True,
        extract=extract,
    )


def max_words(n: int) -> FunctionReward:
    """1 if the response has at least one and at most `n` words (separated by white space)."""
    if not isinstance(n, int) or n < 1:
        raise ConfigError(f"The reward 'max_words' got `n: {n!r}`. Give a number of words, at least 1.")
    return FunctionReward(name="max_words", function=lambda prompt, text: float(1 <= len(text.split()) <= n))


def reasoning_gym(tag: str | None = None, malformed: float | None = None, full_only: bool = False) -> FunctionReward:
    """The score of the row's reasoning-gym task, in [0, 1]; the data is `reasoning_gym:TASK`.

    With `tag`, scores the text between the last <tag> and </tag> (0 without these tags) instead of the whole response.
    Some scorers raise for an unreadable answer (prime_factorization for a word): `malformed` is the score of such an
    answer; without it the error stops the run. Most scorers pay parts of 1, some for any text: with `full_only` a score
    below 1 counts as 0. docs/rewards.md has a table of all tasks. The scorer of n_queens runs the answer as Python.
    """
    gym = _import_extra("reasoning_gym", "gym")
    from reasoning_gym.utils import extract_answer

    tasks: dict[str, Any] = {}

    def reward(prompt: Prompt, response: str) -> float:
        """The score of the task's scorer. Its dataset is built once per set of options."""
        origin = prompt.metadata.get("reasoning_gym")
        if origin is None:
            raise DataError(f"Prompt {prompt.id} is not a reasoning-gym row. Use data with `path: reasoning_gym:TASK`.")
        key = origin["task"] + json.dumps(origin["options"], sort_keys=True, default=str)
        if key not in tasks:
            tasks[key] = gym.create_dataset(origin["task"], **origin["options"])
        answer = response.strip() if tag is None else extract_answer(response, tag_name=tag)
        try:
            score = 0.0 if answer is None else float(tasks[key].score_answer(answer=answer, entry=origin["entry"]))
        except Exception:  # scorers raise any error of their parsing
            if malformed is None:
                raise
            return malformed
        return float(score >= 1.0) if full_only else score

    def unreadable(prompt: Prompt) -> str | None:
        """Why a row is none of a task."""
        return None if "reasoning_gym" in prompt.metadata else "it is no row of `reasoning_gym:TASK`"

    def extract(_: Prompt, text: str) -> str | None:
        return text.strip() if tag is None else extract_answer(text, tag_name=tag)

    return FunctionReward(
        name="reasoning_gym", function=reward, unreadable=unreadable, correctness=True, extract=extract
    )


def _answer(prompt: Prompt) -> Any:
    if prompt.answer is None:
        raise DataError(f"Prompt {prompt.id} has no `answer`, which this reward compares with. Fill the column.")
    return prompt.answer


def _last_number(text: str) -> Decimal | None:
    found = NUMBER.findall(text.replace("$", "").replace("\N{MINUS SIGN}", "-"))
    return Decimal(found[-1].replace(",", "")) if found else None
