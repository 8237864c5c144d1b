"""`chat_template` is jinja, or a file of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from opd.errors import ConfigError
from opd.recipe.load import dump, parse_recipe, parse_section
from opd.recipe.schema import ModelSpec

JINJA = "{% for m in messages %}{{ m.content }}\n{% endfor %}"


@pytest.fixture(autouse=True)
def work(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "templates").mkdir()
    (tmp_path / "templates" / "chat.jinja").write_text(JINJA)
    return tmp_path


def spec(template: str | None) -> ModelSpec:
    return parse_section(ModelSpec, {"path": "m", "chat_template": template}, "models.m")


@pytest.mark.parametrize("value", [JINJA, "templates/chat.jinja", "./templates/chat.jinja", None])
def test_chat_template_is_jinja_or_its_file(value):
    assert spec(value).chat_template == (None if value is None else JINJA)


def test_chat_template_reads_absolute_path(work):
    assert spec(str(work / "templates" / "chat.jinja")).chat_template == JINJA


def test_recipe_that_is_written_holds_text_of_template():
    stage = {"name": "s", "train": "m", "method": "sft", "data": {"path": "rows.jsonl"}, "steps": 1}
    raw = {"name": "r", "models": {"m": {"path": "m", "chat_template": "templates/chat.jinja"}}, "stages": [stage]}
    recipe = parse_recipe(raw)
    Path("templates/chat.jinja").unlink()
    assert recipe.models["m"].chat_template == JINJA
    assert "m.content" in dump(recipe)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("templates/chta.jinja", r"`chat_template`: .*no file templates/chta\.jinja\. Did you mean 'chat\.jinja'\?"),
        ("./file.jinja", r"there is no file file\.jinja"),
        ("chatml", r"has no jinja .* and is not a file: give a template, or its file \(got 'chatml'\)"),
        ("<user>\n<assistant>", "has no jinja"),
        ("templates/plain.txt", r"the file templates/plain\.txt has no jinja .*every prompt would be the same"),
    ],
)
def test_chat_template_refuses_missing_file_and_plain_text(value, message):
    Path("templates/plain.txt").write_text("hello")
    with pytest.raises(ConfigError, match=message):
        spec(value)
