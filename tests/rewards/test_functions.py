"""What each reward pays for, and what each mistake is told."""

from __future__ import annotations

import sys
import threading
from typing import Any

import numpy as np
import pytest
import torch

from opd.data.prompts import load_prompts
from opd.errors import ConfigError, DataError, TrainingError
from opd.pieces.needs import columns_of
from opd.recipe.schema import DataSection
from opd.rewards.base import score
from opd.rewards.registry import REWARDS, load_reward
from opd.types import Prompt, Rollout


def prompt(answer: Any = None, **fields: Any) -> Prompt:
    return Prompt(id=fields.pop("id", 0), content="?", answer=answer, **fields)


def rollout(text: str, answer: Any = None, **fields: Any) -> Rollout:
    ids = torch.tensor([1])
    return Rollout(
        prompt=prompt(answer, **fields),
        sample=0,
        prompt_ids=(0,),
        response_ids=ids,
        trained=ids > 0,
        turn=ids * 0,
        finished=True,
        text=text,
    )


@pytest.fixture
def user_module(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))

    def make(source: str, name: str = "opd_test_rewards") -> str:
        (tmp_path / f"{name}.py").write_text(source)
        return name

    yield make
    sys.modules.pop("opd_test_rewards", None)


# --- built in ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "options", "answer", "text", "value"),
    [
        ("exact", {}, "Paris", " Paris\n", 1),
        ("exact", {}, "Paris", "paris", 0),
        ("exact", {"ignore_case": True}, "Paris", "pARIS", 1),
        ("exact", {}, 4, "4", 1),
        ("regex", {"pattern": r"^\d+$"}, None, "12", 1),
        ("regex", {"pattern": r"^\d+$"}, None, "a 12", 0),
        ("regex", {"pattern": r"answer: (\w+)", "group": 1}, "B", "so, answer: B.", 1),
        ("regex", {"pattern": r"answer: (?P<letter>\w+)", "group": "letter"}, "B", "answer: C", 0),
        ("regex", {"pattern": r"answer: (\w+)", "group": 1}, "B", "B", 0),
        ("regex", {"pattern": r"a(b)?", "group": 1}, "b", "a", 0),
        ("max_words", {"n": 2}, None, "two words", 1),
        ("max_words", {"n": 2}, None, "now three words", 0),
        ("max_words", {"n": 2}, None, " \n", 0),
    ],
)
def test_text_rewards(name, options, answer, text, value):
    assert load_reward(name, options)(prompt(answer), text) == value


@pytest.mark.parametrize(
    ("answer", "text", "value"),
    [
        ("18", "9 + 9 makes **18**.", 1),
        ("18", "18 and then 19", 0),
        ("18", "eighteen", 0),
        ("They sell 2.\n#### 1,234", "$1234.00 in all", 1),
        (1234567, "1,234,567", 1),
        (0.5, "about .50", 1),
        ("-5", "it is -5", 1),
        ("-5", "it is \N{MINUS SIGN}5", 1),
        ("-5", "a loss of -$5", 1),
        ("5", "10-5", 1),
        ("-5", "10-5", 0),
        ("3", "1,2,3", 1),
        ("1200", "1.2e3", 1),
        ("50", "50%", 1),
        ("0.1", "0.10000000000000001", 0),
    ],
)
def test_final_number(answer, text, value):
    assert load_reward("final_number", {})(prompt(answer), text) == value


@pytest.mark.parametrize(
    ("answer", "text", "value"),
    [
        ("1/2", "The answer is $\\frac{1}{2}$.", 1),
        ("\\frac{1}{2}", "so \\boxed{0.5}", 1),
        ("$x^2 + 1$", "we get \\boxed{1 + x^2}", 1),
        (18, "The answer is 18", 1),
        ("18", "The answer is 19", 0),
        ("18", "no idea", 0),
    ],
)
def test_math_verify(answer, text, value):
    pytest.importorskip("math_verify")
    assert load_reward("math_verify", {})(prompt(answer), text) == value


