"""`opd init`: each set of answers gives a recipe that `opd check` accepts, with the method of docs/choosing.md."""

from __future__ import annotations

import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from support.gguf_files import model_file
from support.models import byte_tokenizer
from support.runs import CHARACTERS, ENVIRONMENT, command, sums, tiny_model, write_rows

from opd.commands.init import Answers, choose
from opd.errors import ConfigError
from opd.models.loading import load_model
from opd.models.new import character_tokenizer
from opd.recipe.load import load_recipe
from opd.recipe.schema import ModelSpec

ROOT = Path(__file__).parents[2]
URL = "http://127.0.0.1:8000"


QUESTIONS = ("Student:", "Teacher:", "Data:", "What there is", "Budget:", "Name of")


def save(folder: Path, seed: int, tokenizer: object) -> None:
    characters = "".join(map(chr, range(33, 127)))
    model = load_model(ModelSpec(**tiny_model(seed, characters=CHARACTERS if seed < 3 else characters)), name="m").model
    if seed == 3:
        model.resize_token_embeddings(len(tokenizer))  # type: ignore[arg-type]
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)  # type: ignore[attr-defined]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A student, a teacher of its tokenizer, and one of another."""
    folder = tmp_path_factory.mktemp("models")
    save(folder / "student", 1, character_tokenizer(CHARACTERS))
    save(folder / "teacher", 2, character_tokenizer(CHARACTERS))
    save(folder / "other", 3, byte_tokenizer())
    return folder


@pytest.fixture
def work(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("student", "teacher", "other"):
        (tmp_path / name).symlink_to(models / name)
    write_rows(tmp_path / "train.jsonl", sums(0, 25))
    monkeypatch.chdir(tmp_path)
    return tmp_path


MATRIX = [
    ("none", "exact", "grpo"),
    ("none", "privileged", "context_distillation"),
    ("none", "rule=1+1", "context_distillation"),
    ("none", "responses", "sft"),
    ("teacher", "nothing", "reverse_kl"),
    ("teacher", "exact", "mopd"),
    ("teacher", "privileged", "context_distillation"),
    ("teacher", "rule=1+1", "context_distillation"),
    ("teacher", "responses", "sft"),
    ("other", "nothing", "simct"),
    ("other", "exact", "simct"),
    ("other", "privileged", "simct"),
    ("other", "rule=1+1", "simct"),
    (URL, "nothing", "topk_reverse_kl"),
    (URL, "exact", "mopd"),
    (URL, "privileged", "context_distillation"),
    (URL, "rule=1+1", "context_distillation"),
]


@pytest.mark.parametrize(("teacher", "also", "method"), MATRIX)
def test_init_writes_recipe_that_check_accepts(work: Path, teacher: str, also: str, method: str):
    flags = {"teacher": teacher, "also": also, "data": "train.jsonl", "student": "student", "budget": "7"}
    ended = command("init", "--name", "mine", *(part for flag in flags for part in (f"--{flag}", flags[flag])))
    assert ended.code == 0, ended.err
    assert ended.out.splitlines()[:2] == ["mine.yaml written", "recipe.schema.json written"]
    checked = command("check", "mine.yaml")
    assert checked.code == 0, checked.err
    recipe = load_recipe("mine.yaml")
    (stage,) = recipe.stages
    assert (recipe.name, stage.method, stage.steps) == ("mine", method, 7)
    assert (stage.teacher is None) == (teacher == "none" or also == "responses")
    assert stage.evaluate is not None
    assert stage.data is not None
    assert stage.data.skip == stage.evaluate.data.limit == 2  # a tenth of 25 rows; no row in both
    assert re.search(r"^  # .+\n(  # .+\n)*  method: ", (work / "mine.yaml").read_text(), re.MULTILINE)


def test_init_of_few_rows_holds_none_out(work: Path):
    write_rows(work / "few.jsonl", sums(0, 12))
    command("init", "--student", "student", "--teacher", "teacher", "--data", "few.jsonl")
    recipe = load_recipe("student.yaml")
    assert recipe.stages[0].evaluate is None
    assert command("check", "student.yaml").code == 0


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--data", "train.jsonl"], "--student is not given"),
        (["--student", "student"], "--data is not given"),
        (["--student", "student", "--data", "train.jsonl"], "neither a teacher nor a reward"),
        (["--student", "student", "--data", "none.jsonl", "--also", "exact"], "none.jsonl"),
        (["--student", "student", "--data", "train.jsonl", "--also", "exakt"], "Did you mean 'exact'"),
        (["--student", "student", "--data", "train.jsonl", "--also", "exact", "--budget", "1h"], "a number of steps"),
    ],
)
def test_init_refuses_answers_and_writes_nothing(work: Path, flags: list[str], said: str):
    before = set(work.iterdir())
    ended = command("init", *flags)
    assert ended.code == 2
    assert said in ended.err
    assert set(work.iterdir()) == before


