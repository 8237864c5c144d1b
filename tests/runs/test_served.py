"""Runs with a teacher on servers: the losses of the same teacher in this process, faults, and what is refused early."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.engines import Engine, refused, running
from support.http_server import Said
from support.runs import CHARACTERS, command, one_stage, prepare, tiny_model

import opd
from opd.errors import TeacherError
from opd.models.loading import load_model
from opd.recipe.schema import ModelSpec

METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "sampled token": ("opd", {}),
    "teacher's top k": ("topk_reverse_kl", {"k": 4, "by": "teacher", "form": "tail"}),
    "student's top k": ("topk_reverse_kl", {"k": 4, "by": "student", "form": "tail"}),
    "union": ("topk_reverse_kl", {"k": 4, "by": "union", "form": "tail"}),
}
TEACHER = tiny_model(1, hidden_size=24)


@pytest.fixture
def engine() -> Iterator[Engine]:
    one = Engine(lm=load_model(ModelSpec(**TEACHER), name="teacher", seed=0), longest=512)
    with running(one):
        yield one


def served(*engines: Engine, **section: Any) -> dict[str, Any]:
    return {"server": {"urls": [one.url for one in engines], "patience_s": 2.0, **section}}


def recipe(model: dict[str, Any], method: str, options: dict[str, Any], **stage: Any) -> dict[str, Any]:
    made = one_stage(method=method, options=options, steps=6, **stage)
    return made | {"models": made["models"] | {"teacher": model}}


def losses(folder: Path) -> list[float]:
    rows = [json.loads(line) for line in next(folder.glob("run/*/metrics.jsonl")).read_text().splitlines()]
    return [row["train/loss"] for row in rows if "train/loss" in row]


def timings(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in next(folder.glob("run/*/timings.jsonl")).read_text().splitlines()]


def run(folder: Path, made: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> Path:
    folder.mkdir()
    monkeypatch.chdir(folder)
    prepare(folder, made)
    opd.run("recipe.yaml", quiet=True)
    return folder


@pytest.mark.parametrize("name", METHODS)
def test_served_run_equals_local_run(engine, tmp_path, monkeypatch, name):
    method, options = METHODS[name]
    local = run(tmp_path / "local", recipe(TEACHER, method, options), monkeypatch)
    far = run(tmp_path / "served", recipe(served(engine), method, options), monkeypatch)
    assert losses(far) == pytest.approx(losses(local), abs=1e-5)
    counts = timings(far)[-1]
    assert counts["teacher_requests"] > 0
    assert counts["teacher_failed"] == counts["teacher_repeated"] == counts["teacher_ids_missing"] == 0


def test_served_run_loses_no_step_to_faults(engine, tmp_path, monkeypatch):
    """Every third answer is one of five faults; the losses are those of a run without."""
    method, options = METHODS["student's top k"]
    clean = run(tmp_path / "clean", recipe(served(engine), method, options), monkeypatch)
    faults = [
        Said(status=500, body={}),
        Said(hang_up=True),
        Said(body=b"{"),
        Said(status=503, body={}, headers=(("Retry-After", "0.01"),)),
        Said(body={"choices": []}),
    ]
    seen = [0]

    def fault(arrived: Any, said: Said) -> Said:
        if arrived.target == "/inference/v1/generate":
            seen[0] += 1
            if seen[0] > 2 and seen[0] % 3 == 0:
                return faults[seen[0] // 3 % len(faults)]
        return said

    engine.fault = fault
    ill = run(tmp_path / "ill", recipe(served(engine, retries=20), method, options), monkeypatch)
    assert losses(ill) == losses(clean)
    rows = timings(ill)
    assert sum(row["teacher_repeated"] for row in rows) > 0
    assert sum(row["teacher_failed"] for row in rows) == 0


def test_served_run_continues_after_servers_come_back(engine, tmp_path, monkeypatch):
    method, options = METHODS["sampled token"]
    whole = run(tmp_path / "whole", recipe(served(engine), method, options), monkeypatch)
    ill = tmp_path / "ill"
    count = [0]

    def fault(arrived: Any, said: Said) -> Said:
        count[0] += arrived.target == "/v1/completions"
        return refused(400, "gone") if 12 < count[0] < 40 else said

    engine.fault = fault
    with pytest.raises(TeacherError, match="the same command then continues"):
        run(ill, recipe(served(engine), method, options), monkeypatch)
    engine.fault = lambda arrived, said: said
    opd.run("recipe.yaml", quiet=True)
    assert losses(ill) == losses(whole)


def test_check_names_what_a_server_cannot_do(engine, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for made, what in (
        (recipe(served(engine), "reverse_kl", {}), "whole distribution"),
        (recipe(served(engine), "topk_reverse_kl", {"temperature": 0.5}), "temperature 1"),
        (recipe(served(engine), "opd", {}, diagnostics={"every": 2}), "diagnostics.every"),
        (recipe({"server": {"urls": ["localhost:1"]}}, "opd", {}), "is not an address"),
        (recipe({"server": {"urls": ["http://k@localhost:1"]}}, "opd", {}), "holds more than an address"),
        (recipe(served(engine, api_key_env="OPD_NO_SUCH_KEY"), "opd", {}), "OPD_NO_SUCH_KEY"),
        (recipe(served(engine), "sft", {}, train="teacher", teacher=None), "no weights"),
    ):
        prepare(tmp_path, made)
        said = command("check", "recipe.yaml")
        assert said.code
        assert what in " ".join(said.err.split())
    assert not engine.arrived


def test_doctor_refuses_a_teacher_on_servers(engine, tmp_path, monkeypatch):
    monkeypatch.chdir(prepare(tmp_path, recipe(served(engine), "opd", {})))
    said = command("doctor", "recipe.yaml")
    assert said.code
    assert "teacher 'teacher' is on servers, which only score" in " ".join(said.err.split())


def test_check_says_where_scores_come_from(engine, tmp_path, monkeypatch):
    monkeypatch.chdir(prepare(tmp_path, recipe(served(engine), "opd", {})))
    said = command("check", "recipe.yaml")
    assert "teacher teacher: scored by 1 server, reached when the stage begins" in " ".join(said.out.split())
    assert not engine.arrived


def test_stage_says_what_takes_the_place_of_missing_scores(engine, tmp_path, monkeypatch):
    engine.scale_out = False
    monkeypatch.chdir(prepare(tmp_path, recipe(served(engine), *METHODS["student's top k"])))
    said = command("train", "recipe.yaml")
    assert "the student's top 4 outside of them are left out of the support" in " ".join((said.out + said.err).split())


def test_server_model_has_its_own_fields(tmp_path):
    assert ModelSpec(server={"urls": ["http://h:1"]}).local is False
    with pytest.raises(ValueError, match="`server` does not read `dtype`"):
        ModelSpec(server={"urls": ["http://h:1"]}, dtype="bfloat16")
    with pytest.raises(ValueError, match="a folder or a hub id"):
        ModelSpec(server={"urls": ["http://h:1"]}, tokenizer={"characters": CHARACTERS})
