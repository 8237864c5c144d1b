"""Recipes: what is filled in, what overrides reach, what refers to what, and what comes back from the resolved text."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from opd.errors import ConfigError
from opd.recipe.load import dump, load_recipe, parse_recipe
from opd.recipe.schema import Recipe, origin_of

ROOT = Path(__file__).parents[2]
RECIPES = sorted([*(ROOT / "recipes").glob("*.yaml"), *(ROOT / "examples").glob("*.yaml")])


def stage(name: str, **fields: Any) -> dict[str, Any]:
    return {"name": name, "train": "student", "method": "sft", "data": {"path": "x.jsonl"}, "steps": 2, **fields}


def recipe(*stages: dict[str, Any], **fields: Any) -> dict[str, Any]:
    models = {"student": {"path": "./student"}, "teacher": {"path": "./teacher"}}
    return {"name": "tiny", "models": models, "stages": list(stages) or [stage("one")], **fields}


def refused(raw: dict[str, Any], *overrides: str) -> str:
    with pytest.raises(ConfigError) as error:
        parse_recipe(raw, overrides)
    return str(error.value)


# --- defaults --------------------------------------------------------------------------------------------------------


def test_defaults_merge_into_each_stage_by_key():
    defaults = {"steps": 7, "sampling": {"n": 4, "temperature": 0.5}, "optimizer": {"betas": [0.8, 0.9]}, "data": {}}
    one = stage("one", sampling={"temperature": 0.7})
    two = {key: value for key, value in stage("two").items() if key != "steps"}
    resolved = parse_recipe(recipe(one, two, defaults=defaults))
    assert [s.steps for s in resolved.stages] == [2, 7]
    assert [s.sampling.n for s in resolved.stages] == [4, 4]
    assert [s.sampling.temperature for s in resolved.stages] == [0.7, 0.5]
    assert [s.optimizer.betas for s in resolved.stages] == [(0.8, 0.9)] * 2
    assert [s.data.path for s in resolved.stages] == ["x.jsonl"] * 2


def test_defaults_yield_to_lists_values_and_null_of_stage():
    defaults = {"teacher": "teacher", "sampling": {"stop": ["a", "b"]}, "reward": {"name": "exact"}}
    one = stage("one", teacher=None, sampling={"stop": ["c"]}, reward=None)
    resolved = parse_recipe(recipe(one, stage("two"), defaults=defaults))
    assert [s.teacher for s in resolved.stages] == [None, "teacher"]
    assert [s.sampling.stop for s in resolved.stages] == [["c"], ["a", "b"]]
    assert [s.reward is None for s in resolved.stages] == [True, False]


def test_defaults_are_copied_per_stage():
    raw = recipe(stage("one"), stage("two"), defaults={"sampling": {"n": 4}})
    before = yaml.safe_dump(raw)
    resolved = parse_recipe(raw, ["stages.one.sampling.n=2", "defaults.sampling.top_p=0.5"])
    assert [s.sampling.n for s in resolved.stages] == [2, 4]
    assert [s.sampling.top_p for s in resolved.stages] == [0.5, 0.5]
    assert yaml.safe_dump(raw) == before


def test_defaults_suggests_key_when_misspelt():
    assert "`stages.0.samplng`. Did you mean 'sampling'?" in refused(recipe(defaults={"samplng": {}}))


@pytest.mark.parametrize("defaults", [5, ["steps"], "steps"])
def test_defaults_refuses_non_mapping(defaults: Any):
    assert "`defaults`" in refused(recipe(defaults=defaults))


def test_parse_recipe_fills_documented_defaults():
    resolved = parse_recipe(recipe())
    only = resolved.stages[0]
    assert (resolved.seed, resolved.folder, resolved.report_to) == (0, Path("runs/tiny"), [])
    assert (only.optimizer.learning_rate, only.optimizer.max_grad_norm, only.optimizer.schedule) == (
        1e-6,
        1,
        "constant",
    )
    assert (only.sampling.temperature, only.sampling.top_p, only.sampling.top_k, only.sampling.n) == (1, 1, 0, 1)
    assert (only.checkpoint.every, only.checkpoint.keep, only.prompts_per_step) == (50, 2, 16)
    assert resolved.models["student"].dtype == "float32"
    assert resolved.models["student"].trust_remote_code is False
    assert parse_recipe(recipe(output_dir="here")).folder == Path("here")


# --- overrides -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("seed=3", lambda r: r.seed == 3),
        ("output_dir=a=b", lambda r: r.folder == Path("a=b")),
        ("report_to=[tensorboard]", lambda r: r.report_to == ["tensorboard"]),
        ("models.student.path=./other", lambda r: r.models["student"].path == "./other"),
        ("models.student.lora.rank=4", lambda r: r.models["student"].lora.rank == 4),
        ("models.extra={path: ./x}", lambda r: r.models["extra"].path == "./x"),
        ("steps=9", lambda r: r.stages[0].steps == 9),
        ("stages.one.steps=9", lambda r: r.stages[0].steps == 9),
        ("stages.0.steps=9", lambda r: r.stages[0].steps == 9),
        ("optimizer.learning_rate=2e-5", lambda r: r.stages[0].optimizer.learning_rate == 2e-5),
        ("sampling.stop=['.']", lambda r: r.stages[0].sampling.stop == ["."]),
        ("teacher=teacher", lambda r: r.stages[0].teacher == "teacher"),
        ("teacher=null", lambda r: r.stages[0].teacher is None),
        ("options.k=5", lambda r: r.stages[0].options == {"k": 5}),
        ("evaluate={data: {path: y.jsonl}, kl: true}", lambda r: r.stages[0].evaluate.kl is True),
    ],
)
def test_override_sets_key(override: str, value: Any):
    assert value(parse_recipe(recipe(), [override]))


def test_override_changes_one_stage_when_object_is_shared(tmp_path: Path):
    common = {"n": 4}
    raw = recipe(stage("one", sampling=common), stage("two", sampling=common))
    assert [s.sampling.n for s in parse_recipe(raw, ["stages.one.sampling.n=2"]).stages] == [2, 4]
    file = tmp_path / "anchored.yaml"
    file.write_text(yaml.safe_dump(raw))
    assert "&id001" in file.read_text()
    assert [s.sampling.n for s in load_recipe(file, ["stages.one.sampling.n=2"]).stages] == [2, 4]


def test_override_takes_last_value_of_key():
    assert parse_recipe(recipe(), ["seed=3", "steps=4", "seed=5"]).seed == 5


def test_override_prefers_stage_name_to_number():
    raw = recipe(stage("first"), stage("0"))
    assert [s.steps for s in parse_recipe(raw, ["stages.0.steps=9"]).stages] == [2, 9]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("seed", "An override has the form key=value, e.g. seed=1 or stages.distil.steps=5; got 'seed'."),
        ({"seed": 1}, "An override has the form key=value, e.g. seed=1 or stages.distil.steps=5; got {'seed': 1}."),
        ("=5", "got '=5'"),
        ("stages.tow.steps=5", "Override stages.tow: no such entry. Did you mean 'two'? There are ['one', 'two']."),
        ("stages.2.steps=5", "Override stages.2: no such entry. There are ['one', 'two']."),
        ("steps=5", "'steps' belongs to a stage, and the recipe has several: write stages.NAME.steps"),
        ("optimizer.eps=1", "write stages.NAME.optimizer.eps (NAME of ['one', 'two'])"),
        ("seed.x=5", "Override seed"),
        ("name.x.y=5", "Override name.x: 'tiny' is a value and has no keys."),
        ("stages.1=5", "Override stages.1"),
        ("stages.one.data=5", "`stages.0.data`"),
        ("modles.student.path=x", "unknown key `modles`. Did you mean 'models'?"),
        ("seed={", "Override seed: '{' is not a YAML value"),
    ],
)
def test_override_raises_config_error_when_wrong(override: Any, message: str):
    assert message in refused(recipe(stage("one"), stage("two"), seed=0), override)


# --- messages at every level -----------------------------------------------------------------------------------------


DATA = {"path": "x"}


@pytest.mark.parametrize(
    ("key", "near", "override"),
    [
        ("descripton", "description", "descripton=x"),
        ("models.student.autocasts", "autocast", "models.student.autocasts=true"),
        ("models.student.lora.alfa", "alpha", "models.student.lora={alfa: 1}"),
        ("models.teacher.ofload", "offload", "models.teacher.ofload=true"),
        ("stages.0.seconds", "seconds_of", "stages.one.seconds=x"),
        ("stages.0.data.limits", "limit", "data.limits=1"),
        ("stages.0.sampling.max_completion_lenght", "max_completion_length", "sampling.max_completion_lenght=1"),
        ("stages.0.teacher_sampling.temprature", "temperature", "teacher_sampling={temprature: 1}"),
        ("stages.0.reward.option", "options", "reward={name: exact, option: {}}"),
        ("stages.0.optimizer.lerning_rate", "learning_rate", "optimizer.lerning_rate=1"),
        ("stages.0.checkpoint.evry", "every", "checkpoint.evry=1"),
        ("stages.0.evaluate.pass_att", "pass_at", "evaluate={data: {path: x}, pass_att: [1]}"),
        ("stages.0.evaluate.data.colums", "columns", "evaluate={data: {path: x, colums: {}}}"),
        ("stages.0.evaluate.reward.nam", "name", "evaluate={data: {path: x}, reward: {name: exact, nam: x}}"),
        (
            "stages.0.evaluate.sampling.greedy.top_pp",
            "top_p",
            "evaluate={data: {path: x}, sampling: {greedy: {top_pp: 1}}}",
        ),
    ],
)
def test_parse_recipe_suggests_near_key_when_unknown(key: str, near: str, override: str):
    message = refused(recipe(), override)
    line = next(line for line in message.splitlines() if "unknown key" in line)
    place = override.partition("=")[0]
    assert line.startswith(f"  override {place}: unknown key `{key}`. Did you mean {near!r}? Known here: ")
    assert near in line.split("Known here: ")[1].split(", ")


def test_parse_recipe_lists_known_keys_when_none_is_near():
    message = refused(recipe(), "checkpoint.zzz=1")
    assert "unknown key `stages.0.checkpoint.zzz`. Known here: every, every_minutes, keep" in message
    assert "Did you mean" not in message


@pytest.mark.parametrize(("override", "near"), [("stesp=3", "steps"), ("temprature=1", None), ("sede=3", "seed")])
def test_override_suggests_stage_key_when_misspelt(override: str, near: str | None):
    message = refused(recipe(), override)
    assert (f"Did you mean {near!r}?" in message) == (near is not None)
    assert ("; of a stage: name, train, teacher" in message) == (near != "seed")


def test_parse_recipe_points_to_stage_when_key_is_at_top():
    message = refused(recipe(steps=3))
    assert "unknown key `steps`. It is a key of a stage. Known here: name" in message


def test_parse_recipe_omits_stage_keys_when_file_is_misspelt():
    assert "of a stage" not in refused(recipe(stesp=3), "steps=3")


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("lr=1e-5", "unknown key `lr`. Here it is `optimizer.learning_rate`."),
        ("optimizer.adam_epsilon=1", "unknown key `stages.0.optimizer.adam_epsilon`. Here it is `optimizer.eps`."),
        ("stages.one.batch_size=8", "unknown key `stages.0.batch_size`. Here it is `prompts_per_step`"),
        ("max_new_tokens=8", "Here it is `sampling.max_completion_length`."),
        ("gradient_accumulation_steps=8", "No such key: `prompts_per_step` is the whole step"),
        ("num_train_epochs=3", "No such key: set `steps`; an epoch is the number of prompts"),
        ("model_name_or_path=x", "Here it is `models.NAME.path`"),
        ("kl_coef=0.1", "No such key: the weight of a divergence"),
    ],
)
def test_parse_recipe_translates_other_trainers_keys(override: str, said: str):
    message = refused(recipe(), override)
    assert said in message
    assert "Did you mean" not in message


def test_parse_recipe_translates_no_keys_of_judge():
    assert "Here it is" not in refused(recipe(), "reward={name: rubric, model: x}")


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("reward=exact", "`stages.0.reward`: Input should be a valid dictionary (got 'exact'). Write {name: exact}"),
        ("models.student.lora=true", "(got True). Write {rank: 16}, or null"),
        ("data=train.jsonl", "(got 'train.jsonl'). Write {path: train.jsonl}"),
        ("models.student=./x", "(got './x'). Write {path: ./x}"),
        ("checkpoint=3", "(got 3). Its keys: every, every_minutes, keep"),
    ],
)
def test_parse_recipe_suggests_section_when_value_is_plain(override: str, said: str):
    message = refused(recipe(), override)
    assert said in message
    assert "instance of" not in message


def test_parse_recipe_suggests_characters_when_misspelt():
    models = {"student": {"init": {"model_type": "llama"}, "tokenizer": {"charcters": "abc"}}}
    message = refused(recipe(models=models))
    assert "charcters`. Did you mean 'characters'?" in message


def test_parse_recipe_refuses_name_that_is_no_folder():
    assert "`stages.0.name`" in refused(recipe(stage("a/b")))
    assert "`name`" in refused(recipe(name="../x"))


def test_parse_recipe_cuts_long_value_in_error():
    message = refused(recipe(), f"steps={'9x' * 500}")
    assert "`stages.0.steps`" in message
    assert len(message) < 400


def test_load_recipe_error_names_file(tmp_path: Path):
    file = tmp_path / "mine.yaml"
    file.write_text(yaml.safe_dump(recipe(seed="x")))
    with pytest.raises(ConfigError, match=r"mine\.yaml is not valid:\n  line 7: `seed`"):
        load_recipe(file)


def test_parse_recipe_accepts_path_object():
    assert parse_recipe(recipe(output_dir=Path("here"))).output_dir == "here"


# --- references ------------------------------------------------------------------------------------------------------


def test_parse_recipe_refuses_unknown_model():
    message = refused(recipe(stage("one", train="studen")))
    assert "recipe: stage 'one': `train: studen` is not among the models. Did you mean 'student'?" in message
    assert "There are ['student', 'teacher']." in message
    assert "`teacher: tutor` is not among the models." in refused(recipe(stage("one", teacher="tutor")))


def test_parse_recipe_refuses_duplicate_stage_name():
    assert "stage 'one': the name is used twice." in refused(recipe(stage("one"), stage("one")))


def test_from_stage_needs_earlier_stage():
    models = {"student": {"path": "./student"}, "taught": {"from_stage": "one"}}
    both = [stage("one"), stage("two", teacher="taught")]
    assert parse_recipe(recipe(*both, models=models)).stage("two").teacher == "taught"
    message = refused(recipe(*reversed(both), models=models))
    assert "stage 'two': model 'taught' comes from stage 'one', and no such stage comes before this one." in message
    itself = recipe(stage("one", train="taught"), models=models)
    assert "no such stage comes before" in refused(itself)


def test_model_that_nothing_uses_may_come_from_nowhere():
    models = {"student": {"path": "./student"}, "spare": {"from_stage": "nowhere"}, "loop": {"from_stage": "one"}}
    assert parse_recipe(recipe(models=models)).models["spare"].from_stage == "nowhere"


def test_seconds_of_needs_earlier_stage():
    assert parse_recipe(recipe(stage("one"), stage("two", seconds_of="one"))).stage("two").seconds_of == "one"
    message = refused(recipe(stage("one", seconds_of="two"), stage("two")))
    assert "stage 'one': `seconds_of: two` names no earlier stage. Earlier: []." in message


# --- the resolved recipe ---------------------------------------------------------------------------------------------


FULL = recipe(
    stage("one", sampling={"stop": ["\n", "»"], "top_p": 0.9}, options={"x": [1, None, {"y": "é"}]}),
    stage(
        "two",
        teacher="made",
        evaluate={"data": DATA, "sampling": {"greedy": {"temperature": 0}}, "pass_at": [1, 4]},
        reward={"name": "exact", "options": {"ignore_case": True}},
        seconds_of="one",
    ),
    description="two lines\nof text: ü",
    models={
        "student": {"path": "./student", "lora": {"target_modules": ["q_proj"]}, "template_options": {"a": False}},
        "made": {"init": {"model_type": "llama", "hidden_size": 8}, "tokenizer": {"characters": "0: #'\"\\"}},
    },
)


@pytest.mark.parametrize("raw", [recipe(), FULL], ids=["short", "full"])
def test_dump_reads_back_equal(raw: dict[str, Any]):
    resolved = parse_recipe(raw)
    text = dump(resolved)
    again = parse_recipe(yaml.safe_load(text))
    assert again == resolved
    assert dump(again) == text
    assert set(yaml.safe_load(text)) == set(Recipe.model_fields)


@pytest.mark.parametrize("file", RECIPES, ids=lambda file: file.stem)
def test_dump_reads_back_equal_when_recipe_is_shipped(file: Path):
    resolved = load_recipe(file)
    assert resolved.name == file.stem
    assert parse_recipe(yaml.safe_load(dump(resolved))) == resolved


@pytest.mark.parametrize(
    ("own", "template", "options"),
    [
        ({}, "one {{ messages }}", {"thinking": False}),
        ({"template_options": {}}, "one {{ messages }}", {}),
        ({"template_options": {"budget": 3}}, "one {{ messages }}", {"budget": 3}),
        ({"chat_template": "two {{ messages }}"}, "two {{ messages }}", {"thinking": False}),
    ],
)
def test_model_from_a_stage_has_the_template_there_or_its_own(own, template: str, options: dict[str, Any]):
    """Also through a second stage, and after the resolved recipe is written and read, where every field is written."""
    first = {"path": "./a", "chat_template": "one {{ messages }}", "template_options": {"thinking": False}}
    models = {"first": first, "second": {"from_stage": "one", **own}, "third": {"from_stage": "two"}}
    stages = [stage(name, train=train) for name, train in zip(("one", "two", "three"), models, strict=True)]
    resolved = parse_recipe(recipe(*stages, models=models))
    for read in (resolved, parse_recipe(yaml.safe_load(dump(resolved)))):
        for name in ("second", "third"):
            assert (read.models[name].chat_template, read.models[name].template_options) == (template, options)
            origin = origin_of(read, name)
            assert (origin.path, origin.chat_template, origin.template_options) == ("./a", template, options)


def test_dump_keeps_no_trace_of_defaults_and_overrides():
    spelt = recipe(stage("one", sampling={"n": 3}), seed=2)
    short = parse_recipe(recipe(defaults={"sampling": {"n": 3}}), ["seed=2"])
    assert dump(short) == dump(parse_recipe(spelt))


def test_recipe_is_frozen():
    with pytest.raises(ValueError, match="frozen"):
        parse_recipe(recipe()).seed = 3  # type: ignore[misc]


def test_recipe_import_loads_no_torch():
    code = "import sys, opd.recipe; print({'torch', 'transformers', 'numpy', 'datasets'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
