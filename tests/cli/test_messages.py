"""What bad input is told: what, got, why and the remedy, in one message, with the right exit code and nothing lost.

Runs that are stopped, folders that hold another run and disks that are full are in test_resume.py.
"""

from __future__ import annotations

import copy
import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from support.runs import (
    CHARACTERS,
    ENVIRONMENT,
    Ended,
    command,
    forbid,
    one_stage,
    prepare,
    sums,
    tiny_model,
    write_rows,
)

from opd.files import read_table
from opd.methods import METHODS
from opd.models import saving
from opd.models.loading import load_model
from opd.recipe.schema import ModelSpec
from opd.stage import checkpoint
from opd.stage.folder import StageDir

Change = Callable[[dict[str, Any]], Any]


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The working directory, with data, where a user's own `mine.py` is found and forgotten afterwards."""
    monkeypatch.chdir(prepare(tmp_path / "work", one_stage()))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(sys, "path", list(sys.path))
    sys.modules.pop("mine", None)
    yield tmp_path / "work"
    sys.modules.pop("mine", None)


@pytest.fixture
def no_weights(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    forbid(monkeypatch, "opd.runs.build.load_model")


def opd(what: str, recipe: Any, *overrides: str) -> Ended:
    Path("recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    return command(what, "recipe.yaml", *overrides)


def refusal(recipe: Any, *overrides: str, what: str = "train", code: int = 2) -> str:
    """The message of a recipe that is refused."""
    ended = opd(what, recipe, *overrides)
    assert ended.code == code, ended
    assert "Traceback" not in ended.err
    return ended.err


def assert_says(message: str, *parts: str) -> None:
    for part in parts:
        assert part in message, f"{part!r} is not in:\n{message}"


def changed(change: Change, recipe: dict[str, Any] | None = None) -> dict[str, Any]:
    recipe = copy.deepcopy(recipe or one_stage())
    change(recipe)
    return recipe


def stage(recipe: dict[str, Any]) -> dict[str, Any]:
    return recipe["stages"][0]


# --- the recipe ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        (lambda r: r.update(sede=1), ["unknown key `sede`. Did you mean 'seed'? Known here: name, description, seed"]),
        (lambda r: stage(r).update(step=1), ["unknown key `stages.0.step`. Did you mean 'steps'?"]),
        (
            lambda r: stage(r).update(optimizer={"learningrate": 1e-5}),
            ["unknown key `stages.0.optimizer.learningrate`. Did you mean 'learning_rate'?", "max_grad_norm"],
        ),
        (
            lambda r: stage(r)["sampling"].update(temprature=1),
            ["unknown key `stages.0.sampling.temprature`. Did you mean 'temperature'?"],
        ),
        (
            lambda r: stage(r).update(teacher_sampling={"topp": 1}),
            ["unknown key `stages.0.teacher_sampling.topp`. Did you mean 'top_p'?"],
        ),
        (
            lambda r: stage(r)["data"].update(colums={}),
            ["unknown key `stages.0.data.colums`. Did you mean 'columns'?"],
        ),
        (
            lambda r: stage(r).update(
                evaluate={"data": {"path": "x.jsonl"}, "sampling": {"greedy": {"temprature": 0}}}
            ),
            ["unknown key `stages.0.evaluate.sampling.greedy.temprature`. Did you mean 'temperature'?"],
        ),
        (
            lambda r: r["models"]["student"].update(tokeniser="x"),
            ["unknown key `models.student.tokeniser`. Did you mean 'tokenizer'?"],
        ),
        (
            lambda r: r["models"]["student"].update(lora={"rnk": 2}),
            ["unknown key `models.student.lora.rnk`. Did you mean 'rank'?"],
        ),
        (
            lambda r: r["models"]["student"].update(tokenizer={"charactrs": "abc"}),
            ["`models.student.tokenizer", ".charactrs`. Did you mean 'characters'?"],
        ),
    ],
    ids=lambda value: value[0].split("`")[1] if isinstance(value, list) else "",
)
def test_train_refuses_unknown_key(no_weights: None, change: Change, parts: list[str]):
    assert_says(refusal(changed(change)), "ConfigError: recipe.yaml is not valid:", *parts)


def test_train_refuses_unknown_init_option(no_weights: None):
    recipe = changed(lambda r: r["models"]["student"]["init"].update(hiden_size=16))
    assert_says(refusal(recipe), "student", "hiden_size", "Did you mean 'hidden_size'?")


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        (lambda r: stage(r).update(steps="many"), ["`stages.0.steps`", "valid integer", "(got 'many')"]),
        (lambda r: stage(r).update(steps=0), ["`stages.0.steps`", "greater than or equal to 1", "(got 0)"]),
        (lambda r: r.update(seed=-1), ["`seed`", "greater than or equal to 0", "(got -1)"]),
        (lambda r: r.update(stages={"name": "distil"}), ["`stages`", "valid list", "(got {'name': 'distil'})"]),
        (lambda r: r.update(stages=["distil"]), ["`stages.0`", "valid dictionary", "(got 'distil')"]),
        (lambda r: r.update(stages=[]), ["`stages`", "at least 1 item", "(got [])"]),
        (lambda r: stage(r).pop("train"), ["`stages.0.train` is missing"]),
        (lambda r: r.pop("models"), ["`models` is missing"]),
        (lambda r: stage(r)["sampling"].update(top_p=1.5), ["`stages.0.sampling.top_p`", "(got 1.5)"]),
        (
            lambda r: r["models"]["student"].update(dtype="float16"),
            ["`models.student.dtype`", "'float32' or 'bfloat16'", "(got 'float16')"],
        ),
        (
            lambda r: r["models"]["student"].update(path="./x"),
            ["`models.student`", "exactly one of path, init, from_stage, scorer, server; got ['path', 'init']"],
        ),
        (
            lambda r: r["models"].update(student={}),
            ["`models.student`", "exactly one of path, init, from_stage, scorer, server; got none"],
        ),
        (lambda r: r.update(defaults=5), ["`defaults`", "(got 5)"]),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_train_refuses_wrong_type_or_value(no_weights: None, change: Change, parts: list[str]):
    assert_says(refusal(changed(change)), "ConfigError: recipe.yaml is not valid:", *parts)