def test_math_verify_works_in_another_thread():
    pytest.importorskip("math_verify")
    reward, results = load_reward("math_verify", {}), []
    thread = threading.Thread(target=lambda: results.append(score(reward, [rollout("\\boxed{4}", "2 + 2")])))
    thread.start()
    thread.join()
    assert results == [[1.0]]


def test_reasoning_gym_scores_with_the_rows_own_task():
    pytest.importorskip("reasoning_gym")
    tasks = [load_prompts(DataSection(path=f"reasoning_gym:{task}", limit=3)) for task in ("chain_sum", "leg_counting")]
    whole, tagged = load_reward("reasoning_gym", {}), load_reward("reasoning_gym", {"tag": "answer"})
    for row in [row for rows in tasks for row in rows]:
        assert whole(row, f" {row.answer}\n") == 1.0
        assert whole(row, "no number") < 0.5
        assert tagged(row, f"<answer>0</answer> or rather <answer>{row.answer}</answer>") == 1.0
        assert tagged(row, row.answer) == 0.0


def test_reasoning_gym_scores_with_the_rows_own_options():
    pytest.importorskip("reasoning_gym")
    reward = load_reward("reasoning_gym", {})
    narrow = {"size": 1, "min_value": 1, "max_value": 6}
    [row] = load_prompts(DataSection(path="reasoning_gym:puzzle24", options=narrow))
    assert reward(row, row.answer) == 1.0
    origin = row.metadata["reasoning_gym"]
    strict = {**origin, "options": {"size": 1, "min_value": 9, "max_value": 9}}
    assert reward(prompt(row.answer, metadata={"reasoning_gym": strict}), row.answer) < 1.0


def test_reasoning_gym_answer_that_the_scorer_cannot_read():
    pytest.importorskip("reasoning_gym")
    [row] = load_prompts(DataSection(path="reasoning_gym:prime_factorization", limit=1))
    with pytest.raises(ValueError, match="invalid literal"):
        load_reward("reasoning_gym", {})(row, "two and two")
    assert load_reward("reasoning_gym", {"malformed": 0.0})(row, "two and two") == 0.0


def test_rewards_declare_the_columns_they_read():
    assert columns_of(load_reward("exact", {})) == {"answer"}
    assert columns_of(load_reward("final_number", {})) == {"answer"}
    assert columns_of(load_reward("max_words", {"n": 1})) == set()
    assert columns_of(load_reward("regex", {"pattern": "a"})) == set()
    assert columns_of(load_reward("regex", {"pattern": "(a)", "group": 1})) == {"answer"}


def test_a_users_function_with_and_without_options(user_module):
    name = user_module(
        "def plain(prompt, response):\n    return response == prompt.answer\n"
        "def scaled(prompt, response, *, factor):\n    return factor * len(response)\n"
    )
    assert score(load_reward(f"{name}:plain", {}), [rollout("a", "a"), rollout("b", "a")]) == [1.0, 0.0]
    assert score(load_reward(f"{name}:scaled", {"factor": 0.5}), [rollout("abc")]) == [1.5]


# --- what mistakes are told ----------------------------------------------------------------------------------------


def test_unknown_name():
    with pytest.raises(ConfigError) as caught:
        load_reward("final_numbr", {})
    assert "There is no reward 'final_numbr'. Did you mean 'final_number'?" in str(caught.value)
    assert all(name in str(caught.value) for name in REWARDS)
    assert "my_package.mine:function" in str(caught.value)


