"""Stages that start their servers: the losses of a local teacher, the engine's folder, early refusals."""

from __future__ import annotations

import json
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from support.runs import command, one_stage, prepare, tiny_model
from support.stand_in import all_end, pids, start
from transformers import AutoModelForCausalLM

import opd
from opd.errors import ConfigError, TeacherError
from opd.models import saving
from opd.models.language_model import LanguageModel
from opd.models.loading import load_model
from opd.parallel import ALONE
from opd.recipe.schema import EngineSection, ModelSpec, ServerSection, StageSpec, StartSection
from opd.runs.launched import Starter
from opd.stage.folder import StageDir
from opd.stage.progress import Progress

METHOD = {"method": "topk_reverse_kl", "options": {"k": 4, "by": "student", "form": "tail"}}


def teacher(folder: Path) -> LanguageModel:
    """A teacher in `folder`, whose template differs from the student's."""
    lm = load_model(ModelSpec(**tiny_model(1, hidden_size=24)), name="teacher", seed=0)
    lm.tokenizer.chat_template = "{% for message in messages %}1{{ message.content }}={% endfor %}"
    saving.save(lm, folder)
    return lm


def recipe(model: dict[str, Any], **stage: Any) -> dict[str, Any]:
    made = one_stage(**METHOD, steps=3, **stage)
    made["models"]["student"]["chat_template"] = "{% for message in messages %}{{ message.content }}{% endfor %}"
    made["stages"][0]["data"] = {"path": "train.jsonl", "chat": True}
    return made | {"models": made["models"] | {"teacher": model}}