def test_train_reports_all_recipe_mistakes_together(no_weights: None):
    recipe = changed(lambda r: (r.update(sede=1), stage(r).update(steps="many"), stage(r).pop("data")))
    assert_says(refusal(recipe), "unknown key `sede`", "`stages.0.steps`", "`stages.0.data` is missing")


@pytest.mark.parametrize(
    ("method", "options", "parts"),
    [
        ("revers_kl", {}, ["There is no method 'revers_kl'. Did you mean 'reverse_kl'?", "my_package.mine:method"]),
        (
            "reverse_kl",
            {"avrage": "token"},
            ["Method 'reverse_kl':", "unknown option `avrage`. Did you mean 'average'? Known: average, temperature"],
        ),
        ("topk_reverse_kl", {"k": "many"}, ["Method 'topk_reverse_kl':", "option `k`", "integer", "(got 'many')"]),
        ("topk_reverse_kl", {"k": 0}, ["top-k", "k of at least 1, got 0"]),
        ("topk_reverse_kl", {"form": "tial"}, ["option `form`", "'renormalised' or 'tail'", "(got 'tial')"]),
        ("gkd", {"on_policy_share": 2}, ["on_policy_share", "probability", "got 2.0"]),
        ("context_distillation", {"template": "{question}"}, ["{prompt}", "{privileged_context}", "got ['question']"]),
        (
            "mine:method",
            {},
            ["mine:method: importing 'mine' failed with ModuleNotFoundError", "in the folder of its file"],
        ),
        ("grpo", {"variant": "dr_grpo"}, ["dr_grpo", "set `length`"]),
    ],
)
def test_train_refuses_bad_method_or_options(no_weights: None, method: str, options: dict[str, Any], parts: list[str]):
    assert_says(refusal(one_stage(method=method, options=options)), "ConfigError: ", *parts)


@pytest.mark.parametrize(
    ("code", "name", "parts"),
    [
        ("def methd(): ...", "mine:method", ["'method' does not exist in 'mine'. Did you mean 'methd'?"]),
        ("method = 5", "mine:method", ["'method' is not a function in 'mine'. Its functions: none."]),
        ("1 / 0", "mine:method", ["importing 'mine' failed with ZeroDivisionError: division by zero"]),
        ("def method(): return 5", "mine:method", ["returned a int; it must return an opd.method.Method"]),
    ],
)
def test_train_refuses_broken_custom_method(work: Path, no_weights: None, code: str, name: str, parts: list[str]):
    (work / "mine.py").write_text(code + "\n")
    assert_says(refusal(one_stage(method=name)), "ConfigError: ", *parts)


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        (lambda r: r["models"]["student"]["init"].pop("model_type"), ["models.student.init", "model_type", "llama"]),
        (lambda r: r["models"]["student"]["init"].update(model_type="lama"), ["models.student.init", "'lama'"]),
        (lambda r: r["models"]["student"].pop("tokenizer"), ["models.student", "tokenizer"]),
        (lambda r: r["models"]["student"].update(lora={"target_modules": ["q_prj"]}), ["student", "q_prj"]),
        (lambda r: r["models"]["student"].update(device="gpu"), ["student", "device", "gpu"]),
    ],
    ids=["no model_type", "unknown model_type", "no tokenizer", "unknown target module", "unknown device"],
)
def test_train_refuses_bad_model_section(work: Path, change: Change, parts: list[str]):
    assert_says(refusal(changed(change)), "ConfigError: ", *parts)


@pytest.mark.parametrize(
    ("path", "parts"),
    [
        ("./studnt", ["models.student.path: studnt does not exist. Give an existing folder"]),
        ("studnt", ["models.student.path", "studnt"]),
        ("./train.jsonl", ["models.student.path", "train.jsonl"]),
        (".", ["models.student.path: . has no config.json and 0 GGUF files", "Give a Hugging Face model folder"]),
        ("package:no_such_package/x.gguf", ["the package 'no_such_package' is not installed", "pip install"]),
    ],
)
def test_train_refuses_bad_model_path(work: Path, path: str, parts: list[str]):
    assert_says(refusal(changed(lambda r: r["models"].update(student={"path": path}))), *parts)


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        (None, ["There is no recipe at recipe.yml. Did you mean 'recipe.yaml'?", "path of a YAML file"]),
        ("name: [1\n", ["recipe.yml is not valid YAML", "line 2"]),
        ("- name: x\n", ["recipe.yml is a list; a recipe is a mapping with `models` and `stages`"]),
        ("", ["recipe.yml is", "a recipe is a mapping with `models` and `stages`"]),
    ],
    ids=["missing", "broken", "list", "empty"],
)
def test_train_refuses_missing_or_invalid_recipe_file(work: Path, text: str | None, parts: list[str]):
    if text is not None:
        Path("recipe.yml").write_text(text)
    ended = command("train", "recipe.yml")
    assert ended.code == 2
    assert_says(ended.err, "ConfigError: ", *parts)


def test_train_refuses_names_that_do_not_exist(no_weights: None):
    assert_says(refusal(one_stage(teacher="techer")), "`teacher: techer` is not among the models", "'teacher'?")
    assert_says(refusal(one_stage(train="studnt")), "`train: studnt` is not among the models", "'student'?")
    assert_says(refusal(one_stage(reward={"name": "exct"})), "no reward 'exct'. Did you mean 'exact'?")
    said = refusal(one_stage(reward={"name": "max_words", "options": {"m": 3}}))
    assert_says(said, "The reward 'max_words' cannot be called with the options ['m']", "Its options: n.")
    assert_says(refusal(one_stage() | {"report_to": ["tensorbord"]}), "'tensorbord'", "'tensorboard'?")


# --- overrides -------------------------------------------------------------------------------------------------------


def metrics(name: str = "distil") -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path("run", name, "metrics.jsonl").read_text().splitlines()]


