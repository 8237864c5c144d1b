"""A teacher with the student's weights: refused where the loss would be 0, noted elsewhere."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path
from typing import Any

import pytest
from support.models import LETTERS, build, tiny

import opd
from opd import methods
from opd.commands.check import check_recipe
from opd.errors import ConfigError
from opd.methods import METHODS
from opd.models.new import character_tokenizer
from opd.recipe.load import parse_recipe
from opd.runs.same_model import SELF_TAUGHT

SAME = r"the teacher 'big' has the weights of the student 'small', and reads the same prompt, so every loss .* 0"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tokenizer = character_tokenizer(LETTERS)
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}{{ style }}"
    build("llama", tokenizer).save_pretrained(tmp_path / "model")  # type: ignore[operator]
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "rows.jsonl").write_text('{"prompt": "abc"}\n{"prompt": "gh"}\n')
    return tmp_path / "model"


def recipe_of(folder: Path, small: dict[str, Any], big: dict[str, Any], **stage: Any) -> Any:
    one = {
        "name": "distil",
        "train": "small",
        "teacher": "big",
        "method": "reverse_kl",
        "steps": 1,
        "data": {"path": str(folder.parent / "rows.jsonl")},
        "sampling": {"max_completion_length": 2},
        **stage,
    }
    stages = stage.get("stages", [one])
    whole = {"name": "r", "output_dir": str(folder.parent / "run"), "models": {"small": small, "big": big}}
    return parse_recipe({**whole, "stages": stages})


def test_check_refuses_teacher_with_students_weights(folder: Path):
    link = folder.parent / "link"
    link.symlink_to(folder)
    path = {"path": str(folder)}
    for small, big in (
        (path, path),
        (path, {"path": f"{folder.parent}/./model"}),
        ({"path": str(link), "lora": {"rank": 2}}, {**path, "dtype": "bfloat16"}),
    ):
        with pytest.raises(ConfigError, match=SAME):
            check_recipe(recipe_of(folder, small, big))


def test_check_refuses_weights_that_lack_tensors(folder: Path):
    """Of teachers and students alike, before any weight is loaded."""
    config = folder / "config.json"
    config.write_text(config.read_text().replace('"num_hidden_layers": 2', '"num_hidden_layers": 3'))
    made = {
        "init": {"model_type": "llama", "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2},
        "tokenizer": {"characters": LETTERS},
    }
    for small, big in (({"path": str(folder)}, made), (made, {"path": str(folder)})):
        with pytest.raises(ConfigError, match=r"the weights lack 9 tensors of the model \(model\.layers\.2\."):
            check_recipe(recipe_of(folder, small, big))


def test_check_refuses_equal_new_models(folder: Path):
    made = {
        "init": {"model_type": "llama", "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2},
        "tokenizer": {"characters": LETTERS},
        "seed": 3,
    }
    with pytest.raises(ConfigError, match=SAME):
        check_recipe(recipe_of(folder, made, made))
    check_recipe(recipe_of(folder, made, {**made, "seed": 4}))


def test_check_refuses_stage_model_as_its_own_teacher(folder: Path):
    first = {"name": "first", "train": "small", "method": "sft", "steps": 1, "sampling": {"max_completion_length": 2}}
    data = {"data": {"path": str(folder.parent / "sft.jsonl")}}
    (folder.parent / "sft.jsonl").write_text('{"prompt": "abc", "response": "gh"}\n')
    second = {**first, "name": "second", "teacher": "big", "method": "reverse_kl"}
    stages = [{**first, **data}, {**second, **data}]
    with pytest.raises(ConfigError, match=SAME):
        check_recipe(recipe_of(folder, {"path": str(folder)}, {"from_stage": "first"}, stages=stages))
    check_recipe(recipe_of(folder, {"path": str(folder)}, {"path": str(folder)}, stages=stages))  # trained since


def test_run_refuses_copy_of_students_weights(folder: Path):
    """In another folder the weights are seen to be equal when they are loaded; other templates show other prompts."""
    twin = folder.parent / "twin"
    shutil.copytree(folder, twin)
    with pytest.raises(ConfigError, match=SAME):
        opd.run(recipe_of(folder, {"path": str(folder)}, {"path": str(twin)}), quiet=True)
    (twin / "chat_template.jinja").write_text("{% for m in messages %}ab{{ m.content }}{% endfor %}")
    chat = {"data": {"path": str(folder.parent / "rows.jsonl"), "chat": True}}
    made = recipe_of(folder, {"path": str(folder)}, {"path": str(twin)}, **chat)
    shutil.rmtree(made.folder)
    run = opd.run(made, quiet=True)
    assert run.metrics[0]["train/loss"] > 1e-6


def test_check_notes_same_weights_with_another_prompt(folder: Path):
    chat = {"data": {"path": str(folder.parent / "rows.jsonl"), "chat": True}}
    big = {"path": str(folder), "template_options": {"style": "ab"}}
    lines = check_recipe(recipe_of(folder, {"path": str(folder)}, big, **chat))
    assert "  teacher big has the weights of the student small when the stage begins" in lines


def test_distill_refuses_students_object_as_teacher(tmp_path: Path):
    lm = tiny()
    given: dict[str, Any] = {
        "student": lm.model,
        "tokenizer": lm.tokenizer,
        "prompts": ["ab"],
        "steps": 1,
        "sampling": {"max_completion_length": 2},
        "quiet": True,
    }
    with pytest.raises(ConfigError, match="it is the same Python object, which training changes"):
        opd.distill(teacher=lm.model, output_dir=tmp_path / "one", **given)
    with pytest.raises(ConfigError, match="has the weights of the student 'student', and reads the same prompt"):
        opd.distill(teacher=copy.deepcopy(lm.model), output_dir=tmp_path / "two", **given)
    opd.distill(teacher=tiny(seed=1).model, output_dir=tmp_path / "three", **given)


def test_self_taught_names_methods_that_teach_themselves():
    options = {"context_distillation": {"system": "Be brief."}}
    kinds = {name: methods.build(name, options.get(name, {})).teacher.kind for name in METHODS}
    assert {name for name, kind in kinds.items() if kind.startswith("self")} == set(SELF_TAUGHT)
