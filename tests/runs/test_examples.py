"""`opd check`, the start of a run, and every row of samples and held-out responses show what is read, as rendered."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.gguf_files import write_file
from support.models import byte_tokenizer, tiny
from support.runs import EVALUATE, command, forbid, one_stage, prepare, self_taught, tiny_model, write_rows

import opd
from opd.commands.check import check_recipe
from opd.method import Method
from opd.models import gguf
from opd.pieces import solutions
from opd.pieces.contexts import privileged
from opd.pieces.needs import Input, Trait, needing, needs_of
from opd.recipe.load import parse_recipe
from opd.runs.examples import AT_START, start_lines
from opd.runs.prepare import Given
from opd.runs.prepare import prepare as prepare_stage
from opd.stage.folder import StageDir
from opd.types import Rollout

# Special tokens of the tiny models are <pad> and <eos>; other characters than digits and +=; are <pad>.
STUDENTS = (
    "{% for message in messages %}{{ message.content }}<eos>{% endfor %}{% if add_generation_prompt %}+;{% endif %}"
)
TEACHERS = (
    "<eos>{% for message in messages %}{{ message.content }};{% endfor %}{% if add_generation_prompt %}={% endif %}"
)
CHAT = {"path": "train.jsonl", "chat": True}
HELD_OUT = {**EVALUATE, "data": {"path": "held_out.jsonl", "chat": True}}


@pytest.fixture(autouse=True)
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    prepare(tmp_path, one_stage())
    monkeypatch.chdir(tmp_path)
    return tmp_path


def lines_of(recipe: Mapping[str, Any]) -> list[str]:
    return [line.strip() for line in check_recipe(parse_recipe(recipe))]


def chatting(student: str = STUDENTS, teacher: str = TEACHERS, **stage: Any) -> dict[str, Any]:
    """One stage on conversations; student and teacher have these chat templates."""
    recipe = one_stage(data=CHAT, **stage)
    recipe["models"]["student"]["chat_template"] = student
    recipe["models"]["teacher"]["chat_template"] = teacher
    return recipe


def read_in(lines: list[str]) -> list[str]:
    """The lines on what the models read, and what ends a response."""
    return [line for line in lines if " reads " in line or line.startswith("a response ends")]


# --- opd check -------------------------------------------------------------------------------------------------------


def test_check_shows_what_both_models_read():
    assert read_in(lines_of(chatting(evaluate=HELD_OUT))) == [
        "the student reads (7 tokens): '0+0=<eos>+;'",
        "the teacher reads (7 tokens): '<eos>0+0=;='",
        "a response ends with <eos> (1)",
        "of the held-out prompts, the student reads (7 tokens): '2+2=<eos>+;'",
        "of the held-out prompts, the teacher reads (7 tokens): '<eos>2+2=;='",
    ]


def test_check_says_the_same_when_teacher_reads_the_same():
    assert lines_of(one_stage())[-3:] == [
        "the student reads (4 tokens): '0+0='",
        "the teacher reads the same",
        "a response ends with <eos> (1)",
    ]


def test_check_shows_doubled_token_of_template():
    assert "the student reads (8 tokens): '<eos><eos>0+0=;='" in lines_of(chatting(student="<eos>" + TEACHERS))


def test_check_shows_missing_generation_prompt():
    without = STUDENTS.partition("{% if")[0]
    assert "the student reads (5 tokens): '0+0=<eos>'" in lines_of(chatting(student=without))


def test_check_shows_held_out_prompts_without_chat():
    lines = lines_of(chatting(evaluate={**HELD_OUT, "data": {"path": "held_out.jsonl"}}))
    assert "the student reads (7 tokens): '0+0=<eos>+;'" in lines
    assert "of the held-out prompts, the student reads (4 tokens): '2+2='" in lines


def test_check_shows_answer_inside_the_prompt(work: Path):
    write_rows(work / "train.jsonl", [{"prompt": "1+1=2", "response": "2"}])
    lines = lines_of(one_stage(method="sft", teacher=None))
    assert "the student reads (5 tokens): '1+1=2'" in lines
    assert "a response of the data is (2 tokens): '2<eos>'" in lines


def test_check_shows_prefill_of_prompt():
    recipe = self_taught(chat_template=STUDENTS)
    stage = {**recipe["stages"][0], "data": CHAT, "options": {"prefill": "{answer};", "k": 4}}
    assert "the student as its teacher reads (9 tokens): '0+0=<eos>+;0;'" in lines_of({**recipe, "stages": [stage]})


def test_check_shows_privileged_context():
    assert "the student as its teacher reads (10 tokens): '0+0=0;0+0='" in lines_of(self_taught())


def test_check_shortens_long_prompt(work: Path):
    write_rows(work / "train.jsonl", [{"prompt": "1" * 90 + "+" * 90, "response": "2"}])
    shown = f"the student reads (180 tokens): {'1' * 60!r} ... 60 tokens left out ... {'+' * 60!r}"
    assert shown in lines_of(one_stage())


def test_check_names_stop_texts_and_ids_of_generation_config(work: Path):
    lm = tiny("llama", byte_tokenizer())
    lm.model.generation_config.eos_token_id = [1, 0]
    lm.model.save_pretrained(work / "model")
    lm.tokenizer.save_pretrained(work / "model")
    recipe = one_stage(sampling={"stop": ["\n\n"]}, method="sft", teacher=None)
    recipe["models"] = {"student": {"path": "model"}}
    assert lines_of(recipe)[-1] == r"a response ends with <eos> (1) or <pad> (0), or with the text '\n\n'"


def test_check_labels_lines_with_tasks():
    recipe = one_stage(data=None, teacher=None, sampling=None)
    tasks = {name: {"data": CHAT, "teacher": name, "sampling": {"max_completion_length": 3}} for name in ("one", "two")}
    recipe["stages"][0]["tasks"] = tasks
    recipe["models"] = {
        "student": tiny_model(2, chat_template=STUDENTS),
        "one": tiny_model(1, chat_template=STUDENTS),
        "two": tiny_model(3, chat_template=TEACHERS),
    }
    assert lines_of(recipe)[-5:] == [
        "task one: the student reads (7 tokens): '0+0=<eos>+;'",
        "task one: the teacher reads the same",
        "task two: the student reads (7 tokens): '0+0=<eos>+;'",
        "task two: the teacher reads (7 tokens): '<eos>0+0=;='",
        "a response ends with <eos> (1)",
    ]


def test_check_says_that_gguf_is_shown_when_it_loads(work: Path, monkeypatch: pytest.MonkeyPatch):
    write_file(work / "model.gguf", {"general.architecture": "llama"})
    monkeypatch.setattr(gguf, "cached_gguf", lambda file: None)
    recipe = one_stage(method="sft", teacher=None)
    recipe["models"] = {"student": {"path": "model.gguf"}}
    said = "model student: its tokenizer comes with its weights, so what it reads is checked and shown when they load"
    assert said in lines_of(recipe)


# --- contexts that read responses ------------------------------------------------------------------------------------


def distilled(context: Any, folder: Path, capsys: pytest.CaptureFixture[str]) -> tuple[list[str], opd.api.Run]:
    """The lines at the start, and the run, of a student that is its own teacher with this context."""
    from opd.methods import build

    method: Method = build("context_distillation", {"template": "{prompt}{answer}", "k": 4})
    lm = tiny("llama", byte_tokenizer())
    run = opd.distill(
        student=lm.model,
        tokenizer=lm.tokenizer,
        prompts=[{"prompt": "ab", "answer": "c"}],
        method=Method(**{**{name: getattr(method, name) for name in method.__slots__}, "context": context}),
        steps=1,
        prompts_per_step=1,
        sampling={"max_completion_length": 3},
        output_dir=folder / "own",
    )
    return capsys.readouterr().out.splitlines(), run


def test_distill_shows_attempt_in_its_place(work: Path, capsys: pytest.CaptureFixture[str]):
    lines, run = distilled(privileged(template="{prompt}<user>{attempt}"), work, capsys)
    with_it = "reads, with [the response] in its place and a reward of 1 (17 tokens): 'ab<user>[the response]'"
    assert f"distill: the student as its teacher {with_it}" in lines
    for row in run.samples:
        assert (row["student_reads"], row["teacher_reads"]) == ("ab", f"ab<user>{row['response']}")


def test_distill_says_why_context_cannot_be_shown(work: Path, capsys: pytest.CaptureFixture[str]):
    def context(rollouts: list[Rollout]):
        return [rollouts[i].prompt for i in range(len(rollouts)) if rollouts[i].response_ids[0] >= 0]

    lines, _ = distilled(needing(context, Trait.READS_ATTEMPT), work, capsys)
    (line,) = [line for line in lines if "as its teacher" in line]
    assert "reads a text that depends on the response: see `teacher_reads` in the samples" in line
    assert "its context raises IndexError" in line


def test_check_says_that_context_compares_responses():
    context = privileged(template="{privileged_context}{prompt}", solutions=solutions.from_peers())
    assert Input.GROUP in needs_of(context)
    spec = parse_recipe(self_taught()).stages[0]
    prepared = prepare_stage(spec, Given(), 0)
    prepared = replace(prepared, method=replace(prepared.method, context=context))
    lm = tiny("llama", byte_tokenizer())
    assert start_lines(spec, prepared, {"student": lm})[1] == (
        "the student as its teacher reads a text that depends on the responses: see `teacher_reads` in the samples"
    )


# --- runs ------------------------------------------------------------------------------------------------------------


def test_train_prints_what_is_read_and_keeps_it_in_rows(work: Path):
    recipe = chatting(evaluate=HELD_OUT, samples_every=1)
    (work / "recipe.yaml").write_text(json.dumps(recipe))
    ended = command("train", "recipe.yaml")
    assert ended.code == 0, ended.err
    wanted = [f"distil: {line}" for line in read_in(lines_of(recipe))]
    assert [line for line in ended.out.splitlines() if line in wanted] == wanted
    stage = StageDir(work / "run/distil")
    for row in stage.read_samples():
        assert row["student_reads"] == f"{row['prompt']}<eos>+;"
        assert row["teacher_reads"] == f"<eos>{row['prompt']};="
        assert "".join(row["response_tokens"]).replace("<eos>", "").replace("<pad>", "") == row["response"]
        assert len(row["response_tokens"]) == len(row["response_ids"])
        assert (row["response_tokens"][-1] == "<eos>") == row["finished"]
    for row in stage.read_held_out("before"):
        assert row["student_reads"] == f"{row['prompt']}<eos>+;"
        assert row["teacher_reads"] == f"<eos>{row['prompt']};="
    for row in stage.read_held_out("teacher"):
        assert (row["student_reads"], row["teacher_reads"]) == (None, f"<eos>{row['prompt']};=")
    assert "'2+2=<eos>+;'\n    before: '" in ended.out


def test_samples_show_privileged_context(work: Path):
    recipe = self_taught()
    (work / "recipe.yaml").write_text(json.dumps({**recipe, "defaults": {**recipe["defaults"], "samples_every": 1}}))
    assert command("train", "recipe.yaml").code == 0
    rows = StageDir(work / "run/self").read_samples()
    read = {row["prompt"]: row["teacher_reads"] for row in rows}
    data = [json.loads(line) for line in (work / "train.jsonl").read_text().splitlines()]
    assert read == {row["prompt"]: row["privileged_context"] + row["prompt"] for row in data if row["prompt"] in read}
    assert {row["student_reads"] for row in rows} == set(read)


def test_samples_show_conversation_of_parts_and_doubled_token(work: Path, capsys: pytest.CaptureFixture[str]):
    lm = tiny("llama", byte_tokenizer())
    lm.tokenizer.chat_template = f"<eos><eos>{lm.tokenizer.chat_template}"
    parts = [{"type": "text", "text": "héy"}, {"type": "text", "text": "you"}]
    run = opd.distill(
        student=lm.model,
        tokenizer=lm.tokenizer,
        prompts=[{"prompt": [{"role": "system", "content": "s"}, {"role": "user", "content": parts}], "response": "ö"}],
        method="sft",
        steps=1,
        prompts_per_step=1,
        output_dir=work / "own",
    )
    (row,) = run.samples
    assert row["prompt"] == "héy\nyou"
    assert row["student_reads"] == "<eos><eos><system>s<user>héy\nyou<assistant>"
    assert row["teacher_reads"] is None
    assert row["response_tokens"] == ["", "ö", "<eos>"]
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("distill: ")]
    assert r"distill: the student reads (14 tokens): '<eos><eos><system>s<user>héy\nyou<assistant>'" in lines
    assert "distill: a response ends with <eos> (1)" in lines


def test_train_counts_lines_of_more_tasks(work: Path):
    recipe = one_stage(data=None, teacher=None, sampling=None)
    task = {"data": {"path": "train.jsonl"}, "teacher": "teacher", "sampling": {"max_completion_length": 3}}
    recipe["stages"][0]["tasks"] = dict.fromkeys("abcd", task)
    (work / "recipe.yaml").write_text(json.dumps(recipe))
    ended = command("train", "recipe.yaml")
    assert ended.code == 0, ended.err
    shown = [line for line in ended.out.splitlines() if line.startswith("distil: task ")]
    assert len([line for line in shown if " reads " in line]) == AT_START
    assert "distil: 3 more lines like these: `opd check` prints all" in ended.out


def test_samples_show_reading_of_the_tasks_teacher(work: Path):
    recipe = one_stage(data=None, teacher=None, sampling=None, samples_every=1, prompts_per_step=4)
    tasks = {name: {"data": CHAT, "teacher": name, "sampling": {"max_completion_length": 3}} for name in ("one", "two")}
    recipe["stages"][0] |= {"tasks": tasks, "task_order": "mixed"}
    recipe["models"] = {
        "student": tiny_model(2, chat_template=STUDENTS),
        "one": tiny_model(1, chat_template=STUDENTS),
        "two": tiny_model(3, chat_template=TEACHERS),
    }
    (work / "recipe.yaml").write_text(json.dumps(recipe))
    ended = command("train", "recipe.yaml")
    assert ended.code == 0, ended.err
    rows = StageDir(work / "run/distil").read_samples()
    assert {row["task"] for row in rows} == {"one", "two"}
    for row in rows:
        wanted = f"{row['prompt']}<eos>+;" if row["task"] == "one" else f"<eos>{row['prompt']};="
        assert row["teacher_reads"] == wanted


def test_train_renders_no_rows_when_no_samples_are_written(work: Path, monkeypatch: pytest.MonkeyPatch):
    (work / "recipe.yaml").write_text(json.dumps(one_stage(samples_every=0)))
    forbid(monkeypatch, "opd.stage.samples.text_of_ids")
    forbid(monkeypatch, "opd.stage.samples.token_texts")
    ended = command("train", "recipe.yaml")
    assert ended.code == 0, ended.err


def test_samples_file_holds_repeated_prompt_once(work: Path):
    stage = StageDir(work)
    stage.samples.mkdir()
    text = "".join(str(i) for i in range(30_000))
    rows = [{"student_reads": text + str(i % 16), "policy_logp": [i / 8.0, i / 16.0]} for i in range(128)]
    file = stage.write_samples(1, rows)
    assert file.stat().st_size < 17 * len(text)
    got = [{name: row[name] for name in ("step", *rows[0])} for row in stage.read_samples()]
    assert [{"step": 1, **row} for row in rows] == got