def test_train_applies_overrides(work: Path):
    ended = opd("train", one_stage(), "steps=3", "stages.distil.sampling.n=2", "optimizer.learning_rate=1e-5", "seed=4")
    assert ended.code == 0, ended.err
    assert [row["step"] for row in metrics()] == [1, 2, 3]
    resolved = yaml.safe_load(Path("run/recipe.yaml").read_text())
    assert resolved["seed"] == 4
    assert resolved["stages"][0]["sampling"]["n"] == 2
    assert resolved["stages"][0]["optimizer"]["learning_rate"] == 1e-5


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("seed", ["An override has the form key=value", "got 'seed'"]),
        ("=1", ["An override has the form key=value", "got '=1'"]),
        ("sed=1", ["unknown key `sed`. Did you mean 'seed'?"]),
        ("stages.distl.steps=1", ["Override stages.distl", "Did you mean 'distil'?"]),
        ("stages.7.steps=1", ["Override stages.7: no such entry", "['distil']"]),
        ("stages.distil.steps.x=1", ["Override stages.distil.steps", "2 has no keys"]),
        ("stages.0=5", ["Override stages.0", "has no keys"]),
        ("stages.distil.stepz=1", ["unknown key `stages.0.stepz`. Did you mean 'steps'?"]),
        ("steps=many", ["`stages.0.steps`", "(got 'many')"]),
        ("seed=[1", ["Override seed: '[1'", "YAML"]),
    ],
)
def test_train_refuses_bad_override(no_weights: None, override: str, parts: list[str]):
    assert_says(refusal(one_stage(), override), "ConfigError: ", *parts)


def test_train_refuses_short_override_when_stages_are_several(no_weights: None):
    recipe = changed(lambda r: r["stages"].append(stage(r) | {"name": "again"}))
    said = refusal(recipe, "steps=1")
    assert_says(
        said, "'steps' belongs to a stage, and the recipe has several", "stages.NAME.steps", "['distil', 'again']"
    )


# --- data ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["train", "held out"])
@pytest.mark.parametrize(
    ("file", "text", "parts"),
    [
        ("trian.jsonl", None, ["trian.jsonl does not exist. Did you mean 'train.jsonl'?", "Correct `path`"]),
        ("mine.jsonl", "", ["mine.jsonl has no rows", "at least one row"]),
        ("mine.jsonl", '{"prompt": "1+1="}\n{"prompt": \n', ["Line 2 of mine.jsonl is not valid JSON", "got '{"]),
        ("mine.jsonl", '{"prompt": "1+1="}\n5\n', ["Line 2 of mine.jsonl is a int, got 5", "A row must be an object"]),
        ("mine.csv", 'prompt,answer\n1+1=,2\n"1+2=,3\n', ["Line 3 of mine.csv is not valid CSV", "Quote a cell"]),
        (
            "mine.jsonl",
            '{"question": "1+1=", "answer": 2}\n',
            [
                "Line 1 of mine.jsonl has no column 'prompt'. Its columns: question, answer.",
                "`columns: {prompt: question}`",
            ],
        ),
        ("mine.jsonl", '{"prompt": " "}\n', ["Line 1 of mine.jsonl: `prompt` is empty", "A prompt is text"]),
    ],
    ids=["missing", "empty", "broken", "no object", "broken csv", "no prompt", "empty prompt"],
)
def test_train_refuses_bad_data_file(
    work: Path, no_weights: None, where: str, file: str, text: str | None, parts: list[str]
):
    if text is not None:
        Path(file).write_text(text)
    data = {"path": file}
    recipe = one_stage(data=data) if where == "train" else one_stage(evaluate={"data": data})
    assert_says(refusal(recipe), "DataError: ", *parts)


LONG = [*sums(0, 3), {"prompt": "1+1+1+1+1="}]


@pytest.mark.parametrize("what", ["check", "train"])
def test_max_prompt_length_refuses_long_training_prompt(work: Path, no_weights: None, what: str):
    write_rows(work / "long.jsonl", LONG)
    said = refusal(one_stage(data={"path": "long.jsonl"}, max_prompt_length=6), what=what)
    assert_says(said, "DataError: Prompt 3 has 10 tokens, but `max_prompt_length` is 6", "raise `max_prompt_length`")


@pytest.mark.parametrize("what", ["check", "train"])
def test_max_prompt_length_refuses_long_held_out_prompt(work: Path, no_weights: None, what: str):
    write_rows(work / "long.jsonl", LONG)
    said = refusal(one_stage(evaluate={"data": {"path": "long.jsonl"}}, max_prompt_length=6), what=what)
    assert_says(said, "DataError: Prompt 3 has 10 tokens, but `max_prompt_length` is 6", "raise `max_prompt_length`")


@pytest.mark.parametrize("what", ["check", "train"])
def test_chat_raises_data_error_when_chat_template_is_missing(no_weights: None, what: str):
    said = refusal(one_stage(data={"path": "train.jsonl", "chat": True}), what=what)
    assert_says(said, "DataError: Prompt 0 is a list of messages", "has no chat template", "Give `prompt` as text")


@pytest.mark.parametrize(
    ("fields", "parts"),
    [
        ({}, ["DataError: Prompt 0 is a list of messages", "has no chat template"]),
        ({"chat_template": "{{ messages[0].content }}", "template_options": {"loud": True}}, ["the option 'loud'"]),
    ],
    ids=["none", "option"],
)
def test_check_refuses_chat_when_teacher_cannot_render_it(no_weights: None, fields: dict[str, Any], parts: list[str]):
    student, teacher = tiny_model(chat_template="{{ messages[0].content }}"), tiny_model(1, **fields)
    recipe = one_stage(data={"path": "train.jsonl", "chat": True})
    said = refusal(changed(lambda r: r["models"].update(student=student, teacher=teacher), recipe), what="check")
    assert_says(said, *parts)


def test_template_options_refuses_key_absent_from_template(no_weights: None):
    template = "{% for m in messages %}{{ m.content }}{% endfor %}{% if enable_thinking %}={% endif %}"
    model = tiny_model(chat_template=template, template_options={"enable_thinkin": False})
    recipe = changed(lambda r: r["models"].update(student=model), one_stage(data={"path": "train.jsonl", "chat": True}))
    said = refusal(recipe, what="check")
    assert_says(said, "does not mention the option 'enable_thinkin'", "Did you mean 'enable_thinking'?")


@pytest.mark.parametrize("what", ["check", "train"])
@pytest.mark.parametrize(
    ("characters", "parts"),
    [
        ("1023456789+=;", ["(15 tokens)", "2 tokens have another id (", "'0'", "'1'"]),
        ("0123456789+=;xy", ["(17)", "2 tokens exist only in the teacher (", "'x'", "'y'"]),
        ("0123456789", ["(12)", "3 tokens exist only in the student (", "'+'", "'='", "';'"]),
    ],
    ids=["moved", "more", "fewer"],
)
def test_reverse_kl_raises_alignment_error_when_tokens_differ(
    no_weights: None, what: str, characters: str, parts: list[str]
):
    recipe = changed(lambda r: r["models"].update(teacher=tiny_model(1, characters=characters)))
    said = refusal(recipe, what=what)
    assert_says(said, "AlignmentError: The tokenizers of student", "teacher", "family", *parts)


