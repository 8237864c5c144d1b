"""The JSON schema of a recipe: what it accepts and refuses, its descriptions, and where a recipe names it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from support.runs import command, one_stage, two_stages

from opd.recipe.json_schema import descriptions, recipe_schema, schema_text, sections
from opd.recipe.packaged import SCHEMA
from opd.recipe.schema import ModelSpec, Recipe, RewardSection, StageSpec

ROOT = Path(__file__).parents[2]
RECIPES = sorted([*(ROOT / "recipes").glob("*.yaml"), *(ROOT / "examples").glob("*.yaml")])
VALIDATOR = jsonschema.Draft202012Validator(recipe_schema())


def test_schema_in_the_package_is_generated():
    assert SCHEMA.read_text() == schema_text(), "run `make docs`"
    assert command("schema").out == schema_text()
    jsonschema.Draft202012Validator.check_schema(json.loads(schema_text()))


@pytest.mark.parametrize("section", sections().values(), ids=sections())
def test_descriptions_cover_every_key(section: Any):
    assert descriptions(section).keys() == section.model_fields.keys()
    assert all(len(text) > 4 for text in descriptions(section).values())


def test_descriptions_are_the_comments_of_the_field():
    assert descriptions(ModelSpec)["autocast"] == "bfloat16 compute over float32 weights"
    assert descriptions(ModelSpec)["chat_template"].startswith("Replaces the tokenizer's: jinja")
    assert descriptions(RewardSection)["judge"] == "writes the rubric"  # inherited
    assert descriptions(Recipe)["seed"] == recipe_schema()["properties"]["seed"]["description"]


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("    # Two lines\n    # of one sentence.\n    a: int = 1\n", "Two lines of one sentence"),
        ("    # Above.\n    a: int = 1  # behind, e.g. this.\n", "Above. behind, e.g. this."),
        ("    a: dict = {\n        1: 2,  # one\n        3: 4,  # by line\n    }\n", "one by line"),
        ("    # One. And\n    # another\n    a: int = 1\n", "One. And another."),
        ("    a: str  # flags, e.g. NAME.\n", "flags, e.g. NAME"),
    ],
)
def test_comments_of_several_lines_are_sentences(source: str, said: str):
    from opd.recipe.json_schema import _comments

    assert _comments(f"class Section:\n{source}") == {"a": said}


def test_no_description_is_cut_by_a_line_end():
    """A line ends within a sentence where the next one begins with a small letter."""
    text = descriptions(ModelSpec)["chat_template"]
    assert text.startswith("Replaces the tokenizer's: jinja")
    assert "; " not in text


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_schema_accepts_shipped_recipe_that_names_it(recipe: Path):
    text = recipe.read_text()
    VALIDATOR.validate(yaml.safe_load(text))
    named = text.splitlines()[0].removeprefix("# yaml-language-server: $schema=")
    assert (recipe.parent / named).resolve() == SCHEMA.resolve()
    assert not named.startswith(("/", "http", "file:"))


@pytest.mark.parametrize("recipe", [one_stage(), two_stages()], ids=["one stage", "defaults"])
def test_schema_accepts_recipe_with_defaults(recipe: dict[str, Any]):
    VALIDATOR.validate(recipe)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"stepps": 3}, "'stepps' was unexpected"),
        ({"steps": 0}, "0 is less than the minimum of 1"),
        ({"optimizer": {"learning_rate": 0}}, "0 is less than or equal to the minimum of 0"),
        ({"save": "all"}, "'all' is not one of"),
        ({"sampling": {"top_p": 2}}, "2 is greater than the maximum of 1"),
        ({"reward": {"name": "exact", "option": {}}}, "is not valid under any of the given schemas"),
    ],
)
def test_schema_refuses_wrong_stage(change: dict[str, Any], said: str):
    errors = list(VALIDATOR.iter_errors(one_stage(**change)))
    assert len(errors) == 1
    assert said in errors[0].message
    assert list(errors[0].absolute_path)[:2] == ["stages", 0]


def test_schema_requires_what_no_defaults_can_hold():
    assert [error.message for error in VALIDATOR.iter_errors({"name": "x", "stages": [{}]})] == [
        "'name' is a required property",
        "'models' is a required property",
    ]


def test_schema_has_every_key_of_the_stage_and_of_defaults():
    properties = recipe_schema()["$defs"]["StageSpec"]["properties"]
    assert list(properties) == list(StageSpec.model_fields)
    assert recipe_schema()["properties"]["defaults"]["properties"] is properties
