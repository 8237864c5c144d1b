"""Names of other trainers: each is accepted, or a message names the key here."""

from __future__ import annotations

import dataclasses
import inspect
import re
from pathlib import Path
from typing import Any

import peft
import pytest
import transformers
from pydantic import BaseModel
from support.runs import one_stage

from opd.errors import ConfigError
from opd.methods import METHODS
from opd.recipe.load import dump, load_recipe, parse_recipe
from opd.recipe.other_names import ACCEPTED, LIBRARIES, ROWS, SECTIONS, Row, markdown
from opd.recipe.schema import ModelSpec, Recipe, StageSpec

ROOT = Path(__file__).parents[2]
VALUES = {"r": 8, "lora_r": 8, "lora_rank": 8, "lora_alpha": 16.0, "max_new_tokens": 7, "stop_words": ["x"], "lr": 0.1}
VALUES |= {"model_name_or_path": "./m", "attn_impl": "eager"}


def model(**spec: Any) -> dict[str, Any]:
    return {"path": "./m", **spec}


def with_section(section: str, **values: Any) -> dict[str, Any]:
    """A recipe with values in the section of this class."""
    recipe = one_stage()
    if section == "Lora":
        recipe["models"]["student"] = model(lora=values)
    elif section == "ModelSpec":
        recipe["models"]["student"] = values if "model_name_or_path" in values else model(**values)
    else:
        recipe["stages"][0][SECTIONS[section]] = values
    return recipe


PAIRS = [(section, name) for section, names in ACCEPTED.items() for name in names]


@pytest.mark.parametrize(("section", "name"), PAIRS, ids=lambda one: one)
def test_accepted_name_means_the_key_here(section: str, name: str):
    key = ACCEPTED[section][name]
    theirs = parse_recipe(with_section(section, **{name: VALUES[name]}))
    ours = with_section(section, **{key: VALUES[name]})
    if name == "model_name_or_path":
        ours["models"]["student"] = model()
    assert theirs == parse_recipe(ours)
    assert not re.search(rf"^\s+{name}:", dump(theirs), re.MULTILINE)


@pytest.mark.parametrize(("section", "name"), PAIRS, ids=lambda one: one)
def test_setting_under_two_names_is_refused(section: str, name: str):
    both = {name: VALUES[name], ACCEPTED[section][name]: VALUES[name]}
    with pytest.raises(ConfigError, match=f"is given under two names, one of them `{name}`: give it once"):
        parse_recipe(with_section(section, **both))


@pytest.mark.parametrize(
    ("given", "read"), [("wandb", ["wandb"]), ("none", []), (["wandb", "trackio"], ["wandb", "trackio"]), ([], [])]
)
def test_report_to_may_be_one_name(given: Any, read: list[str]):
    assert parse_recipe({**one_stage(), "report_to": given}).report_to == read


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_name_in_a_stage_names_the_key_here(row: Row, tmp_path: Path):
    if row.name in StageSpec.model_fields:
        pytest.fail("a key of a stage needs no row")
    file = tmp_path / "recipe.yaml"
    text = f"name: x\nmodels: {{student: {{path: m}}}}\nstages:\n  - name: one\n    {row.name}: 1\n"
    file.write_text(text)
    with pytest.raises(ConfigError) as error:
        load_recipe(file)
    (line,) = [one for one in str(error.value).splitlines() if f"unknown key `stages.0.{row.name}`" in one]
    assert line.startswith("  line 5: ")
    assert row.says in line
    assert row.key is None or f"Here it is `{row.key}`" in line


@pytest.mark.parametrize("row", [row for row in ROWS if row.name not in Recipe.model_fields], ids=lambda row: row.name)
def test_name_at_the_top_names_the_key_here(row: Row):
    with pytest.raises(ConfigError) as error:
        parse_recipe({**one_stage(), row.name: 1})
    assert row.says in str(error.value)


def test_flat_config_lists_the_known_keys_once():
    """A config of TRL is twenty names at the top, and each had the list of a recipe's keys behind it."""
    theirs = {"lmbda": 0.5, "teacher_model_revision": "main", "use_liger_kernel": True, "actor_rollout_ref": {}}
    with pytest.raises(ConfigError) as error:
        parse_recipe({**one_stage(optimizer={"warmup_ratio": 0.1}), **theirs})
    lines = str(error.value).splitlines()
    (section, *top) = lines[1:]
    assert "Known here: name, learning_rate," in section
    assert ["Known here: name, description," in line for line in top] == [False, False, False, True]
    assert top[2].endswith("No such key: losses are computed chunk by chunk, without the logits of all tokens.")


def fields_of(section: Any) -> Any:
    """The class of a section in an annotation such as `Lora | None`; None if it has no keys of ours."""
    for one in [section, *getattr(section, "__args__", ())]:
        if isinstance(one, type) and issubclass(one, BaseModel):
            return one
    return None


def exists(key: str) -> bool:
    """Whether a key is one of a recipe: of a stage, of models.NAME, of the recipe, or an option of a method."""
    first, *rest = key.split(".")
    if first == "options" and rest:
        return any(rest[0] in inspect.signature(function).parameters for function in METHODS.values())
    section, parts = (ModelSpec, rest[1:]) if first == "models" else (StageSpec, [first, *rest])
    if first in Recipe.model_fields and first != "models" and not rest:
        return True
    for part in parts:
        if section is None or part not in section.model_fields:
            return False
        section = fields_of(section.model_fields[part].annotation)
    return True


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_row_names_existing_keys_and_methods(row: Row):
    quoted = re.findall(r"`([a-z_.A-Z]+)`", row.says)
    assert not [key for key in quoted if not exists(key)]
    for name in re.findall(r"of the method (\w+)", row.says):
        option = str(row.key).removeprefix("options.")
        assert option in inspect.signature(METHODS[name]).parameters
    if row.key == "method":
        assert set(re.findall(r"\b[a-z_]+\b", row.says)) & set(METHODS) or "`opd methods`" in row.says


def test_rows_have_sources_and_one_place():
    assert len({row.name for row in ROWS}) == len(ROWS) >= 60
    assert {one for row in ROWS for one in row.libraries} == set(LIBRARIES)
    assert [row.name for row in ROWS if not row.of] == ["epochs", "lora", "max_seq_length"]
    for library in ("trl", "swift", "axolotl", "verl"):
        assert sum(library in row.libraries for row in ROWS) >= 30


def test_names_of_transformers_and_peft_exist():
    """Of the other libraries, which are not installed here, the names were read in the stated versions."""
    arguments = {field.name for field in dataclasses.fields(transformers.TrainingArguments)}
    adapters = {field.name for field in dataclasses.fields(peft.LoraConfig)}
    assert {row.name for row in ROWS if "hf" in row.libraries} <= arguments
    assert {row.name for row in ROWS if "peft" in row.libraries} <= adapters


def test_name_in_the_optimizer_is_no_option_of_a_method():
    with pytest.raises(ConfigError) as error:
        parse_recipe(one_stage(optimizer={"epsilon": 1e-8}))
    assert "clip_low" not in str(error.value)


def test_page_is_generated():
    assert (ROOT / "docs" / "coming_from.md").read_text() == markdown(), "run `make docs`"