def test_sft_raises_data_error_when_response_is_empty(work: Path):
    write_rows(work / "mine.jsonl", [{"prompt": "1+1=", "response": "<eos>"}])
    said = refusal(one_stage(method="sft", teacher=None, data={"path": "mine.jsonl"}))
    assert_says(said, "DataError: The response '<eos>' has zero tokens", "Remove the row")


# --- what a method needs ---------------------------------------------------------------------------------------------


ROW = {"prompt": "1+1="}
TEMPLATE = {"template": "{privileged_context}{prompt}", "k": None}
WITH_CONTEXT: dict[str, Any] = {"method": "context_distillation", "teacher": None, "options": TEMPLATE}


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        (
            {"method": "grpo", "teacher": None},
            ["method 'grpo' needs", "several responses per prompt: set sampling.n", "a reward: set the stage's `rew"],
        ),
        ({"teacher": None}, ["method 'reverse_kl' needs a teacher model: set the stage's `teacher`"]),
        ({"teacher": "student"}, ["method 'reverse_kl' needs a teacher model: set the stage's `teacher`"]),
        (
            {"method": "context_distillation", "teacher": None},
            ["privileged context", "give `system`, `examples`, `template` or `prefill`"],
        ),
    ],
    ids=["reward and group", "teacher", "teacher is the student", "context"],
)
def test_train_refuses_recipe_when_needs_of_method_are_unmet(
    no_weights: None, changes: dict[str, Any], parts: list[str]
):
    assert_says(refusal(one_stage(**changes)), "ConfigError: ", *parts)


@pytest.mark.parametrize(
    ("column", "changes"),
    [
        ("response", {"method": "sft", "teacher": None}),
        (
            "privileged_context",
            {
                "method": "context_distillation",
                "teacher": None,
                "options": {"template": "{privileged_context}{prompt}"},
            },
        ),
        ("answer", {"reward": {"name": "exact"}}),
    ],
)
def test_train_raises_data_error_when_rows_lack_column(
    work: Path, no_weights: None, column: str, changes: dict[str, Any]
):
    write_rows(work / "mine.jsonl", [{**ROW, column: "2"}, ROW, ROW])
    said = refusal(one_stage(data={"path": "mine.jsonl"}, **changes))
    assert_says(said, f"DataError: This run needs `{column}` in every row, but 2 of 3 rows of mine.jsonl have none")
    assert_says(said, "(rows 1, 2). Its columns", "Fill it, or map it with `columns:`")


@pytest.mark.parametrize(
    ("column", "changes", "evaluate"),
    [
        ("answer", {}, {"reward": {"name": "exact"}}),
        ("answer", {"reward": {"name": "exact"}}, {}),
        (
            "privileged_context",
            {
                "method": "context_distillation",
                "teacher": None,
                "options": {"template": "{privileged_context}{prompt}"},
            },
            {"kl": True},
        ),
        (
            "privileged_context",
            {
                "method": "context_distillation",
                "teacher": None,
                "options": {"template": "{privileged_context}{prompt}"},
            },
            {"teacher": True},
        ),
    ],
    ids=["reward", "the stage's reward", "divergence", "teacher"],
)
def test_evaluate_raises_data_error_when_rows_lack_column(
    work: Path, no_weights: None, column: str, changes: dict[str, Any], evaluate: dict[str, Any]
):
    write_rows(work / "mine.jsonl", [{**ROW, column: "2"}, ROW, ROW])
    said = refusal(one_stage(evaluate={"data": {"path": "mine.jsonl"}, "before": False, **evaluate}, **changes))
    assert_says(said, "DataError: ", f"`{column}`", "mine.jsonl", "rows 1, 2")


def test_pass_at_raises_config_error_when_above_n(no_weights: None):
    evaluate = {"data": {"path": "held_out.jsonl"}, "reward": {"name": "final_number"}, "pass_at": [1, 4]}
    assert_says(refusal(one_stage(evaluate=evaluate)), "ConfigError: ", "pass@4", "at most 1 responses")


@pytest.mark.parametrize("what", ["check", "train"])
def test_topk_reverse_kl_refuses_k_above_vocabulary(no_weights: None, what: str):
    said = refusal(one_stage(method="topk_reverse_kl", options={"k": 20}), what=what)
    assert_says(said, "ConfigError: The method's support has k = 20", f"only {len(CHARACTERS) + 2} tokens. Lower k")


@pytest.mark.parametrize("what", ["check", "train"])
def test_diagnostics_refuses_k_above_vocabulary(no_weights: None, what: str):
    said = refusal(one_stage(diagnostics={"every": 5, "k": 20}), what=what)
    size = len(CHARACTERS) + 2
    assert_says(said, "ConfigError: A comparison uses the k most likely tokens of each model: k is 20, and the")
    assert_says(said, f"vocabulary has {size} tokens. Set diagnostics.k to a number in 1..{size}.")


# --- in the middle of a run ------------------------------------------------------------------------------------------


MINE = '''
"""A method of one's own that goes wrong."""
from dataclasses import replace

import torch

from opd.pieces import signals, sources, supports
from opd.method import Method

calls = 0


def breaks(at: int, value: float) -> Method:
    """Reverse KL, times `value` from its call number `at` on."""
    real = signals.divergence("reverse_kl")

    def signal(tokens):
        global calls
        calls += 1
        return real(tokens) * (value if calls >= at else 1.0)

    return Method(support=supports.full(), signal=signal)


def changed(**fields) -> Method:
    def source(prompts, writers, seed, record):
        rollouts = sources.on_policy()(prompts, writers, seed, record)
        return [replace(r, **{name: change(getattr(r, name)) for name, change in fields.items()}) for r in rollouts]

    return Method(source=source, support=supports.full(), signal=signals.divergence("reverse_kl"))


def untrained() -> Method:
    return changed(trained=torch.zeros_like)


def without_tokens() -> Method:
    nothing = lambda values: values[:0]
    return changed(**dict.fromkeys(["response_ids", "trained", "turn", "sampler_logp", "policy_logp"], nothing))


def without_support() -> Method:
    return Method(support=supports.sampled(), signal=signals.divergence("reverse_kl"))


def reward(prompt, response):
    """The answer, looked up in the wrong place."""
    return {}[prompt.answer]


def words(prompt, response):
    return "two words"
'''


