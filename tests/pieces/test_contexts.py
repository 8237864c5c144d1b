"""What the teacher reads: every kind of privileged information, and what is said when it is not there."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.models import byte_tokenizer, rollout_of, said, tiny
from support.runs import one_stage, prepare, tiny_model, write_rows

import opd
from opd import methods
from opd.errors import ConfigError, DataError
from opd.models.render import render
from opd.pieces import contexts
from opd.pieces.solutions import from_peers
from opd.types import Prompt, Rollout

LM = tiny()
PROMPT = Prompt(id=4, content="ab", answer=7, privileged_context="hg")


def rollout(prompt: Prompt = PROMPT, reward: float | None = 1.0, unjudged: str | None = None) -> Rollout:
    return replace(rollout_of(LM, PROMPT, [4, 5], reward=reward, unjudged=unjudged), prompt=prompt)


def read(prompt: Prompt = PROMPT, reward: float | None = 1.0, unjudged: str | None = None, **context: Any) -> Prompt:
    (out,) = contexts.privileged(**context)([rollout(prompt, reward, unjudged)])
    return out


CHAT = replace(PROMPT, content=({"role": "system", "content": "s"}, {"role": "user", "content": "ab"}))


# --- templates and prefills ------------------------------------------------------------------------------------------


def test_privileged_fills_every_field():
    template = "{prompt}|{privileged_context}|{answer}|{attempt}|{verdict}"
    assert read(template=template).content == "ab|hg|7|cd|correct"
    assert read(template=template, reward=0.5).content == "ab|hg|7|cd|incorrect"
    assert read(template=template, reward=0.0, verdicts=("right", "not so")).content == "ab|hg|7|cd|not so"
    assert read(CHAT, template=template).content[1]["content"] == "ab|hg|7|cd|correct"


def test_privileged_keeps_braces_of_values():
    prompt = replace(PROMPT, content="{answer} {", privileged_context="{prompt}")
    assert read(prompt, template="{prompt}/{privileged_context}/{{}}").content == "{answer} {/{prompt}/{}"


def test_prefill_leaves_prompt_unchanged():
    got = read(prefill="so {answer}, {privileged_context}")
    assert (got.content, got.prefill) == ("ab", "so 7, hg")
    assert read(CHAT, prefill="so {answer}").content == CHAT.content
    assert rollout().prompt.prefill == ""


def test_privileged_keeps_begun_answer_tools_and_variables():
    """The student continues the beginning of the answer: the teacher reads it too, behind its own prefill."""
    own = {"tools": ({"name": "add"},), "chat_template_kwargs": {"enable_thinking": False}}
    prompt = replace(CHAT, prefill="It is ", **own)
    got = read(prompt, template="{prompt}|{attempt}", prefill="so {answer}. ", system="t")
    assert got.prefill == "so 7. It is "
    assert got.content[1]["content"] == "ab|It is cd"
    assert (got.tools, got.chat_template_kwargs) == (own["tools"], own["chat_template_kwargs"])


def test_privileged_combines_system_examples_template_prefill():
    got = read(CHAT, system="rule", examples=[("u", "a")], template="{prompt}!", prefill="<think>")
    said = [(message["role"], message["content"]) for message in got.content]
    assert said == [("system", "rule"), ("user", "u"), ("assistant", "a"), ("user", "ab!")]
    assert got.prefill == "<think>"


def test_render_appends_prefill_to_generation_prompt():
    tokenizer = byte_tokenizer()
    plain = render(CHAT, tokenizer)
    with_prefill = render(replace(CHAT, prefill="<think>x"), tokenizer)
    assert with_prefill == [*plain, *tokenizer("<think>x", add_special_tokens=False).input_ids]
    assert tokenizer.decode(with_prefill).endswith("<assistant><think>x")
    assert render(replace(PROMPT, prefill="cd"), LM.tokenizer) == render(replace(PROMPT, content="abcd"), LM.tokenizer)


@pytest.mark.parametrize(
    ("kind", "parts"),
    [
        ("answer", ["ab\n\n", "known to be: 7\n"]),
        ("solution", ["ab\n\n", "solution:\nhg\n"]),
        ("history", ["ab\n\n", "Earlier attempts at this problem, in summary:\nhg\n", "avoid what did not"]),
        ("feedback", ["ab\n\n", "attempt:\ncd\n", "checked and is correct."]),
        ("verified", ["ab\n\n", "previous attempt:\nhg\n", "Your answer is correct."]),
    ],
)
def test_privileged_shows_each_kind_of_information(kind: str, parts: list[str]):
    text = read(**contexts.INFORMATION[kind]).content
    assert isinstance(text, str)
    for part in parts:
        assert part in text
    assert text.startswith("ab")


def test_hint_is_prefilled_in_think_block():
    got = read(**contexts.INFORMATION["hint"])
    assert got.content == "ab"
    assert got.prefill == "<think>\nThe answer to this problem is 7.\n</think>\n\n"


# --- what is asked of the recipe -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "needs"),
    [
        ({"system": "s"}, set()),
        ({"template": "x{prompt}"}, set()),
        ({"information": "answer"}, {"answer"}),
        ({"information": "solution"}, {"privileged_context"}),
        ({"information": "hint"}, {"answer"}),
        ({"information": "feedback"}, {"reads_attempt", "reward"}),
        ({"information": "verified"}, {"reads_attempt", "reward", "privileged_context"}),
        ({"information": "solution", "peers": True}, {"reads_attempt", "reward", "group"}),
        ({"template": "{prompt}{attempt}"}, {"reads_attempt"}),
        ({"system": "s", "prefill": "{privileged_context}"}, {"privileged_context"}),
    ],
)
def test_context_distillation_declares_needs_of_options(options: dict[str, Any], needs: set[str]):
    assert said(methods.build("context_distillation", options).context) == needs


@pytest.mark.parametrize(
    ("context", "message"),
    [
        ({}, r"give `system`, `examples`, `template` or `prefill`"),
        (
            {"system": "s", "solutions": from_peers()},
            r"neither the template nor the prefill has this field; got template None",
        ),
        (
            {"template": "{question}{prompt}"},
            r"context's template has the fields \{prompt\} \(needed\), \{privileged_c",
        ),
        ({"template": "no field"}, r"\{prompt\} \(needed\).*; got \[\]"),
        ({"prefill": "{prompt}"}, r"context's prefill has the fields \{privileged_context\}, .*; got \['prompt'\]"),
        ({"template": "{prompt} }"}, r"template has braces that do not match: .* Write a literal brace twice"),
    ],
)
def test_privileged_refuses_wrong_context(context: dict[str, Any], message: str):
    with pytest.raises(ConfigError, match=message):
        contexts.privileged(**context)


@pytest.mark.parametrize(
    ("options", "twice"),
    [
        ({"information": "answer", "template": "{prompt}"}, "template"),
        ({"information": "hint", "prefill": "x"}, "prefill"),
    ],
)
def test_context_distillation_refuses_two_wordings(options: dict[str, Any], twice: str):
    with pytest.raises(ConfigError, match=f"sets `{twice}`, but the options set it too"):
        methods.build("context_distillation", options)
    one = methods.build("context_distillation", {"information": "hint", "template": "{prompt}"})
    assert said(one.context) == {"answer"}


@pytest.mark.parametrize("column", ["answer", "privileged_context"])
def test_privileged_raises_data_error_when_column_is_empty(column: str):
    with pytest.raises(DataError, match=f"Prompt 4 has no `{column}`, which the context shows. Fill the column"):
        read(replace(PROMPT, **{column: None}), template=f"{{prompt}}{{{column}}}")


def test_privileged_raises_data_error_when_reward_is_missing():
    with pytest.raises(
        DataError, match=r"response to prompt 4 has no reward, but the context .* Set the stage's `reward`"
    ):
        read(reward=None, template="{prompt}{verdict}")
    with pytest.raises(
        DataError, match=r"no reward, but .* Its reward failed \(timed out\)\. Run the same command again"
    ):
        read(reward=None, unjudged="timed out", template="{prompt}{verdict}")


# --- runs ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(prepare(tmp_path / "work", one_stage()))
    return tmp_path / "work"


def opsd(**stage: Any) -> dict[str, Any]:
    """A stage of self-distillation on characters that the tokenizer has."""
    letters = "".join(sorted({*"0123456789+=;<>/.,:", *"\n ", *map(chr, range(65, 91)), *map(chr, range(97, 123))}))
    recipe = one_stage(method="context_distillation", teacher=None, **stage)
    spec = tiny_model(2, characters=letters)
    spec["init"]["max_position_embeddings"] = 512
    return recipe | {"models": {"student": spec}}


@pytest.mark.parametrize("information", contexts.INFORMATION)
def test_context_distillation_trains_with_each_information(work: Path, information: str):
    reward = {"name": "final_number"} if information in ("feedback", "verified") else None
    run = opd.run(opsd(options={"information": information}, reward=reward), quiet=True)
    assert [row["step"] for row in run.metrics] == [1, 2]
    assert all(row["train/loss"] > 0 for row in run.metrics), "the teacher reads something else than the student"


def test_context_distillation_counts_unsolved_when_peers_is_set(work: Path):
    rows = [{"prompt": "1+1=", "answer": 2}, {"prompt": "1+2=", "answer": 3, "privileged_context": "three"}]
    write_rows(work / "mine.jsonl", rows)
    options = {"information": "solution", "peers": True}
    sampling = {"n": 3, "max_completion_length": 3}
    recipe = opsd(options=options, reward={"name": "final_number"}, data={"path": "mine.jsonl"}, sampling=sampling)
    run = opd.run(recipe, quiet=True)
    assert [row["context/unsolved"] for row in run.metrics] == [3.0, 3.0], "one of two prompts, and nobody is right"
    recipe["stages"][0]["sampling"] = {"n": 1}
    with pytest.raises(ConfigError, match="needs several responses per prompt"):
        opd.run(recipe, quiet=True)


def test_run_names_rows_without_answer_before_training(work: Path):
    write_rows(work / "mine.jsonl", [{"prompt": "1+1=", "answer": 2}, {"prompt": "1+2="}, {"prompt": "1+3="}])
    recipe = opsd(options={"information": "answer"}, data={"path": "mine.jsonl"})
    with pytest.raises(
        DataError, match=r"needs `answer` in every row, but 2 of 3 rows of mine.jsonl have none \(rows 1, 2"
    ):
        opd.run(recipe, quiet=True)
    assert not Path("run").exists()


def test_feedback_refuses_missing_reward_and_teacher_evaluation(work: Path):
    with pytest.raises(ConfigError, match=r"needs a reward: set the stage's `reward`"):
        opd.run(opsd(options={"information": "feedback"}), quiet=True)
    evaluate = {"data": {"path": "held_out.jsonl"}, "teacher": True}
    recipe = opsd(options={"information": "feedback"}, reward={"name": "final_number"}, evaluate=evaluate)
    with pytest.raises(ConfigError, match=r"reads the student's attempt, .* Set evaluate.teacher to false"):
        opd.run(recipe, quiet=True)


def test_evaluate_gives_reverse_kl_when_teacher_reads_feedback(work: Path):
    evaluate = {"data": {"path": "held_out.jsonl"}, "kl": True, "sampling": {"drawn": {"max_completion_length": 3}}}
    recipe = opsd(options={"information": "feedback"}, reward={"name": "final_number"}, evaluate=evaluate)
    run = opd.run(recipe, quiet=True)
    measured = [row["eval/reverse_kl"] for row in run.metrics if "eval/reverse_kl" in row]
    assert len(measured) == 2
    assert all(value > 0 for value in measured)
