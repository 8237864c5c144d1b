"""`opd rollouts` and `opd score`: their numbers against those of training, of the model itself and of a server."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from support.engines import Engine, refused, running
from support.models import DEVICE, full_logits
from support.runs import CHARACTERS, Ended, Strike, command, sums, tiny_model, write_rows

import opd
from opd.commands.score import request_of
from opd.data.prompts import load_prompts
from opd.data.records import KEY, read_records
from opd.models import saving
from opd.models.language_model import LanguageModel
from opd.models.loading import load_model
from opd.recipe.schema import DataSection, ModelSpec
from opd.samplers.hf import TransformersSampler
from opd.teachers.local import LocalTeacher
from opd.types import Record, ReservedStep, Rollout, Sampling, Scores

K = 4
SUPPORTS = {
    "sampled": ("--support", "sampled"),
    "teacher": ("--support", "teacher", "--k", f"{K}"),
    "student": ("--support", "student", "--k", f"{K}", "--top-k", "2"),
}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models, prompts and responses to them, at relative paths."""
    home = tmp_path_factory.mktemp("records")
    models = {"student": tiny_model(2), "teacher": tiny_model(1, hidden_size=24)}
    for name, spec in {**models, "other": tiny_model(3, characters=CHARACTERS[::-1])}.items():
        saving.save(load_model(ModelSpec(**spec), name=name, seed=0), home / name)
    write_rows(home / "prompts.jsonl", sums(0, 5))
    before = Path.cwd()
    os.chdir(home)
    ended = sampled_with("--top-k", f"{K}")
    os.chdir(before)
    assert ended.code == 0, ended.err
    return home