@pytest.fixture
def mine(work: Path) -> None:
    (work / "mine.py").write_text(MINE)


@pytest.mark.parametrize("value", ["nan", "inf"])
def test_train_keeps_last_checkpoint_when_loss_is_not_finite(mine: None, work: Path, value: str):
    recipe = one_stage(
        method="mine:breaks",
        options={"at": 4, "value": float(value)},
        steps=6,
        checkpoint={"every": 2},
        samples_every=0,
    )
    said = refusal(recipe, code=1)
    rows = Path("run/distil/samples/step_000004.parquet")
    saved = Path("run/distil/checkpoints/step_000003")
    assert_says(said, "TrainingError: Stage 'distil', step 4: loss ", "The update was skipped.")
    assert_says(said, f"The step's responses: {rows}", "Usual causes: ")

    import pyarrow.parquet as pq

    prompts = sorted(set(pq.read_table(rows)["prompt_id"].to_pylist()))
    assert_says(said, f"Prompts of the step: {prompts}.")
    assert [row["step"] for row in metrics()] == [1, 2, 3]
    kept = checkpoint.load(saved)
    assert kept.step == 3
    assert all(bool(torch.isfinite(tensor).all()) for tensor in kept.tensors["student"].values())

    sys.modules["mine"].calls = -100
    again = opd("train", recipe)
    assert again.code == 0, again.err
    assert "distil: continuing after step 3 of 6" in again.out
    assert [row["step"] for row in metrics()] == [1, 2, 3, 4, 5, 6]


def test_train_raises_training_error_when_no_token_is_trained(mine: None):
    said = refusal(one_stage(method="mine:untrained"), code=1)
    assert_says(
        said, "TrainingError: None of this step's 2 responses has a trained token (prompts [", "Check the source"
    )


def test_train_raises_data_error_when_source_gives_no_token(mine: None):
    said = refusal(one_stage(method="mine:without_tokens"))
    assert_says(said, "DataError: The response to prompt ", "has zero tokens, so it cannot be trained on")


def test_divergence_raises_config_error_when_support_is_sampled(mine: None):
    said = refusal(one_stage(method="mine:without_support"))
    assert_says(said, "ConfigError: This signal compares distributions", "support=top_k(k) or support=full()")


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        (
            "mine:reward",
            ["'mine:reward' raised KeyError on prompt ", ", response '", "correct it, or the row"],
        ),
        ("mine:words", ["The reward 'mine:words' returned 'two words' (str) on prompt ", "Return a finite number"]),
    ],
)
def test_train_raises_training_error_when_reward_fails(mine: None, name: str, parts: list[str]):
    trained = {"method": "grpo", "teacher": None, "sampling": {"n": 2, "max_completion_length": 3}}
    assert_says(refusal(one_stage(reward={"name": name}, **trained), code=1), "TrainingError: ", *parts)
    dropped = {"name": name, "on_error": "drop", "max_failed": 0.5}
    said = refusal(one_stage(reward=dropped, **trained), code=1)
    assert_says(said, "got no answer for 2 of this step's 2 groups of responses, and `max_failed` allows 50%")


def test_train_goes_on_when_a_reward_that_is_only_shown_fails(mine: None, work: Path):
    said = opd("train", one_stage(reward={"name": "mine:reward"})).out
    assert_says(said, "distil: the reward failed on 4 responses")
    rows = StageDir(work / "run" / "distil").read_metrics()
    assert [row["rollout/rewards_failed"] for row in rows] == [2.0, 2.0]
    assert not any("rollout/reward" in row for row in rows)


# --- files that could run code ---------------------------------------------------------------------------------------


@pytest.fixture
def model_folder(work: Path) -> Path:
    """A saved tiny model."""
    saving.save(load_model(ModelSpec(**tiny_model(1)), name="tiny"), work / "model")
    return work / "model"


class Opens:
    """Makes a file when it is unpickled."""

    def __reduce__(self) -> Any:
        return (open, ("unpickled", "w"))


@pytest.mark.parametrize("what", ["train", "eval"])
def test_resolved_path_refuses_pickled_weights(model_folder: Path, work: Path, what: str):
    (model_folder / "model.safetensors").unlink()
    torch.save({"weights": Opens()}, model_folder / "pytorch_model.bin")
    recipe = changed(lambda r: r["models"].update(student={"path": "./model"}))
    ended = opd("train", recipe) if what == "train" else command("eval", "model", "held_out.jsonl")
    assert not (work / "unpickled").exists()
    assert ended.code == 2
    assert_says(ended.err, "Error: ", "model", "safetensors", "pytorch_model.bin")


@pytest.mark.parametrize("what", ["train", "eval", "check"])
def test_trust_remote_code_blocks_model_folder_code_when_unset(model_folder: Path, work: Path, what: str):
    config = json.loads((model_folder / "config.json").read_text())
    config |= {"model_type": "mine", "auto_map": {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}}
    (model_folder / "config.json").write_text(json.dumps(config))
    (model_folder / "code.py").write_text(f"open({str(work / 'executed')!r}, 'w')\n")
    recipe = changed(lambda r: r["models"].update(student={"path": "./model"}))
    ended = command("eval", "model", "held_out.jsonl") if what == "eval" else opd(what, recipe)
    assert not (work / "executed").exists()
    assert ModelSpec(path="model").trust_remote_code is False
    assert ended.code == 2
    assert_says(ended.err, "Error: ", "model", "trust_remote_code")


# --- the other commands ----------------------------------------------------------------------------------------------


LIGHT = (("--help",), ("train", "missing.yaml"), ("train", "--help"), ("methods",), ("describe", "opd"))