def run(folder: Path, made: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> list[float]:
    folder.mkdir()
    monkeypatch.chdir(folder)
    prepare(folder, made)
    opd.run("recipe.yaml", quiet=True)
    rows = [json.loads(line) for line in next(folder.glob("run/*/metrics.jsonl")).read_text().splitlines()]
    return [row["train/loss"] for row in rows if "train/loss" in row]


def test_run_with_started_teacher_equals_local_run(tmp_path, monkeypatch):
    """The template and the tokens are those of the teacher's path, in both."""
    teacher(tmp_path / "teacher")
    local = run(tmp_path / "local", recipe({"path": "../teacher"}), monkeypatch)
    section = {"server": {"start": start("scores", path="../teacher"), "patience_s": 5.0}}
    far = run(tmp_path / "far", recipe(section), monkeypatch)
    assert far == pytest.approx(local, abs=1e-5)
    (log,) = (tmp_path / "far" / "run").glob("*/vllm-teacher.log")
    assert "--enable-scale-out --max-logprobs -1" in log.read_text()
    assert "control routes: None" in log.read_text()
    assert all_end(pids(log))


def test_started_server_ends_with_a_failed_run(tmp_path, monkeypatch):
    """The stand-in does not answer requests for scores."""
    teacher(tmp_path / "teacher")
    section = {"server": {"start": start("answers", path="../teacher"), "patience_s": 1.0, "timeout_s": 2.0}}
    with pytest.raises((ConfigError, TeacherError)):
        run(tmp_path / "far", recipe(section), monkeypatch)
    (log,) = (tmp_path / "far" / "run").glob("*/vllm-teacher.log")
    assert all_end(pids(log))


def test_run_with_started_engine_proves_every_update(tmp_path, monkeypatch):
    teacher(tmp_path / "teacher")
    engine = {"start": start("scores"), "patience_s": 5.0}
    losses = run(tmp_path / "far", recipe({"path": "../teacher"}, engine=engine), monkeypatch)
    assert len(losses) == 3
    (file,) = (tmp_path / "far" / "run").glob("*/timings.jsonl")
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert all(0 < row["engine_sync_error"] < 1e-3 for row in rows)
    assert all_end(pids(file.parent / "vllm-student.log"))


def test_doctor_starts_the_engine_that_a_stage_starts(tmp_path, monkeypatch):
    teacher(tmp_path / "teacher")
    monkeypatch.chdir(prepare(tmp_path, recipe({"path": "./teacher"}, engine={"start": start("scores")})))
    said = command("doctor", "recipe.yaml", "--json", "--prompts", "2")
    (found,) = [one for one in json.loads(said.out)["findings"] if one["name"] == "cost/engine"]
    assert found["numbers"]["engine_s"] > 0, found


def test_run_says_how_long_the_start_took(tmp_path, monkeypatch):
    teacher(tmp_path / "teacher")
    section = {"server": {"start": start("ends", path="./teacher")}}
    monkeypatch.chdir(prepare(tmp_path, recipe(section)))
    said = command("train", "recipe.yaml")
    assert said.code
    assert "RuntimeError: no memory for the cache" in said.err
    section["server"]["start"] = start("scores", path="./teacher")
    prepare(tmp_path, recipe(section))
    said = command("train", "recipe.yaml")
    assert not said.code
    words = " ".join((said.out + said.err).split())
    assert "the server of teacher started in" in words
    assert "vllm-teacher.log" in words


def test_engine_start_serves_the_student_as_it_is(tmp_path):
    """The folder has the weights of this moment, and the server is told what an engine needs."""
    lm = load_model(ModelSpec(**tiny_model(2)), name="student", seed=0)
    lm.model.get_input_embeddings().weight.data.fill_(0.5)
    stage = one_stage(engine={"start": start(flags=["--max-num-seqs", "4"])})["stages"][0]
    spec = StageSpec.model_validate({"name": "distil", "data": {"path": "x"}, **stage})
    with ExitStack() as servers:
        folder = StageDir(tmp_path)
        found = Starter(folder=folder, servers=servers, progress=Progress(quiet=True), world=ALONE).engine(spec, lm)
        assert found.engine is not None
        assert found.engine.start is None
        assert found.engine.urls[0].startswith("http://127.0.0.1:")
        assert (found.engine.model or "").startswith("student-")
        served = AutoModelForCausalLM.from_pretrained(tmp_path / "engine" / "start")
        assert (served.get_input_embeddings().weight == 0.5).all()
        said = (tmp_path / "vllm-student.log").read_text()
        for flag in ("--dtype float32", "--logprobs-mode processed_logprobs", "--worker-extension-cls opd.engines"):
            assert flag in said
        assert said.splitlines()[0].endswith("--max-num-seqs 4")
        assert "control routes: 1" in said


def test_check_refuses_a_start_that_cannot_work(tmp_path, monkeypatch):
    teacher(tmp_path / "teacher")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("OPD_VLLM", raising=False)
    (tmp_path / "empty").mkdir()
    for section, what in (
        ({"path": "teacher"}, "models.teacher.server.start: no Python with vLLM is named"),
        (start(path="./techer"), "models.teacher.server.start.path: techer does not exist. Did you mean 'teacher'?"),
        (start(path="./empty"), "no model can be loaded from it"),
    ):
        prepare(tmp_path, recipe({"server": {"start": section}}))
        said = command("check", "recipe.yaml")
        assert said.code
        assert what in " ".join(said.err.split())
    prepare(tmp_path, recipe({"server": {"start": start(path="./teacher")}}))
    said = command("check", "recipe.yaml")
    assert not said.code, said.err
    words = " ".join(said.out.split())
    assert "teacher teacher: scored by a server that the stage starts with" in words
    assert "the teacher reads (6 tokens): '10+0=='" in words
    said = command("check", "recipe.yaml", "--live")
    assert not said.code, said.err
    assert "teacher: the run starts its server" in " ".join(said.out.split())
    prepare(tmp_path, recipe({"path": "teacher"}, engine={"start": {}}))
    said = command("check", "recipe.yaml")
    assert "`engine`.start: no Python with vLLM is named" in " ".join(said.err.split())


def test_start_section_has_its_own_fields():
    with pytest.raises(ValueError, match="either the addresses of servers that run"):
        ServerSection.model_validate({"urls": ["http://h:1"], "start": {"path": "x"}})
    with pytest.raises(ValueError, match="either the addresses of servers that run"):
        EngineSection()
    with pytest.raises(ValueError, match="needs the `path` of its model"):
        ServerSection.model_validate({"start": {}})
    with pytest.raises(ValueError, match="leave `path` and `dtype` out"):
        EngineSection.model_validate({"start": {"path": "x"}})
    with pytest.raises(ValueError, match="`start` does not read `api_key_env`"):
        EngineSection.model_validate({"start": {}, "api_key_env": "KEY"})
    again = EngineSection.model_validate(EngineSection(start=StartSection(flags=["-x"])).model_dump())
    assert again.start is not None
    assert again.start.flags == ["-x"]
