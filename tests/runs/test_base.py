"""The stage's `base`: what is refused before a weight is loaded, and runs of three models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from support.runs import CHARACTERS, sums, tiny_model

import opd
from opd.commands.check import check_recipe
from opd.errors import AlignmentError, ConfigError, DataError
from opd.models.loading import load_model
from opd.models.new import character_tokenizer
from opd.recipe.load import parse_recipe
from opd.recipe.schema import ModelSpec


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in sums(0, 8)))
    return tmp_path


def recipe_of(folder: Path, models: dict[str, Any] | None = None, **stage: Any) -> dict[str, Any]:
    three = {"student": tiny_model(1), "teacher": tiny_model(2, hidden_size=24), "third": tiny_model(3)}
    one = {
        "name": "distil",
        "train": "student",
        "teacher": "teacher",
        "base": "third",
        "method": "extrapolated_opd",
        "data": {"path": str(folder / "rows.jsonl")},
        "sampling": {"max_completion_length": 4, "n": 2},
        "prompts_per_step": 4,
        "optimizer": {"learning_rate": 1e-2},
        "steps": 3,
        **stage,
    }
    kept = {key: value for key, value in one.items() if value is not None}
    return {"name": "r", "output_dir": str(folder / "run"), "models": three | (models or {}), "stages": [kept]}


def test_run_trains_with_base_and_logs_it(folder: Path):
    run = opd.run(recipe_of(folder), quiet=True)
    rows = [row for row in run.metrics if "train/loss" in row]
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert all("extrapolation/teacher_over_base" in row and "extrapolation/clipped" in row for row in rows)


def test_run_depends_on_base_beyond_teacher_only(folder: Path):
    def losses(name: str, third: int, strength: float) -> list[float]:
        options = {"strength": strength}
        recipe = recipe_of(folder, {"third": tiny_model(third)}, options=options) | {"output_dir": str(folder / name)}
        return [row["train/loss"] for row in opd.run(recipe, quiet=True).metrics if "train/loss" in row]

    assert losses("a", 3, 1.5) != losses("b", 4, 1.5)
    assert losses("c", 3, 1.0) == losses("d", 4, 1.0)


def test_run_takes_tasks_with_one_base(folder: Path):
    data = {"data": {"path": str(folder / "rows.jsonl")}, "sampling": {"max_completion_length": 4}}
    other = {"other": tiny_model(5, hidden_size=24)}
    tasks = {"one": {**data, "teacher": "teacher"}, "two": {**data, "teacher": "other"}}
    recipe = recipe_of(folder, other, tasks=tasks, data=None, teacher=None, sampling=None, task_order="mixed")
    run = opd.run(recipe, quiet=True)
    assert [row["step"] for row in run.metrics if "train/loss" in row] == [1, 2, 3]


def test_lora_student_without_adapter_equals_frozen_copy(folder: Path):
    """The adapter is new, so the model without it is the model as the stage begins."""
    lora = {"student": {**tiny_model(1), "lora": {"rank": 2}}}
    copy = {"third": tiny_model(1)}
    found = []
    for name, base in (("own", "student"), ("copy", "third")):
        recipe = recipe_of(folder, {**lora, **copy}, base=base, options={"strength": 1.5})
        run = opd.run(recipe | {"output_dir": str(folder / name)}, quiet=True)
        found.append([row["train/loss"] for row in run.metrics if "train/loss" in row])
    assert found[0] == pytest.approx(found[1], rel=1e-5)


@pytest.mark.parametrize(
    ("models", "stage", "message"),
    [
        ({}, {"base": None}, r"compares three models, and the stage names no base\. Set its `base`"),
        ({}, {"base": "thrid"}, r"`base: thrid` is not among the models\. Did you mean 'third'"),
        ({}, {"method": "opd"}, r"names the base 'third', which method 'opd' would never read"),
        ({}, {"base": "student"}, r"the base is the model 'student' that the stage trains.*no extrapolation"),
        ({}, {"base": "teacher"}, r"the base 'teacher' has the weights of the teacher 'teacher'"),
        (
            {"third": tiny_model(2, hidden_size=24)},
            {},
            r"the base 'third' has the weights of the teacher 'teacher' and reads the same prompt",
        ),
        ({"third": {"from_stage": "later"}}, {}, r"model 'third' comes from stage 'later', and no such stage"),
    ],
)
def test_check_refuses_base(folder: Path, models: dict[str, Any], stage: dict[str, Any], message: str):
    with pytest.raises(ConfigError, match=message):
        check_recipe(parse_recipe(recipe_of(folder, models, **stage)))


def test_check_refuses_base_with_other_tokens(folder: Path):
    odd = {"third": tiny_model(3, characters=CHARACTERS[::-1])}
    with pytest.raises(AlignmentError, match=r"tokenizers of student .* and third .* differ"):
        check_recipe(parse_recipe(recipe_of(folder, odd)))


def test_check_refuses_response_beyond_positions_of_base(folder: Path):
    short = tiny_model(3)
    short["init"] = {**short["init"], "max_position_embeddings": 6}
    with pytest.raises(DataError, match=r"third .*sampling\.max_completion_length"):
        check_recipe(parse_recipe(recipe_of(folder, {"third": short})))


def loaded(seed: int) -> Any:
    return load_model(ModelSpec(**tiny_model(seed)), name="tiny").model


def distilled(folder: Path, student: Any, **given: Any) -> Any:
    return opd.distill(
        student=student,
        tokenizer=character_tokenizer(CHARACTERS),
        prompts=sums(0, 4),
        method="extrapolated_opd",
        sampling={"max_completion_length": 3},
        steps=2,
        output_dir=folder / "run",
        quiet=True,
        **given,
    )


def test_distill_takes_base_as_model(folder: Path):
    third = loaded(3)
    before = {name: value.clone() for name, value in third.state_dict().items()}
    run = distilled(folder, loaded(1), teacher=loaded(2), base=third)
    assert run.recipe.stages[0].base == "base"
    assert all(torch.equal(value, before[name]) for name, value in third.state_dict().items())


def test_distill_takes_adapted_student_as_base(folder: Path):
    from opd.models.adapters import add_lora

    student = add_lora(loaded(1), rank=2, alpha=4.0, target_modules="all-linear")
    run = distilled(folder, student, teacher=loaded(2), base=student)
    assert run.recipe.stages[0].base == "student"


def test_distill_refuses_base_that_training_changes(folder: Path):
    student, teacher = loaded(1), loaded(2)
    with pytest.raises(ConfigError, match="is the model 'student' that the stage trains"):
        distilled(folder, student, teacher=teacher, base=student)
    with pytest.raises(ConfigError, match="the base 'base' has the weights of the teacher 'teacher'"):
        distilled(folder, student, teacher=teacher, base=teacher)
    with pytest.raises(ConfigError, match="names no base"):
        distilled(folder, student, teacher=teacher)