@pytest.mark.parametrize("arguments", LIGHT, ids=" ".join)
def test_cli_imports_no_torch_when_no_model_is_needed(tmp_path: Path, arguments: tuple[str, ...]):
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "opd", *arguments],
        cwd=tmp_path,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        check=False,
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    imported = {line.split("|")[2].strip() for line in done.stderr.splitlines() if line.startswith("import time:")}
    assert "opd.cli" in imported
    assert not imported & {"torch", "transformers", "datasets", "peft", "pyarrow", "numpy", "rich"}
    # Of the processor, so that a busy machine does not count; importing torch alone takes twice this.
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1.0
    if "--help" in arguments:
        assert done.returncode == 0
        assert_says(done.stdout, "Usage:")


def test_help_lists_the_commands():
    ended = command("--help")
    assert ended.code == 0
    assert_says(ended.out, "train", "check", "eval", "methods", "describe")


def test_methods_lists_each_method_with_headline():
    ended = command("methods")
    assert ended.code == 0
    lines = ended.out.splitlines()
    assert [line.split()[0] for line in lines] == list(METHODS)
    assert all(len(line.split()) > 2 for line in lines)


def test_describe_prints_page_and_options():
    ended = command("describe", "reverse_kl")
    assert ended.code == 0
    assert_says(ended.out, "reverse_kl\n==========", "arXiv 2605.11182", "KL( p", "Differs from the paper", "Options:")
    assert_says(ended.out, "average: Literal['token', 'sequence'] = 'sequence'", "temperature: float = 1.0")


def test_describe_prints_docstring_when_method_is_custom(mine: None):
    ended = command("describe", "mine:breaks")
    assert ended.code == 0
    assert_says(ended.out, "A method of one's own that goes wrong.", "times `value`", "at: int")


def test_describe_raises_config_error_when_method_is_unknown():
    ended = command("describe", "topk")
    assert ended.code == 2
    assert_says(ended.err, "ConfigError: There is no method 'topk'.", "Known: sft")


# --- what a teacher, the data or the tokens cannot give ---------------------------------------------------------------


@pytest.mark.parametrize("what", ["check", "train"])
@pytest.mark.parametrize(
    ("evaluate", "parts"),
    [
        ({"teacher": True}, ["Stage 'distil': it sets evaluate.teacher, and", "or evaluate.teacher to false"]),
        ({"kl": True}, ["Stage 'distil': it sets evaluate.kl, and there is no teacher", "or evaluate.kl to false"]),
        ({"teacher": True, "kl": True}, ["it sets evaluate.teacher and evaluate.kl, and there is no teacher"]),
    ],
    ids=["teacher", "kl", "both"],
)
@pytest.mark.parametrize("teacher", [None, "student"])
def test_evaluate_refuses_teacher_and_kl_without_teacher(
    no_weights: None, what: str, evaluate: dict[str, Any], parts: list[str], teacher: str | None
):
    measured = {"data": {"path": "held_out.jsonl"}, **evaluate}
    said = refusal(one_stage(method="sft", teacher=teacher, evaluate=measured), what=what)
    assert_says(said, "ConfigError: ", "method 'sft' has none, and the stage names none", *parts)
    assert_says(said, "Set the stage's `teacher` to one of the models other than 'student'")


def test_evaluate_compares_teacher_when_method_needs_none(work: Path):
    """A method without a teacher may still be compared with one."""
    measured = {"data": {"path": "held_out.jsonl"}, "kl": True, "teacher": True, "before": False}
    assert opd("train", one_stage(method="sft", evaluate=measured)).code == 0
    assert {"eval/reverse_kl", "eval/teacher/sampled/length"} <= {key for row in metrics() for key in row}


@pytest.mark.parametrize("what", ["check", "train"])
def test_diagnostics_raises_config_error_when_teacher_is_missing(no_weights: None, what: str):
    said = refusal(one_stage(method="sft", teacher=None, diagnostics={"every": 5}), what=what)
    assert_says(
        said, "ConfigError: Stage 'distil': diagnostics.every is 5, which compares the student with the teacher"
    )
    assert_says(said, "and method 'sft' has none. Set diagnostics.every to 0, or use a method with a teacher.")


@pytest.mark.parametrize("what", ["check", "train"])
@pytest.mark.parametrize("information", ["solution", "history"])
def test_privileged_context_raises_data_error_when_rows_lack_it(
    work: Path, no_weights: None, what: str, information: str
):
    rows = [{**ROW, "summary": "1+1=3 is wrong;"}, {**ROW, "summary": ""}, ROW]
    write_rows(work / "mine.jsonl", rows)
    data = {"path": "mine.jsonl", "columns": {"privileged_context": "summary"}}
    options = {"information": information}
    recipe = one_stage(method="context_distillation", teacher=None, options=options, data=data)
    said = refusal(recipe, what=what)
    assert_says(said, "DataError: This run needs `privileged_context` in every row, but 2 of 3 rows of mine.jsonl have")
    assert_says(said, "none (rows 1, 2)", "Its columns: prompt, summary. Fill it, or map it with `columns:`")


@pytest.mark.parametrize("what", ["check", "train"])
@pytest.mark.parametrize("token", ["<think>", [99]], ids=str)
def test_mask_tokens_raises_config_error_when_token_is_unknown(no_weights: None, what: str, token: Any):
    said = refusal(one_stage(method="local_support_matching", options={"k": 3, "mask_tokens": [token]}), what=what)
    assert_says(said, "ConfigError: ", str(token), "tokenizer")


def test_check_audits_rewards_and_counts_shared_prompts(work: Path):
    """The reward that cannot tell right from wrong, and held-out prompts that are training prompts, are told."""
    evaluate = {"data": {"path": "train.jsonl", "limit": 3}}
    (work / "mine.py").write_text("def always(prompt, response): return 1.0\n")
    said = opd("check", one_stage(reward={"name": "mine:always"}, evaluate=evaluate)).out
    assert_says(said, "the reward mine:always pays on 12 rows: right: the answer 1.00", "cannot tell right from wrong")
    assert_says(
        said, "3 of 3 held-out prompts are training prompts of student, word for word", "select: {by: {path: tra"
    )
    said = opd("check", one_stage(reward={"name": "exact"})).out
    assert_says(said, "the reward exact pays on 12 rows: right: the answer 1.00, in a sentence 0.00")
    assert "cannot tell" not in said
    assert "word for word" not in said


def test_check_refuses_answers_that_the_reward_cannot_read(work: Path):
    (work / "train.jsonl").write_text('{"prompt": "1+1=", "answer": "2"}\n{"prompt": "2+2=", "answer": "four"}\n')
    said = refusal(one_stage(reward={"name": "final_number"}))
    assert_says(
        said, "DataError: ", "the reward 'final_number' cannot read 1 of 2 rows (rows 1)", "'four' holds no num"
    )


