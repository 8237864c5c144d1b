"""What each reward pays for, and what each mistake is told."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.rollouts import text_rollout

from opd.data.prompts import load_prompts
from opd.environments.reward import with_environment
from opd.errors import ConfigError, DataError, TrainingError
from opd.pieces.needs import needing
from opd.recipe.schema import DataSection
from opd.rewards.base import FunctionReward, RewardFn, StageRewards, unfit_to_measure, unscored_answers, watched
from opd.rewards.registry import REWARDS, as_reward, load_reward
from opd.types import Prompt, Reward, Rollout


def prompt(answer: Any = None, **fields: Any) -> Prompt:
    return Prompt(id=fields.pop("id", 0), content="?", answer=answer, **fields)


def rollout(text: str, answer: Any = None, **fields: Any) -> Rollout:
    return text_rollout(text, prompt(answer, **fields))


def function_of(name: str, options: dict[str, Any]) -> RewardFn:
    reward = load_reward(name, options)
    assert isinstance(reward, FunctionReward)
    return reward.function


def values_of(reward: Reward, rollouts: list[Rollout]) -> list[float | None]:
    return [one.reward for one in reward(rollouts)]


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
def test_text_rewards_give_expected_values(name, options, answer, text, value):
    assert function_of(name, options)(prompt(answer), text) == value


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
def test_final_number_compares_last_number(answer, text, value):
    assert function_of("final_number", {})(prompt(answer), text) == value


def test_reasoning_gym_scores_with_task_of_row():
    pytest.importorskip("reasoning_gym")
    tasks = [load_prompts(DataSection(path=f"reasoning_gym:{task}", limit=3)) for task in ("chain_sum", "leg_counting")]
    whole, tagged = function_of("reasoning_gym", {}), function_of("reasoning_gym", {"tag": "answer"})
    for row in [row for rows in tasks for row in rows]:
        assert whole(row, f" {row.answer}\n") == 1.0
        assert whole(row, "no number") < 0.5
        assert tagged(row, f"<answer>0</answer> or rather <answer>{row.answer}</answer>") == 1.0
        assert tagged(row, row.answer) == 0.0


def test_reasoning_gym_scores_with_options_of_row():
    pytest.importorskip("reasoning_gym")
    reward = function_of("reasoning_gym", {})
    narrow = {"size": 1, "min_value": 1, "max_value": 6}
    [row] = load_prompts(DataSection(path="reasoning_gym:puzzle24", options=narrow))
    assert reward(row, row.answer) == 1.0
    origin = row.metadata["reasoning_gym"]
    strict = {**origin, "options": {"size": 1, "min_value": 9, "max_value": 9}}
    assert reward(prompt(row.answer, metadata={"reasoning_gym": strict}), row.answer) < 1.0


def test_reasoning_gym_gives_malformed_when_answer_is_unreadable():
    pytest.importorskip("reasoning_gym")
    [row] = load_prompts(DataSection(path="reasoning_gym:prime_factorization", limit=1))
    with pytest.raises(ValueError, match="invalid literal"):
        function_of("reasoning_gym", {})(row, "two and two")
    assert function_of("reasoning_gym", {"malformed": 0.0})(row, "two and two") == 0.0


def test_reasoning_gym_counts_full_scores_alone():
    pytest.importorskip("reasoning_gym")
    rows = load_prompts(DataSection(path="reasoning_gym:gcd", limit=40))
    row = next(row for row in rows if row.answer == "2")
    assert function_of("reasoning_gym", {})(row, "12") == 0.5
    full = function_of("reasoning_gym", {"full_only": True})
    assert [full(row, text) for text in ("2", "12", "The answer is 2")] == [1.0, 0.0, 0.0]


def test_load_reward_declares_columns():
    assert load_reward("exact", {}).needs == {"answer"}
    assert load_reward("final_number", {}).needs == {"answer"}
    assert load_reward("max_words", {"n": 1}).needs == set()
    assert load_reward("regex", {"pattern": "a"}).needs == set()
    assert load_reward("regex", {"pattern": "(a)", "group": 1}).needs == {"answer"}


def test_load_reward_takes_user_function(user_module):
    name = user_module(
        "def plain(prompt, response):\n    return response == prompt.answer\n"
        "def scaled(prompt, response, *, factor):\n    return factor * len(response)\n"
    )
    assert values_of(load_reward(f"{name}:plain", {}), [rollout("a", "a"), rollout("b", "a")]) == [1.0, 0.0]
    assert values_of(load_reward(f"{name}:scaled", {"factor": 0.5}), [rollout("abc")]) == [1.5]


LONGEST = """
from dataclasses import replace


class Longest:
    needs, asks, comparable = frozenset({"answer"}), {}, False

    def __init__(self, factor=1.0):
        self.name, self.factor = "longest", factor

    def __call__(self, rollouts):
        longest = max((len(rollout.text) for rollout in rollouts), default=0)
        return [replace(one, reward=self.factor * (len(one.text) == longest)) for one in rollouts]

    def for_stage(self, models, origins, folder, rank):
        return self

    def check_failures(self, rollouts, gather):
        pass

    def pop_requests(self):
        return {}