FROM_GGUF = ("init", "--student", "student.gguf", "--data", "train.jsonl", "--also", "exact", "--name", "mine")


@pytest.mark.parametrize("template", [None, "{% for m in messages %}{{ m.content }}<eos>{% endfor %}"])
def test_init_reads_the_tokenizer_of_a_gguf_file(work: Path, template: str | None):
    """Before its conversion: prompts of text are messages where the file has a chat template."""
    more = {} if template is None else {"tokenizer.chat_template": template}
    model_file(work / "student.gguf", add=more, max_position_embeddings=512)
    assert command(*FROM_GGUF).code == 0
    written = yaml.safe_load((work / "mine.yaml").read_text())
    assert written["stages"][0]["data"]["chat"] == (template is not None)
    assert "is read with its weights" not in (work / "mine.yaml").read_text()


def test_init_says_that_a_gguf_tokenizer_is_read_later(work: Path):
    model_file(work / "student.gguf", add={"tokenizer.ggml.pre": "of-a-later-version"}, max_position_embeddings=512)
    ended = command(*FROM_GGUF)
    assert ended.code == 0, ended.err
    assert "tokenizer is read with its weights" in " ".join((work / "mine.yaml").read_text().split("\n  # "))
    assert command("check", "mine.yaml").code == 0


def test_init_keeps_an_existing_file(work: Path):
    (work / "student.yaml").write_text("mine")
    ended = command("init", "--student", "student", "--data", "train.jsonl", "--also", "exact")
    assert (ended.code, (work / "student.yaml").read_text()) == (1, "mine")
    assert "student.yaml exists" in ended.err


def test_init_has_six_questions_on_a_terminal(work: Path):
    master, slave = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "opd", "init"], stdin=slave, stdout=slave, stderr=slave, env=ENVIRONMENT, cwd=work
    )
    os.close(slave)
    os.write(master, b"student\nteacher\ntrain.jsonl\n\n9\ntyped\n")
    shown = b""
    while True:
        try:
            part = os.read(master, 4096)
        except OSError:  # the other end is closed
            break
        if not part:
            break
        shown += part
    assert process.wait(timeout=300) == 0, shown
    os.close(master)
    text = shown.decode()
    assert all(question in text for question in QUESTIONS)
    assert load_recipe("typed.yaml").stages[0].steps == 9


def test_choose_names_only_methods_and_pages_that_exist():
    page = (ROOT / "docs" / "choosing.md").read_text()
    for teacher, also, method in MATRIX:
        given = Answers(student="s", teacher=teacher, data="d", also=also, budget="1", name="n")
        choice = choose(given, same_tokens=teacher != "other")
        assert choice.method == method
        assert f"`{method}`" in page or method == "mopd"
        assert all((ROOT / path).exists() for path in re.findall(r"docs/[\w/]+\.md", choice.why))


def test_choose_refuses_nothing_to_learn_from():
    with pytest.raises(ConfigError, match="nothing to learn from"):
        choose(Answers(student="s", teacher="none", data="d", also="nothing", budget="1", name="n"), same_tokens=True)