def test_check_counts_answers_when_no_part_reads_them(work: Path):
    """Training without a reward is the usual case, so it is no mistake; but then no accuracy comes out."""
    measured = {"data": {"path": "held_out.jsonl"}}
    lines = opd("check", one_stage(evaluate=measured)).out.splitlines()
    unread = "{} rows have an `answer`, but no reward or method reads it, so accuracy is not measured"
    assert f"  {unread.format('12 training')}" in lines
    assert f"  {unread.format('5 held-out')}" in lines
    read = {**measured, "reward": {"name": "final_number"}}
    assert "have an `answer`" not in opd("check", one_stage(evaluate=read)).out, "the same answers, held out, are read"
    words = {"name": "max_words", "options": {"n": 3}}
    lines = opd("check", one_stage(reward={"name": "exact"}, evaluate={**measured, "reward": words})).out.splitlines()
    assert [line for line in lines if "have an `answer`" in line] == [f"  {unread.format('5 held-out')}"]
    assert "have an `answer`" not in opd("check", one_stage(evaluate=measured, reward={"name": "exact"})).out
    told = {"method": "context_distillation", "teacher": None, "options": {"information": "answer"}}
    assert "have an `answer`" not in opd("check", one_stage(**told)).out
    regex = {"name": "regex", "options": {"pattern": "[0-9]"}}
    assert_says(opd("check", one_stage(reward=regex)).out, unread.format("12 training"))
    (work / "mine.py").write_text("def reward(prompt, response): return 1.0\n")
    assert "have an `answer`" not in opd("check", one_stage(reward={"name": "mine:reward"})).out
    assert_says(opd("train", one_stage()).out, f"distil: {unread.format('12 training')}")


def test_select_reports_kept_and_left_out_rows(work: Path):
    """Prompts that the teacher was trained on, mixed with others as two tasks of one teacher."""
    write_rows(work / "theirs.jsonl", [{"prompt": "0+0="}, {"prompt": "1 + 0="}, {"prompt": "1+0="}])
    by = {"path": "theirs.jsonl"}
    tasks = {
        "aligned": {"data": {"path": "train.jsonl", "skip": 1, "select": {"by": by, "keep": "near"}}, "share": 3},
        "other": {"data": {"path": "train.jsonl", "template": "{prompt}+", "select": {"by": by, "keep": "far"}}},
    }
    for task in tasks.values():
        task["teacher"] = "teacher"
    recipe = one_stage(data=None, teacher=None, tasks=tasks, task_order="mixed", prompts_per_step=4, samples_every=1)
    ended = opd("check", recipe)
    assert ended.code == 0, ended.err
    near = "train.jsonl: 1 of 11 rows selected (10 not near those of theirs.jsonl by equal text)"
    far = "train.jsonl: 10 of 12 rows selected (2 near those of theirs.jsonl by equal text)"
    assert_says(ended.out, "  task aligned: 1 prompts", "  task other: 10 prompts")
    assert_says(ended.out, f"  task aligned: {near}", f"  task other: {far}")
    ended = opd("train", recipe)
    assert ended.code == 0, ended.err
    assert_says(ended.out, f"distil, task aligned: {near}", f"distil, task other: {far}")
    rows = [row for file in sorted(Path("run/distil/samples").glob("*.parquet")) for row in read_table(file)]
    prompts = {task: {row["prompt"] for row in rows if row["task"] == task} for task in tasks}
    assert prompts["aligned"] == {"1+0="}
    assert all(prompt.endswith("=+") for prompt in prompts["other"])
    assert [row["task"] for row in rows].count("aligned") == 6
    ids = {task: {row["prompt_id"] for row in rows if row["task"] == task} for task in tasks}
    assert not ids["aligned"] & ids["other"], "a row that keeps its number after others are gone shares it with nobody"


def test_select_refuses_bad_keys_and_empty_result(no_weights: None):
    data = {"path": "train.jsonl", "select": {"kep": "near", "threshold": 2}}
    said = refusal(one_stage(data=data))
    assert_says(said, "unknown key `stages.0.data.select.kep`. Did you mean 'keep'?", "by, keep, distinct, measure")
    assert_says(said, "`stages.0.data.select.threshold`", "less than or equal to 1 (got 2)")
    data["select"] = {"by": {"path": "x.jsonl", "lmit": 3}, "keep": "near"}
    assert_says(refusal(one_stage(data=data)), "unknown key `stages.0.data.select.by.lmit`. Did you mean 'limit'?")
    data["select"] = {"by": {"path": "held_out.jsonl"}, "keep": "near"}
    said = refusal(one_stage(data={**data, "limit": 3}), what="check")
    assert_says(said, "DataError: `select` leaves no row of train.jsonl: 3 not near those of held_out.jsonl", "Change")


# --- what is said when nothing is wrong ------------------------------------------------------------------------------


def test_check_prints_summary_when_recipe_is_valid(no_weights: None):
    ended = opd("check", one_stage(evaluate={"data": {"path": "held_out.jsonl"}}))
    assert ended.code == 0, ended.err
    assert_says(ended.out, "stage distil: reverse_kl, 12 prompts, 5 held out", "longest prompt: 4 tokens")
    assert_says(ended.out, "student and teacher map every token to the same id", "recipe.yaml: nothing wrong found.")
    assert not Path("run").exists()


def numbers(ended: Ended) -> dict[str, float]:
    assert ended.code == 0, ended.err
    return {name: float(value) for name, value in (line.split() for line in ended.out.splitlines())}


def test_eval_prints_reproducible_metrics(model_folder: Path):
    reward = ("--reward", "regex", "--option", r"pattern='[0-9]'")
    ask = ("eval", "model", "held_out.jsonl", *reward, "--n", "4", "--max-completion-length", "3", "--teacher", "model")
    got = numbers(command(*ask))
    assert got["responses"] == 20
    assert 0 < got["length"] <= 3
    assert 0 <= got["reward_low"] <= got["reward"] <= got["reward_high"] <= 1
    assert got["reward"] <= got["pass@2"] <= got["pass@4"] <= 1
    assert got["reverse_kl"] == got["forward_kl"] == 0
    assert numbers(command(*ask)) == got
    assert numbers(command(*ask, "--seed", "1")) != got
    assert numbers(command(*ask, "--limit", "2"))["responses"] == 8


