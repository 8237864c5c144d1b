"""Stages that spend labels: held-out labels, rewards that taught nothing, teachers that no stage has trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from support.runs import command, one_stage, prepare, tiny_model

from opd.commands.check import check_recipe
from opd.errors import ConfigError, DataError
from opd.evaluation.learned import unmoved_reward, warnings_of
from opd.recipe.load import load_recipe
from opd.recipe.schema import Recipe
from opd.runs.same_model import untrained_teachers

GRPO: dict[str, Any] = {
    "method": "grpo",
    "teacher": None,
    "reward": {"name": "final_number"},
    "sampling": {"max_completion_length": 3, "n": 2},
}


def two(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    """Two stages of rewards, `labels` and `more`."""
    recipe = one_stage(**{**GRPO, "name": "labels", **first})
    recipe["stages"] += one_stage(**{**GRPO, "name": "more", **second})["stages"]
    return recipe


def checked(folder: Path, monkeypatch: pytest.MonkeyPatch, recipe: dict[str, Any]) -> Any:
    monkeypatch.chdir(prepare(folder / "work", recipe))
    return check_recipe(load_recipe(Path("recipe.yaml")))


# --- labels that are held out ----------------------------------------------------------------------------------------


def test_apart_from_refuses_shared_prompts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    first = {"data": {"path": "train.jsonl", "limit": 8}}
    second = {"data": {"path": "train.jsonl", "skip": 5}, "apart_from": ["labels"]}
    with pytest.raises(
        DataError, match=r"'more': 3 of its 7 prompts are prompts of stage 'labels' too \(rows 5, 6, 7\)"
    ):
        checked(tmp_path, monkeypatch, two(first, second))


def test_apart_from_compares_words_not_numbers_of_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    first, second = {"data": {"path": "train.jsonl"}}, {"data": {"path": "held_out.jsonl"}, "apart_from": ["labels"]}
    assert checked(tmp_path, monkeypatch, two(first, second))


def test_apart_from_refuses_stage_that_is_not_earlier(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(ConfigError, match=r"names 'label', which is not an earlier stage\. Did you mean 'labels'"):
        checked(tmp_path, monkeypatch, two({}, {"apart_from": ["label"]}))
    with pytest.raises(ConfigError, match=r"names 'more'.*Earlier ones: labels"):
        checked(tmp_path / "own", monkeypatch, two({}, {"apart_from": ["more"]}))


# --- rewards that taught nothing -------------------------------------------------------------------------------------


def row(differs: float, reward: float = 0.0) -> dict[str, float]:
    return {"rollout/reward_differs": differs, "rollout/reward": reward}


def test_unmoved_reward_speaks_when_no_prompt_had_contrast():
    (line,) = unmoved_reward([row(0.0), row(0.0, 0.5)])
    assert "in all 2 steps" in line
    assert "the mean of a step was 0 to 0.5" in line
    assert unmoved_reward([row(0.0), row(0.25)]) == []
    assert unmoved_reward([{"rollout/reward": 0.0}]) == []  # a method that only shows the reward
    assert warnings_of([]) == []


def test_stage_says_that_reward_taught_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    never = {"reward": {"name": "regex", "options": {"pattern": "abc"}}}
    monkeypatch.chdir(prepare(tmp_path / "work", one_stage(**{**GRPO, **never})))
    said = command("train", "recipe.yaml").out
    assert said.count("the reward taught nothing: in all 2 steps") == 2  # at the end of the stage, and in the report


def test_stage_is_silent_when_rewards_differ(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    often = {"reward": {"name": "regex", "options": {"pattern": "^[0-4]"}}, "sampling": {"n": 8}}
    monkeypatch.chdir(prepare(tmp_path / "work", one_stage(**{**GRPO, **often})))
    assert "taught nothing" not in command("train", "recipe.yaml").out


# --- teachers that no stage has trained ------------------------------------------------------------------------------


def recipe_with(teacher: str, **models: Any) -> Recipe:
    stages = [
        {"name": "labels", "train": "expert", "method": "sft", "data": {"path": "x.jsonl"}, "steps": 1},
        {
            "name": "distil",
            "train": "student",
            "teacher": teacher,
            "method": "reverse_kl",
            "data": {"path": "x.jsonl"},
            "steps": 1,
        },
    ]
    made = {"student": tiny_model(2), "expert": {"path": "./big"}, **models}
    return Recipe(name="x", models=made, stages=stages)  # type: ignore[arg-type]


def test_untrained_teachers_names_model_from_same_folder():
    recipe = recipe_with("raw", raw={"path": "./big"})
    (line,) = untrained_teachers(recipe, recipe.stages[1])
    assert "stage labels has trained expert from the same weights" in line
    assert "`from_stage: labels`" in line


@pytest.mark.parametrize(
    ("teacher", "models"),
    [
        ("expert", {}),
        ("other", {"other": {"path": "./other"}}),
        ("grown", {"grown": {"from_stage": "labels"}}),
    ],
)
def test_untrained_teachers_accepts_trained_or_other_models(teacher: str, models: dict[str, Any]):
    recipe = recipe_with(teacher, **models)
    assert untrained_teachers(recipe, recipe.stages[1]) == []