def made(factor):
    return Longest(factor)


def function_made(factor):
    return lambda prompt, text: factor * len(text)


halved = Longest(0.5)
"""


def test_load_reward_takes_user_reward(user_module):
    name = user_module(LONGEST)
    rollouts = [rollout("a"), rollout("abc")]
    for reward, values in (
        (load_reward(f"{name}:Longest", {}), [0.0, 1.0]),
        (load_reward(f"{name}:Longest", {"factor": 2.0}), [0.0, 2.0]),
        (load_reward(f"{name}:made", {"factor": 3.0}), [0.0, 3.0]),
        (load_reward(f"{name}:halved", {}), [0.0, 0.5]),
        (load_reward(f"{name}:function_made", {"factor": 2.0}), [2.0, 6.0]),
    ):
        assert isinstance(reward, Reward)
        assert values_of(reward, rollouts) == values
    assert load_reward(f"{name}:halved", {}).needs == {"answer"}
    assert load_reward(f"{name}:function_made", {"factor": 2.0}).name == f"{name}:function_made"
    with pytest.raises(ConfigError, match=r":halved' is a Reward object, which takes no options, got \['factor'\]"):
        load_reward(f"{name}:halved", {"factor": 1.0})
    with pytest.raises(ConfigError, match=r":Longest' cannot be called .*\['factr'\].* Did you mean 'factor'"):
        load_reward(f"{name}:Longest", {"factr": 1.0})


class Zero(Reward):
    """The smallest Reward of a user."""

    name = "zero"

    def __call__(self, rollouts: Sequence[Rollout]) -> list[Rollout]:
        return [replace(one, reward=0.0) for one in rollouts]


def test_as_reward_keeps_a_reward_and_wraps_a_function():
    zero = Zero()
    assert as_reward(zero) is zero
    assert (zero.needs, dict(zero.asks), zero.comparable, zero.pop_requests()) == (frozenset(), {}, True, {})
    wrapped = as_reward(len_of)
    assert (wrapped.name, wrapped.comparable, dict(wrapped.asks)) == ("len_of", True, {})
    assert wrapped.for_stage({}, {}, Path("nowhere"), 0) is wrapped
    assert values_of(wrapped, [rollout("abc")]) == [3.0]
    assert as_reward(needing(len_of, columns=["answer"])).needs == {"answer"}


def len_of(prompt: Prompt, text: str) -> float:
    return len(text)


def test_stage_rewards_route_rollouts_by_task():
    stage = StageRewards(by_task={"a": as_reward(len_of), "b": None, "c": Zero()})
    rows = [rollout(text, task=task) for task, text in (("c", "xy"), ("a", "xyz"), ("b", "x"), ("a", ""))]
    assert [one.reward for one in stage(rows)] == [0.0, 3.0, None, 0.0]
    assert [one.text for one in stage(rows)] == [one.text for one in rows]
    assert stage.pop_requests() == {}


def test_unfit_to_measure_gives_reason():
    assert unfit_to_measure(Zero()) is None
    relative, asking = Zero(), Zero()
    relative.comparable, asking.asks = False, {"judge": None}
    assert "cannot be compared" in str(unfit_to_measure(relative))
    assert "needs judges" in str(unfit_to_measure(asking))


def test_unscored_answers_counts_rows_without_a_reader():
    rows = [prompt("1"), prompt(None), prompt("2")]
    words, exact = load_reward("max_words", {"n": 1}), load_reward("exact", {})
    assert unscored_answers(rows, frozenset(), None, words) == 2
    assert unscored_answers(rows, frozenset({"answer"}), words) == 0
    assert unscored_answers(rows, frozenset(), words, exact) == 0
    assert unscored_answers(rows, frozenset(), as_reward(len_of)) == 0  # it may read any column
    assert unscored_answers(rows, frozenset(), Zero()) == 2  # it declares that it reads none
    games = with_environment(None, "game")  # it may read any column, also where it is only shown
    assert unscored_answers(rows, frozenset(), games) == unscored_answers(rows, frozenset(), watched(games)) == 0


# --- what mistakes are told ----------------------------------------------------------------------------------------


def test_load_reward_suggests_name_when_unknown():
    with pytest.raises(ConfigError) as caught:
        load_reward("final_numbr", {})
    assert "There is no reward 'final_numbr'. Did you mean 'final_number'?" in str(caught.value)
    assert all(name in str(caught.value) for name in REWARDS)
    assert "my_package.mine:function" in str(caught.value)


def test_load_reward_refuses_unknown_or_missing_options(user_module):
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


class Nearly:
    name, comparable = "nearly", True

    def __call__(self, rollouts: list[Rollout]) -> list[Rollout]:
        return rollouts


@pytest.mark.parametrize(
    ("given", "got"),
    [
        (3, r"is 3 \(int\), which is neither a function \(prompt, text\) -> float nor a Reward\. Give a function, or"),
        (lambda text: 1.0, r"is .*<lambda> .*\(function\), which is neither a function \(prompt, text\)"),
        (Zero, r"is the class Zero, which is neither a function"),
        (
            Nearly(),
            r"is .*\(Nearly\), .*: a Reward also has needs, asks, for_stage, check_failures, pop_requests\.",
        ),
    ],
)
def test_as_reward_refuses_other_objects(given, got):
    with pytest.raises(ConfigError, match=f"^The reward {got}"):
        as_reward(given)


def test_load_reward_refuses_non_reward_from_factory(user_module):
    name = user_module("def mine(factor=1):\n    return {'factor': factor}\n")
    message = r":mine' has only options as parameters, and its result is {'factor': 2} \(dict\), which is"
    with pytest.raises(ConfigError, match=message):
        load_reward(f"{name}:mine", {"factor": 2})


@pytest.mark.parametrize(
    ("returned", "got"),
    [
        (lambda rollouts: [0.5 for _ in rollouts], r"returned 2, of which 2 have no reward, e\.g\. 0\.5 \(float\)"),
        (lambda rollouts: [replace(one, reward=1.0) for one in rollouts[1:]], r"got 2 rollouts and returned 1\."),
        (lambda rollouts: [replace(one, reward=float("nan")) for one in rollouts], "one with reward=nan and"),
        (lambda rollouts: rollouts, "one with reward=None and unjudged=None"),
    ],
)
def test_stage_rewards_refuses_wrong_return_of_reward(returned, got):
    class Wrong(Zero):
        def __call__(self, rollouts: Sequence[Rollout]) -> list[Rollout]:
            return returned(rollouts)

    with pytest.raises(TrainingError, match=rf"The reward 'zero' .*{got}.*A Reward must return the given rollouts"):
        StageRewards(by_task={None: Wrong()})([rollout("a"), rollout("b")])


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("regex", {"pattern": "("}, r"got the pattern '\(', which does not compile"),
        ("regex", {"pattern": 3}, "got the pattern 3, which does not compile"),
        ("regex", {"pattern": "(?P<a>b)", "group": 2}, r"got `group: 2`, but the pattern .* has only \[0, 1, 'a'\]"),
        ("max_words", {"n": 0}, "got `n: 0`. Give a number of words, at least 1"),
        ("max_words", {"n": "ten"}, "got `n: 'ten'`"),
    ],
)
def test_load_reward_refuses_wrong_option_values(name, options, message):
    with pytest.raises(ConfigError, match=message):
        load_reward(name, options)


@pytest.mark.parametrize(("name", "extra"), [("math_verify", "math"), ("reasoning_gym", "gym")])
def test_load_reward_names_extra_when_package_is_missing(monkeypatch, name, extra):
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ConfigError, match=rf"{name} is not installed .*pip install 'opd\[{extra}\]'"):
        load_reward(name, {})


def test_rewards_raise_data_error_when_answer_is_unusable():
    with pytest.raises(DataError, match="Prompt 4 has no `answer`, which this reward compares with"):
        function_of("exact", {})(prompt(id=4), "a")
    with pytest.raises(DataError, match="The answer 'none' of prompt 0 holds no number"):
        function_of("final_number", {})(prompt("none"), "1")
    pytest.importorskip("reasoning_gym")
    with pytest.raises(
        DataError, match=r"Prompt 0 is not a reasoning-gym row. Use data with `path: reasoning_gym:TASK`"
    ):
        function_of("reasoning_gym", {})(prompt("1"), "1")


def test_function_reward_names_prompt_when_function_raises(user_module):
    name = user_module("def bad(prompt, response):\n    return {}[response]\n")
    with pytest.raises(TrainingError) as caught:
        values_of(load_reward(f"{name}:bad", {}), [rollout("x" * 300, id=12)])
    message = str(caught.value)
    assert "The reward 'opd_test_rewards:bad' raised KeyError on prompt 12" in message
    assert "x" * 200 in message.split(": ")[0]
    assert "x" * 201 not in message.split(": ")[0]
    assert isinstance(caught.value.__cause__, KeyError)


def test_function_reward_names_prompt_when_built_in_raises():
    with pytest.raises(
        TrainingError, match="'exact' raised DataError on prompt 5, response 'hi': Prompt 5 has no `answer`"
    ):
        values_of(load_reward("exact", {}), [rollout("hi", id=5)])


@pytest.mark.parametrize("value", [None, "1", float("nan"), float("inf"), 1j, [1.0], np.float32("nan")])
def test_function_reward_refuses_non_finite_values(value):
    def mine(prompt, response):
        return value

    with pytest.raises(
        TrainingError, match=r"The reward 'mine' returned .* on prompt 3, response 'hi'. Return a finite"
    ):
        values_of(as_reward(mine), [rollout("hi", id=3)])


@pytest.mark.parametrize("value", [1, True, 1.0, np.float32(1), np.int64(1), np.bool_(True)])
def test_function_reward_converts_numbers_to_float(value):
    [result] = values_of(as_reward(lambda prompt, response: value), [rollout("hi")])
    assert type(result) is float
    assert result == 1.0