def test_eval_reads_columns_under_their_own_names(model_folder: Path):
    rows = [json.loads(line) for line in Path("held_out.jsonl").read_text().splitlines()]
    write_rows(Path("named.jsonl"), [{"question": row["prompt"], "final": row["answer"]} for row in rows])
    ask = ("--reward", "exact", "--max-completion-length", "2")
    expected = numbers(command("eval", "model", "held_out.jsonl", *ask))
    named = ("--column", "prompt=question", "--column", "answer=final")
    assert numbers(command("eval", "model", "named.jsonl", *ask, *named)) == expected
    assert_says(command("eval", "model", "named.jsonl", "--column", "promt=question").err, "Did you mean 'prompt'?")


def test_eval_prints_json_and_writes_responses(model_folder: Path):
    ask = ("eval", "model", "held_out.jsonl", "--reward", "exact", "--n", "2", "--max-completion-length", "2")
    expected = numbers(command(*ask))
    ended = command(*ask, "--json", "--responses", "responses.jsonl")
    assert ended.code == 0, ended.err
    found = json.loads(ended.out)
    assert found["model"] == "model"
    assert found["metrics"] == pytest.approx(expected, rel=1e-3)
    assert {"pass@2", "pass@2_low", "pass@2_high"} <= found["metrics"].keys()
    rows = [json.loads(line) for line in Path("responses.jsonl").read_text().splitlines()]
    assert [(row["prompt_id"], row["sample"]) for row in rows] == [(i, s) for i in range(5) for s in range(2)]
    assert sum(row["metrics"]["reward"] for row in rows) / 10 == pytest.approx(found["metrics"]["reward"])
    assert rows[0].keys() == {
        *("task", "setting", "prompt_id", "sample", "prompt", "target", "response", "tokens", "finished", "metrics")
    }


def test_eval_counts_answers_when_reward_does_not_read_them(model_folder: Path):
    ask = ("eval", "model", "held_out.jsonl", "--max-completion-length", "1")
    unread = "eval: 5 held-out rows have an `answer`, but no reward or method reads it"
    assert unread not in command("eval", "./modl", *ask[2:]).err, "what is refused comes alone"
    assert_says(command(*ask).err, unread)
    assert_says(command(*ask, "--reward", "regex", "--option", "pattern=x").err, unread)
    assert "have an `answer`" not in command(*ask, "--reward", "exact").err


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (("./modl", "held_out.jsonl"), ["opd eval MODEL: modl does not exist. Did you mean 'model'?"]),
        ((".", "held_out.jsonl"), ["opd eval MODEL: . has no config.json and 0 GGUF files"]),
        (("model", "held_out.jsonl", "--teacher", "./modl"), ["opd eval --teacher: modl does not exist"]),
        (
            ("model", "held_out.jsonl", "--option", "n=1"),
            ["ConfigError: opd eval got --option n=1", "--reward is not given"],
        ),
        (("model",), ["neither held-out prompts nor --tasks", "--tasks gsm8k"]),
        (("model", "--stage", "a"), ["--stage a without --recipe"]),
        (("model", "--set", "seed=1", "--set", "name=x"), ["--set seed=1 name=x without --recipe"]),
        (("model", "--recipe", "sftt"), ["sftt", "Did you mean 'sft'?"]),
        (("model", "--recipe", "sft", "--limit", "0"), ["--limit 0", "at least 1"]),
        (("model", "--recipe", "sft", "--set", "seeds=1"), ["seeds"]),
        (("model", "--recipe", "sft", "--stage", "lern"), ["The recipe has no stage 'lern'"]),
        (("./modl", "--recipe", "sft"), ["opd eval MODEL: modl does not exist. Did you mean 'model'?"]),
        (
            ("model", "held_out.jsonl", "--recipe", "sft", "--n", "2", "--chat"),
            ["--recipe sft and DATA (held_out.jsonl), --chat, --n", "--set stages.STAGE.evaluate.sampling.SETTING.n=8"],
        ),
        (("model", "--tasks", "gsm8k", "--reward", "exact"), ["--reward exact without held-out prompts"]),
        (("model", "--tasks", "gsm8k", "--teacher", "model"), ["--teacher model without held-out prompts"]),
        (("model", "held_out.jsonl", "--fewshot", "2"), ["--fewshot 2 without --tasks"]),
        (("model", "held_out.jsonl", "--task-folder", "x"), ["--task-folder x without --tasks"]),
        (("model", "held_out.jsonl", "--responses", "no/file"), ["--responses no/file", "does not exist, no"]),
        (("model", "held_out.jsonl", "--responses", "."), ["--responses .", "is a folder"]),
        (("model", "held_ot.jsonl"), ["held_ot.jsonl does not exist. Did you mean 'held_out.jsonl'?"]),
        (("model", "held_out.jsonl", "--reward", "exct"), ["There is no reward 'exct'. Did you mean 'exact'?"]),
        (("model", "held_out.jsonl", "--n", "0"), ["n", "1"]),
        (("model", "held_out.jsonl", "--temperature", "-1"), ["temperature", "-1"]),
        (("model", "held_out.jsonl", "--top-p", "1.5"), ["top_p", "1.5"]),
        (("model", "held_out.jsonl", "--reward", "regex", "--option", "pattern"), ["pattern"]),
        (("model", "held_out.jsonl", "--reward", "regex", "--option", "pattern=[1"), ["pattern"]),
        (("model", "held_out.jsonl", "--limit", "0"), ["`limit`", "greater than or equal to 1 (got 0)"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_eval_refuses_bad_arguments(model_folder: Path, arguments: tuple[str, ...], parts: list[str]):
    ended = command("eval", *arguments)
    assert ended.code == 2
    assert_says(ended.err, *parts)


def test_train_prints_no_control_characters_when_piped(work: Path):
    """Output in a pipe has no control characters."""
    ended = opd("train", one_stage(evaluate={"data": {"path": "held_out.jsonl"}}))
    assert ended.code == 0, ended.err
    assert "\x1b" not in ended.out
    assert_says(ended.out, "distil: 2 steps", "AutoModelForCausalLM.from_pretrained")
    assert os.path.exists("run/distil/model/model.safetensors")