@pytest.fixture(autouse=True)
def inside(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(home)


@pytest.fixture
def engine() -> Iterator[Engine]:
    one = Engine(lm=loaded("teacher"), longest=512)
    with running(one):
        yield one


def sampled_with(*options: str) -> Ended:
    given = ("--data", "prompts.jsonl", "--n", "2", "--max-completion-length", "5", "--top-p", "0.9")
    return command("rollouts", "student", *given, "--out", "responses.parquet", *options)


def loaded(name: str) -> LanguageModel:
    return load_model(ModelSpec(path=f"./{name}"), name=name)


def scored(*options: str, file: str = "responses.parquet") -> list[tuple[Rollout, Scores]]:
    ended = command("score", file, "--out", "scored.parquet", *options)
    assert ended.code == 0, ended.err
    return [(rollout, scores) for rollout, scores in read_records("scored.parquet") if scores is not None]


def tensors(scores: Scores) -> dict[str, Any]:
    found = {name: getattr(scores, name) for name in scores.__dataclass_fields__ if name != "scored"}
    return {name: value for name, value in found.items() if value is not None}


def plain(**columns: Any) -> str:
    pq.write_table(pa.table({"prompt_ids": [[3, 4], [5]], "response_ids": [[6], [7, 8]], **columns}), "plain.parquet")
    return "plain.parquet"


def test_rollouts_are_those_of_sampler():
    lm = loaded("student")
    sampler = TransformersSampler(lm=lm, sampling=Sampling(max_completion_length=5, n=2, top_p=0.9))
    prompts = load_prompts(DataSection(path="prompts.jsonl"))
    wanted = sampler(prompts, seed=(0, ReservedStep.RECORDS), record=Record(top_k=K))
    found = [rollout for rollout, _ in read_records("responses.parquet")]
    for got, one in zip(found, wanted, strict=True):
        assert (got.prompt.id, got.sample, got.prompt.content) == (one.prompt.id, one.sample, one.prompt.content)
        assert (got.prompt_ids, got.text, got.finished) == (one.prompt_ids, one.text, one.finished)
        for name in ("response_ids", "trained", "sampler_logp", "policy_logp", "student_top_ids"):
            assert torch.equal(getattr(got, name), getattr(one, name)), name


def test_rollouts_say_what_they_wrote():
    ended = sampled_with("--limit", "3", "--out", "few.parquet")
    found = [rollout for rollout, _ in read_records("few.parquet")]
    tokens, cut = sum(len(one.response_ids) for one in found), sum(not one.finished for one in found)
    wanted = f"few.parquet: 6 responses to 3 prompts, {tokens} tokens; {cut} responses without an end"
    assert ended.out.splitlines() == [wanted]
    assert found[0].student_top_ids is None
    said = json.loads(pq.read_schema("few.parquet").metadata[KEY])
    assert said["models"] == {"student": "student"}
    assert said["sampling"]["top_p"] == 0.9
    assert said["tokens"]["vocabulary"] == loaded("student").vocabulary


@pytest.mark.parametrize("support", SUPPORTS)
def test_scores_equal_those_of_training(support):
    """Those of a local teacher that renders the prompts itself."""
    found = scored("--teacher", "teacher", *SUPPORTS[support])
    rollouts = [rollout for rollout, _ in found]
    teacher = LocalTeacher(lm=loaded("teacher"), micro_batch_tokens=4096, student_device=DEVICE)
    request = request_of(support, None if support == "sampled" else K, 2 if support == "student" else 0)
    wanted = teacher.score(rollouts, load_prompts_of(rollouts), request)
    for (_, got), one in zip(found, wanted, strict=True):
        assert tensors(got).keys() == tensors(one).keys()
        for name, value in tensors(one).items():
            assert torch.equal(tensors(got)[name], value.cpu()), name
        assert got.scored is not None
        assert bool(got.scored.all())


def load_prompts_of(rollouts: list[Rollout]) -> list[Any]:
    prompts = load_prompts(DataSection(path="prompts.jsonl"))
    return [prompts[rollout.prompt.id] for rollout in rollouts]


@pytest.mark.parametrize("support", SUPPORTS)
def test_scores_of_server_equal_those_of_model(engine, support):
    local = scored("--teacher", "teacher", *SUPPORTS[support])
    far = scored("--teacher", engine.url, *SUPPORTS[support])
    for (_, got), (_, one) in zip(far, local, strict=True):
        assert tensors(got).keys() == tensors(one).keys()
        for name, value in tensors(one).items():
            torch.testing.assert_close(tensors(got)[name], value, atol=1e-5, rtol=0.0)


def test_file_of_two_columns_is_scored_in_place():
    """The log-probs are those of the transformers model at the ids of the file."""
    file, lm = plain(reward=[0.5, 1.5]), loaded("teacher")
    ended = command("score", file, "--teacher", "teacher")
    assert ended.code == 0, ended.err
    assert "plain.parquet does not say which model wrote the ids: they are read as the teacher's" in ended.err
    rows = pq.read_table(file).to_pylist()
    assert [row["reward"] for row in rows] == [0.5, 1.5]
    values: list[float] = []
    for row in rows:
        ids = torch.tensor(row["response_ids"])
        logp = full_logits(lm.model, row["prompt_ids"], ids, lm.vocabulary).log_softmax(-1)
        assert row["teacher_logp"] == pytest.approx(logp.gather(1, ids[:, None])[:, 0].tolist(), abs=1e-5)
        values += row["teacher_logp"]
    mean = f"{sum(values) / 3:.4f} nats per token on average"
    assert ended.out == f"plain.parquet: 2 responses, 3 trained tokens scored, {mean} by teacher\n"


def test_scored_file_says_teacher_and_request():
    scored("--teacher", "teacher", *SUPPORTS["student"])
    said = json.loads(pq.read_schema("scored.parquet").metadata[KEY])
    assert (said["format"], said["library"]) == (1, f"opd {opd.__version__}")
    assert said["models"] == {"student": "student", "teacher": "teacher"}
    assert said["request"] == {"support": "student", "k": K, "top_k": 2, "temperature": 1.0}
    assert said["sampling"]["n"] == 2


def test_responses_without_an_answer_are_marked(engine):
    """The servers refuse one of twelve rows: its tokens have no scores, and a line counts it."""
    engine.fault = lambda arrived, said: refused(400, "no") if arrived.request.get("prompt") == [3, 4, 6] else said
    file = plain(prompt_ids=[[3, 4], *[[5]] * 11], response_ids=[[6], *[[7, 8]] * 11])
    ended = command("score", file, "--teacher", engine.url, "--tokenizer", "teacher", "--out", "scored.parquet")
    assert ended.code == 0, ended.err
    assert "12 responses, 22 trained tokens scored" in ended.out
    assert "; 1 responses have no scores by" in ended.out
    (_, first), (_, second), *_ = read_records("scored.parquet")
    assert first is not None
    assert second is not None
    assert (first.scored.tolist(), second.scored.tolist()) == ([False], [True, True])
    assert bool(first.teacher_logp.isnan().all())


def test_teacher_of_other_tokens_is_refused():
    ended = command("score", "responses.parquet", "--teacher", "other")
    assert ended.code == 2
    assert "AlignmentError: The tokenizers of the student" in ended.err
    ended = command("score", plain(), "--teacher", "teacher", "--tokenizer", "other")
    assert "AlignmentError: The tokenizers of the student" in ended.err


def test_server_needs_the_tokenizer_of_the_ids(engine):
    ended = command("score", plain(), "--teacher", engine.url)
    assert "plain.parquet does not say which model wrote them. Give the tokenizer: --tokenizer FOLDER." in ended.err
    assert not engine.arrived
    ended = command("score", plain(), "--teacher", engine.url, "--tokenizer", "other")
    assert "do not have the same tokens" in ended.err


def test_killed_scoring_leaves_the_old_file():
    """The process dies at its second batch of rows."""
    file = Path(plain(prompt_ids=[[3, 4]] * 300, response_ids=[[6, 7]] * 300))
    before = file.read_bytes()
    child = os.fork()
    if child == 0:
        try:
            Strike(call="opd.commands.score.scored_batch", nth=2).install()
            command("score", str(file), "--teacher", "teacher")
        finally:
            os._exit(1)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == -signal.SIGKILL
    assert file.read_bytes() == before
    ended = command("score", str(file), "--teacher", "teacher")
    assert "score: 256 of 300 responses\n" in ended.err
    assert "300 responses, 600 trained tokens scored" in ended.out


@pytest.mark.parametrize(
    ("columns", "said"),
    [
        ({"response_ids": [[6], [7, 99]]}, "Row 1 of plain.parquet: `response_ids` holds the id 99, but the teacher"),
        ({"prompt_ids": [[99], [5]]}, "Row 0 of plain.parquet: `prompt_ids` holds the id 99, but the teacher has only"),
        ({"prompt_ids": [[3], [5] * 600]}, "Row 1 of plain.parquet: prompt and response have 602 tokens, but the"),
        ({"trained": [[True], [True]]}, "Row 1 of plain.parquet: `trained` has 1 entries"),
    ],
)
@pytest.mark.parametrize("where", ["local", "served"])
def test_rows_that_the_teacher_lacks_are_named(engine, columns, said, where):
    teacher = "teacher" if where == "local" else engine.url
    ended = command("score", plain(**columns), "--teacher", teacher, "--tokenizer", "teacher")
    assert ended.code == 2
    assert said in ended.err
    assert not engine.scored


ON = ("score", "responses.parquet", "--teacher")
OUT = ("rollouts", "student", "--data", "prompts.jsonl", "--out")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((*ON, "teacher", "--support", "techer"), "got --support techer. Did you mean 'teacher'? Give one of sampled"),
        ((*ON, "teacher", "--support", "student"), "got --support student without --k. Give the number of tokens"),
        ((*ON, "teacher", "--k", "2"), "got --k 2 with --support sampled, which is one token. Leave --k out."),
        ((*ON, "teacher", "--support", "teacher", "--k", "0"), "A top-k support needs k of at least 1, got 0."),
        ((*ON, "teacher", "--support", "teacher", "--k", "99"), "--k and --top-k count tokens of the teacher, which"),
        ((*ON, "teacher", "--support", "student", "--k", "5"), "--k 5 reads 5 ids at each position from the column"),
        ((*ON, "teacher", "--top-k", "-1"), "opd score got --top-k -1. Give the number"),
        ((*ON, "teacher", "--served-model", "m"), "got --served-model m, and --teacher is no address of a server"),
        ((*ON, "teacher", "--out", "x.jsonl"), "--out x.jsonl does not end with .parquet, and records are Parquet"),
        ((*ON, "teacher", "--out", "no/x.parquet"), "--out no/x.parquet is in a folder that does not exist"),
        ((*ON, "./techer"), "opd score --teacher: techer does not exist. Did you mean 'teacher'?"),
        ((*ON, ""), "opd score got an empty path of a model"),
        ((*ON, "http://k@localhost:1"), "opd score --teacher: `urls`, number 1, holds more than an address"),
        (("score", "none.parquet", "--teacher", "teacher"), "none.parquet does not exist"),
        ((*OUT, "x.jsonl"), "--out x.jsonl does not end with .parquet"),
        ((*OUT, "x.parquet", "--top-k", "99"), "opd rollouts got --top-k 99, and the model has"),
        ((*OUT, "x.parquet", "--max-completion-length", "600"), "Lower --max-completion-length, or leave out"),
        ((*OUT, "x.parquet", "--n", "0"), "`n`: Input should be greater than or equal to 1"),
        (("rollouts", "", *OUT[2:], "x.parquet"), "opd rollouts got an empty path of a model"),
        (("rollouts", "./studnt", *OUT[2:], "x.parquet"), "opd rollouts MODEL: studnt does not exist. Did you mean"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_commands_refuse_what_cannot_work(arguments: tuple[str, ...], said: str):
    ended = command(*arguments)
    assert ended.code == 2
    assert said in ended.err, ended.err
    assert not Path("x.parquet").exists()
