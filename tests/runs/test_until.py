"""`evaluate.until`: a stage ends with the evaluation in which its held-out reward, or another metric, is reached."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from support.runs import EVALUATE, Forks, Strike, assert_same, command, one_stage, prepare, sums, write_rows

import opd
from opd.evaluation.goals import not_measured
from opd.stage.exams import Exams

LENGTH = "tests_lengths:length"  # of a response: three tokens unless it ends


def recipe(**evaluate: Any) -> dict[str, Any]:
    """Steps 1 to 8, measured after every third; the reward of a response is its number of tokens, at most 3."""
    return one_stage(
        steps=8,
        optimizer={"schedule": "constant"},
        checkpoint={"every": 2},
        evaluate={**EVALUATE, "every": 3, "reward": {"name": LENGTH}, "teacher": False, "kl": False, **evaluate},
    )


def prepared(folder: Path, made: dict[str, Any]) -> Path:
    prepare(folder, made)
    (folder / "tests_lengths.py").write_text("def length(prompt, text):\n    return float(len(text))\n")
    return folder


def ran(folder: Path, made: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The rows of the run's metrics."""
    monkeypatch.chdir(prepared(folder, made))
    monkeypatch.syspath_prepend(folder)
    opd.run("recipe.yaml", quiet=True)
    return [json.loads(line) for line in (folder / "run/distil/metrics.jsonl").read_text().splitlines()]


def evaluated(rows: list[dict[str, Any]]) -> list[int]:
    return [row["step"] for row in rows if any(key.startswith("eval/") for key in row)]


def test_stage_ends_with_the_evaluation_that_reaches_it(tmp_path, monkeypatch):
    rows = ran(tmp_path, recipe(until={"greedy": 0.0, "drawn": 0.0}), monkeypatch)
    assert evaluated(rows) == [0, 3], "not before the first step"
    assert max(row["step"] for row in rows) == 3
    assert (tmp_path / "run/distil/done.json").exists()
    assert (tmp_path / "run/distil/model/model.safetensors").exists()


@pytest.mark.parametrize("until", [{"greedy": 0.0, "drawn": 99.0}, {}])
def test_stage_goes_on_until_all_settings_reach_it(tmp_path, monkeypatch, until):
    assert evaluated(ran(tmp_path, recipe(until=until), monkeypatch)) == [0, 3, 6, 8]


@pytest.mark.parametrize(
    ("goals", "measured", "reached"),
    [
        ({"a": 0.7}, {"a": 0.7}, True),
        ({"a": 0.7}, {"a": 0.6999}, False),
        ({"a": 0.7, "b": 0.1}, {"a": 0.9, "b": 0.05}, False),
        ({"a": 0.7, "b": 0.1}, {"a": 0.9}, False),  # b was not measured
        ({"a": 0.7}, {"a": float("nan")}, False),
        ({}, {"a": 1.0}, False),
    ],
)
def test_every_goal_has_to_be_reached(goals, measured, reached):
    exam = SimpleNamespace(prefix="eval/t/", until={name: {"reward": goal} for name, goal in goals.items()})
    exams: Any = SimpleNamespace(exams=[exam])
    exams.goals = Exams.goals.fget(exams)  # type: ignore[attr-defined]
    assert list(exams.goals) == [f"eval/t/{name}/reward" for name in goals]
    assert Exams.reached(exams, {f"eval/t/{name}/reward": value for name, value in measured.items()}) == reached


GAME = """
from opd.environments.protocol import Environment, Observation


class Game(Environment):
    rewards = True

    def act(self, state, turn):
        return Observation(done=True, reward=0.0, counts={"won": 1.0})


def game():
    return Game()
"""


def talked(folder: Path, monkeypatch: pytest.MonkeyPatch, *rest: str, **evaluate: Any) -> tuple[int, str]:
    """The exit status and output of a run whose conversations end, with the reward 0, when the student ends a turn."""
    made = recipe(reward=None, **evaluate)
    made["stages"][0] |= {"environment": {"name": "tests_game:game", "max_turns": 1}}
    monkeypatch.chdir(prepared(folder, made))
    monkeypatch.syspath_prepend(folder)
    (folder / "tests_game.py").write_text(GAME)
    ended = command("train", "recipe.yaml", *rest)
    return ended.code, ended.out + ended.err


def test_goal_may_be_another_metric_than_the_reward(tmp_path, monkeypatch):
    code, said = talked(tmp_path, monkeypatch, until={"drawn": {"environment/won": 0.01}})
    assert code == 0, said
    assert "distil: ends after step 3 of 8, at its goal: eval/drawn/environment/won" in said
    # The reward of these conversations is 0.
    assert "eval/drawn/reward 0 of 0.01" in talked(tmp_path, monkeypatch, "output_dir=b", until={"drawn": 0.01})[1]


def test_first_evaluation_refuses_a_goal_that_it_has_not(tmp_path, monkeypatch):
    until = {"drawn": {"environment/on": 0.01}}
    code, said = talked(tmp_path, monkeypatch, until=until, before=False)
    assert code == 2
    assert "evaluate.until.drawn names 'environment/on', and the evaluation has no such number." in said
    assert "environment/won" in said
    rows = [json.loads(line) for line in (tmp_path / "run/distil/metrics.jsonl").read_text().splitlines()]
    assert max(row["step"] for row in rows) == 3
    code, said = talked(tmp_path / "b", monkeypatch, until={"drawn": {"pass@2": 0.0}}, pass_at=[2])
    assert code == 0, said  # rewards of 0: a pass@2 of 0


