"""Recipes whose student and teacher have a tokenizer each: what runs, what is refused, and how that is said."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.runs import forbid, one_stage, prepare, tiny_model

import opd
from opd.commands.check import check_recipe
from opd.commands.doctor.examine import examine
from opd.errors import AlignmentError, ConfigError
from opd.method import Method
from opd.methods import METHODS
from opd.methods.coherence import Facts, check_coherence
from opd.models.loading import load_model
from opd.models.new import character_tokenizer
from opd.pieces.signals import divergence
from opd.pieces.supports import full, top_k, units
from opd.pieces.teacher_rules import external
from opd.recipe.load import parse_recipe
from opd.recipe.schema import ModelSpec
from opd.runs.prepare import Given
from opd.runs.prepare import prepare as prepared

MERGES = [["1", "+"], ["=", "1"]]


def two(method: str = "simct", **stage: Any) -> dict[str, Any]:
    """The shortest recipe, with a teacher whose tokenizer joins two pairs and numbers its tokens differently."""
    recipe = one_stage(method=method, **stage)
    recipe["models"]["teacher"] = tiny_model(1, hidden_size=24)
    recipe["models"]["teacher"]["tokenizer"] = {"characters": ";=+9876543210", "merges": MERGES}
    return recipe


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return prepare(tmp_path, two())


@pytest.mark.parametrize("chat", [False, True])
def test_prepare_takes_chat_from_training_prompts(work: Path, chat: bool):
    """A conversation among the held-out prompts does not turn a text's end into a turn's."""
    held_out = {"path": "held_out.jsonl", "chat": not chat}
    recipe = parse_recipe(two(data={"path": "train.jsonl", "chat": chat}, evaluate={"data": held_out}))
    assert prepared(recipe.stage("distil"), Given(), recipe.seed).chat == chat


def refused(recipe: dict[str, Any], kind: type[Exception] = ConfigError) -> str:
    with pytest.raises(kind) as caught:
        check_recipe(parse_recipe(recipe))
    return str(caught.value)


@pytest.mark.parametrize("method", ["simct", "uld"])
def test_run_logs_unit_metrics_when_tokenizers_differ(work: Path, method: str):
    held_out = {"data": {"path": "held_out.jsonl"}, "teacher": True}
    rows = opd.run(two(method, steps=3, evaluate=held_out), quiet=True).metrics
    trained = [row for row in rows if "train/loss" in row]
    assert len(trained) == 3
    assert all(row["units/coverage"] == 1.0 for row in trained)
    assert all(0 < row["units/shared_coverage"] <= 1.0 for row in trained)
    assert all(row["units/signal"] > 0 and row["optim/grad_norm"] > 0 for row in trained)
    assert any("eval/teacher/sampled/length" in row for row in rows)


@pytest.mark.parametrize("method", ["reverse_kl", "opd", "gkd"])
def test_check_refuses_other_vocabulary_from_tokenizers_alone(work: Path, monkeypatch, method: str):
    """Of two folders, whose weights are not read: the refusal names the method for two tokenizers."""
    for name, characters in (("student", "0123456789+=;"), ("teacher", ";=+9876543210")):
        load_model(ModelSpec(**tiny_model(1, characters=characters)), name=name).model.save_pretrained(work / name)
        character_tokenizer(characters).save_pretrained(work / name)
    forbid(monkeypatch, "opd.runs.build.load_model")
    recipe = one_stage(method=method)
    recipe["models"] = {name: {"path": name} for name in ("student", "teacher")}
    message = refused(recipe, AlignmentError)
    assert "The tokenizers of student (15 tokens) and teacher (15) differ" in message
    assert "or use a method for two tokenizers, such as simct" in message
    check_recipe(parse_recipe({**recipe, "stages": [{**recipe["stages"][0], "method": "simct"}]}))


def test_check_recipe_counts_shared_tokens_of_two_tokenizers(work: Path):
    lines = check_recipe(parse_recipe(two()))
    assert any("student (15 tokens) and teacher (17) share 15 tokens" in line for line in lines)
    assert not any("map every token to the same id" in line for line in lines)


def test_reverse_kl_raises_alignment_error_for_two_tokenizers(work: Path):
    assert "or use a method for two tokenizers, such as simct" in refused(two("reverse_kl"), AlignmentError)


@pytest.mark.parametrize(
    ("stage", "parts"),
    [
        ({"diagnostics": {"every": 5, "k": 3}}, ["diagnostics.every compares", "Set it to 0; the metric units/signal"]),
        (
            {"evaluate": {"data": {"path": "held_out.jsonl"}, "kl": True}},
            ["Stage 'distil': evaluate.kl compares student and teacher token by token", "Set it to false"],
        ),
    ],
    ids=["diagnostics", "kl"],
)
def test_check_recipe_refuses_comparison_when_tokenizers_differ(work: Path, stage: dict[str, Any], parts: list[str]):
    said = refused(two(**stage))
    assert all(part in said for part in parts), said


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (
            lambda: Method(teacher=external("any"), support=top_k(3), signal=divergence()),
            "'any' and the support 'top_k'",
        ),
        (lambda: Method(support=units(), signal=divergence()), "'students' and the support 'units'"),
    ],
    ids=["support", "teacher"],
)
def test_check_coherence_refuses_units_or_external_alone(make: Callable[[], Method], said: str):
    with pytest.raises(ConfigError, match=said):
        check_coherence(Facts(method=make()), "Stage 'distil': method 'mine:method'")


def test_check_coherence_accepts_every_method():
    for name, function in METHODS.items():
        method = function(**({"template": "{prompt}"} if name == "context_distillation" else {}))
        check_coherence(Facts(method=method), name)
    check_coherence(Facts(method=Method(support=full(), signal=divergence())), "full")


def test_examine_skips_token_checks_when_tokenizers_differ(work: Path):
    report = examine(parse_recipe(two()), given=Given())
    skipped = {found.name: found.says for found in report.findings if found.level == "skipped"}
    assert {"tokens", "signal", "headroom/continuation"} <= set(skipped)
    assert all("its own tokenizer" in skipped[name] for name in ("tokens", "signal", "headroom/continuation"))
    assert "cost/step" in {found.name for found in report.findings} - set(skipped)


def test_character_tokenizer_applies_merges_in_order():
    tokenizer = character_tokenizer("abc", [("a", "b"), ("ab", "c")])
    assert tokenizer.get_vocab() == {"<pad>": 0, "<eos>": 1, "a": 2, "b": 3, "c": 4, "ab": 5, "abc": 6}
    assert tokenizer("abcabbc").input_ids == [6, 5, 3, 4]
    assert tokenizer.decode([6, 5, 3, 4]) == "abcabbc"
    with pytest.raises(ConfigError, match=r"merge 'ab' \+ 'c' joins 'ab', which is neither .* Correct the order"):
        character_tokenizer("abc", [("ab", "c"), ("a", "b")])