def test_unknown_and_missing_options(user_module):
    with pytest.raises(
        ConfigError, match=r"'exact' cannot .*\['ignorecase'\].*Did you mean 'ignore_case'.*: ignore_case"
    ):
        load_reward("exact", {"ignorecase": True})
    with pytest.raises(ConfigError, match=r"'max_words' cannot be called .*missing a required argument: 'n'"):
        load_reward("max_words", {})
    with pytest.raises(ConfigError, match=r"'final_number' .*Its options: none"):
        load_reward("final_number", {"n": 1})
    name = user_module(
        "def mine(prompt, response, *, factor=1):\n    return factor\ndef short(prompt):\n    return 1\n"
    )
    with pytest.raises(ConfigError, match=r"'opd_test_rewards:mine' .*Did you mean 'factor'"):
        load_reward(f"{name}:mine", {"factr": 2})
    with pytest.raises(ConfigError, match=r"'opd_test_rewards:short' .*too many positional arguments"):
        load_reward(f"{name}:short", {})
    with pytest.raises(ConfigError, match="'absent' does not exist in 'opd_test_rewards'"):
        load_reward(f"{name}:absent", {})


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("regex", {"pattern": "("}, r"got the pattern '\(', which does not compile"),
        ("regex", {"pattern": 3}, "got the pattern 3, which does not compile"),
        ("regex", {"pattern": "(?P<a>b)", "group": 2}, r"got `group: 2`, and the pattern .* has only \[0, 1, 'a'\]"),
        ("max_words", {"n": 0}, "got `n: 0`. Give a number of words, at least 1"),
        ("max_words", {"n": "ten"}, "got `n: 'ten'`"),
        ("math_verify", {"timeout_s": 0.5}, "got `timeout_s: 0.5`. Give whole seconds"),
    ],
)
def test_wrong_option_values(name, options, message):
    with pytest.raises(ConfigError, match=message):
        load_reward(name, options)


@pytest.mark.parametrize(("name", "extra"), [("math_verify", "math"), ("reasoning_gym", "gym")])
def test_package_that_is_not_installed(monkeypatch, name, extra):
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ConfigError, match=rf"{name} is not installed .*pip install 'opd\[{extra}\]'"):
        load_reward(name, {})


def test_answers_that_cannot_be_compared():
    with pytest.raises(DataError, match="Prompt 4 has no `answer`, which this reward compares with"):
        load_reward("exact", {})(prompt(id=4), "a")
    with pytest.raises(DataError, match="The answer 'none' of prompt 0 holds no number"):
        load_reward("final_number", {})(prompt("none"), "1")
    pytest.importorskip("math_verify")
    with pytest.raises(DataError, match="math-verify finds no expression in the answer '' of prompt 0"):
        load_reward("math_verify", {})(prompt(""), "1")
    pytest.importorskip("reasoning_gym")
    with pytest.raises(
        DataError, match=r"Prompt 0 is not a reasoning-gym row. Use data with `path: reasoning_gym:TASK`"
    ):
        load_reward("reasoning_gym", {})(prompt("1"), "1")


def test_reward_that_raises(user_module):
    name = user_module("def bad(prompt, response):\n    return {}[response]\n")
    with pytest.raises(TrainingError) as caught:
        score(load_reward(f"{name}:bad", {}), [rollout("x" * 300, id=12)])
    message = str(caught.value)
    assert "The reward 'opd_test_rewards:bad' raised KeyError on prompt 12" in message
    assert "x" * 200 in message.split(": ")[0]
    assert "x" * 201 not in message.split(": ")[0]
    assert isinstance(caught.value.__cause__, KeyError)


def test_built_in_reward_that_raises_is_told_the_same_way():
    with pytest.raises(
        TrainingError, match="'exact' raised DataError on prompt 5, response 'hi': Prompt 5 has no `answer`"
    ):
        score(load_reward("exact", {}), [rollout("hi", id=5)])


@pytest.mark.parametrize("value", [None, "1", float("nan"), float("inf"), 1j, [1.0], np.float32("nan")])
def test_reward_that_is_no_finite_number(value):
    def mine(prompt, response):
        return value

    with pytest.raises(
        TrainingError, match=r"The reward 'mine' returned .* on prompt 3, response 'hi'. Return a finite"
    ):
        score(mine, [rollout("hi", id=3)])


@pytest.mark.parametrize("value", [1, True, 1.0, np.float32(1), np.int64(1), np.bool_(True)])
def test_rewards_of_any_number_type_become_floats(value):
    [result] = score(lambda prompt, response: value, [rollout("hi")])
    assert type(result) is float
    assert result == 1.0