@pytest.mark.parametrize(
    ("metrics", "missing"),
    [
        ({"reward": 0.5, "environment/done": 0.5}, "environment/won"),
        ({"reward": 0.5, "environment/done": 0.5, "environment/won": 0.0}, "pass@2"),
        ({"reward": 0.5, "environment/done": 0.0, "pass@2": 0.5}, None),  # no conversation came to the environment
        ({"environment/heard_tokens": 2.0, "environment/won": 0.0}, None),  # no response has a reward
    ],
)
def test_missing_numbers_that_may_still_come_are_no_error(metrics, missing):
    assert not_measured({"environment/won": 0.5, "pass@2": 0.5}, metrics) == missing


def test_model_is_that_of_the_step(tmp_path, monkeypatch):
    ran(tmp_path / "a", recipe(until={"drawn": 0.0}), monkeypatch)
    short = recipe()
    short["stages"][0]["steps"] = 3
    ran(tmp_path / "b", short, monkeypatch)
    files = [tmp_path / one / "run/distil/model/model.safetensors" for one in "ab"]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_run_says_how_it_ended(tmp_path, monkeypatch):
    monkeypatch.chdir(prepared(tmp_path, recipe(until={"drawn": 0.0})))
    monkeypatch.syspath_prepend(tmp_path)
    said = command("train", "recipe.yaml")
    assert "distil: ends after step 3 of 8, at its goal: eval/drawn/reward" in said.out + said.err
    again = command("train", "recipe.yaml", "output_dir=other", "stages.distil.evaluate.until.drawn=99")
    assert "distil: its goal was not reached: eval/drawn/reward" in again.out + again.err


def test_tasks_that_are_not_due_are_measured_at_the_end(tmp_path, monkeypatch):
    held = {**EVALUATE, "teacher": False, "kl": False}
    one = {"data": {"path": "train.jsonl"}, "teacher": "teacher"}
    tasks = {
        "a": {**one, "evaluate": {**held, "every": 2, "until": {"drawn": 0.0}}},
        "b": {**one, "evaluate": {**held, "every": 5, "data": {"path": "other.jsonl"}}},
    }
    write_rows(tmp_path / "other.jsonl", sums(17, 3))
    rows = ran(tmp_path, one_stage(tasks=tasks, data=None, teacher=None, steps=8), monkeypatch)
    assert evaluated(rows) == [0, 2]
    last = next(row for row in rows if row["step"] == 2 and "eval/a/drawn/reward" in row)
    assert last["eval/b/greedy/responses"] == 3


@pytest.mark.parametrize(
    "strike",
    [
        Strike(call="opd.stage.stage.Stage._end_at_goal", when="before"),  # measured, without a checkpoint of the step
        Strike(call="opd.stage.stage.Stage._end_at_goal", when="after"),  # with it
        Strike(call="opd.runs.stages.finish", when="before"),
    ],
)
def test_killed_at_its_end_and_resumed_is_equal(tmp_path, forks: Forks, strike: Strike):
    made = recipe(until={"drawn": 0.0})
    whole, cut = prepared(tmp_path / "whole", made), prepared(tmp_path / "cut", made)
    assert forks.start(whole, "train", "recipe.yaml").code == 0
    assert forks.start(cut, "train", "recipe.yaml", strike=strike).code == -signal.SIGKILL
    ended = forks.start(cut, "train", "recipe.yaml")
    assert ended.code == 0, ended.err
    assert_same(whole / "run", cut / "run")


def test_two_processes_end_at_the_same_step(tmp_path, forks: Forks):
    folder = prepared(tmp_path / "two", recipe(until={"drawn": 0.0}))
    ended = forks.start(folder, "train", "recipe.yaml", processes=2)
    assert ended.code == 0, ended.err
    rows = [json.loads(line) for line in (folder / "run/distil/metrics.jsonl").read_text().splitlines()]
    assert evaluated(rows) == [0, 3]
    assert (folder / "run/distil/done.json").exists()


@pytest.mark.parametrize(
    ("evaluate", "said"),
    [
        ({"until": {"greedy": 1.0}, "every": 0}, "evaluate.every is 0"),
        ({"until": {"gredy": 1.0}}, "names 'gredy', and evaluate.sampling has no such setting. Did you mean 'greedy'?"),
        (
            {"until": {"greedy": 1.0}, "reward": None},
            "evaluate.until has a goal of 'reward', and the held-out responses have no reward",
        ),
        ({"until": {"greedy": {"pass@2": 1.0}}}, "names 'pass@2', and this setting samples 1 responses per prompt"),
        ({"until": {"drawn": {"pass@2": 1.0}}}, "evaluate.pass_at [1]. Add its k to evaluate.pass_at"),
        ({"until": {"greedy": {"rewad": 1.0}}}, "which an evaluation does not have. Did you mean 'reward'?"),
        ({"until": {"greedy": {"environment/won": 1.0}}}, "the responses are no conversations with an environment"),
        ({"until": {"greedy": {"cut_share": 0.1}}}, "of which less is better"),
        ({"until": {"greedy": {}}}, "until"),
        ({"until": {"greedy": "high"}}, "until"),
    ],
)
def test_goals_without_sense_are_refused(tmp_path, monkeypatch, evaluate, said):
    monkeypatch.chdir(prepared(tmp_path, recipe(**evaluate)))
    monkeypatch.syspath_prepend(tmp_path)
    ended = command("check", "recipe.yaml")
    assert ended.code == 2
    assert said in ended.err
