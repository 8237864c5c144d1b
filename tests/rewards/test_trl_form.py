"""Rewards in TRL's form: what they are called with, what is refused, and that a row's columns reach them."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.runs import command, one_stage, prepare

from opd.errors import ConfigError, TrainingError
from opd.rewards.base import FunctionReward
from opd.rewards.registry import as_reward, load_reward
from opd.types import Prompt

MINE = """
def length(completions, **kwargs):
    return [float(len(text)) for text in completions]

def right(prompts, completions, answer, **kwargs):
    return [float(str(a) == text) for a, text in zip(answer, completions)]

def scaled(completions, factor, **kwargs):
    return [factor * len(text) for text in completions]

def solved(completions, solution):
    return [float(s in c) for s, c in zip(solution, completions)]
"""


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.chdir(prepare(tmp_path, one_stage(method="grpo", teacher=None, sampling={"n": 2})))
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "mine.py").write_text(MINE)
    sys.modules.pop("mine", None)
    yield tmp_path
    sys.modules.pop("mine", None)


def value(function: Any, prompt: Prompt, text: str) -> float:
    reward = as_reward(function)
    assert isinstance(reward, FunctionReward)
    return reward.value(prompt, text)


def test_as_reward_calls_trl_form_with_lists_of_one():
    seen: list[dict[str, Any]] = []

    def f(prompts: list[str], completions: list[str], **kwargs: Any) -> list[float]:
        seen.append({"prompts": prompts, "completions": completions, **kwargs})
        return [0.25]

    assert value(f, Prompt(id=3, content="1+1=", answer=2, metadata={"level": "easy"}), "2") == 0.25
    assert seen == [{"prompts": ["1+1="], "completions": ["2"], "answer": [2], "level": ["easy"]}]


def test_as_reward_gives_messages_of_a_conversation():
    def f(prompts: Any, completions: Any) -> list[float]:
        assert prompts == [[{"role": "user", "content": "Hi"}]]
        assert completions == [[{"role": "assistant", "content": "Hello"}]]
        return [1.0]

    assert value(f, Prompt(id=0, content=({"role": "user", "content": "Hi"},)), "Hello") == 1.0


def test_as_reward_prefers_trl_form_to_two_positions():
    """`(prompts, completions)` could be called as (prompt, text), with other values than it is written for."""

    def f(prompts: Any, completions: Any) -> list[float]:
        return [float(isinstance(prompts, list) and isinstance(completions, list))]

    assert value(f, Prompt(id=0, content="a"), "b") == 1.0


def test_as_reward_keeps_own_form():
    assert value(lambda prompt, text: len(text) + prompt.id, Prompt(id=2, content="a"), "bcd") == 5


@pytest.mark.parametrize(("found", "said"), [([1.0, 2.0], "returned 2 rewards for 1"), ([None], "returned None")])
def test_trl_form_with_wrong_result_is_an_error(found: list[Any], said: str):
    with pytest.raises(TrainingError, match=said):
        value(lambda completions, **kwargs: found, Prompt(id=0, content="a"), "b")


def test_trl_form_that_needs_a_trainer_is_refused():
    with pytest.raises(ConfigError, match="requires completion_ids, which TRL's trainers give and opd does not"):
        as_reward(lambda completions, completion_ids: [0.0])

    async def later(completions: Any) -> list[float]:
        return [0.0]

    with pytest.raises(ConfigError, match="is a coroutine"):
        as_reward(later)


def test_load_reward_gives_options_to_trl_form(mine: Path):
    reward = load_reward("mine:scaled", {"factor": 2})
    assert isinstance(reward, FunctionReward)
    assert reward.value(Prompt(id=0, content="a"), "bcd") == 6
    with pytest.raises(ConfigError, match="has no parameter 'factr'"):
        load_reward("mine:solved", {"factr": 2})


@pytest.mark.parametrize("name", ["length", "right"])
def test_check_accepts_reward_in_trl_form(mine: Path, name: str):
    ended = command("check", "recipe.yaml", f"reward={{name: 'mine:{name}'}}")
    assert ended.code == 0, ended.err


def test_check_refuses_rows_without_the_column_that_it_requires(mine: Path):
    ended = command("check", "recipe.yaml", "reward={name: 'mine:solved'}")
    assert ended.code == 2
    assert "the function requires the column solution, and the row has none" in ended.err
