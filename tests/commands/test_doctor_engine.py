"""The doctor's advice on the sampler, and its refusal of a teacher on servers."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from support.engines import Engine, running
from support.runs import Ended, command, one_stage, prepare, tiny_model

from opd.commands.doctor.engine import Written, advice
from opd.models.loading import load_model
from opd.recipe.schema import ModelSpec

STUDENT = tiny_model(2)


@pytest.fixture
def engine() -> Iterator[Engine]:
    one = Engine(lm=load_model(ModelSpec(**STUDENT), name="student", seed=0), longest=64)
    with running(one):
        yield one


def examined(folder: Path, url: str, **models: Any) -> Ended:
    made = one_stage(
        method="topk_reverse_kl",
        options={"k": 4, "by": "teacher", "form": "tail"},
        engine={"urls": [url], "retries": 0},
        data={"path": str(folder / "train.jsonl")},
        prompts_per_step=6,
    )
    models = {"student": STUDENT, "teacher": tiny_model(1), **models}
    prepare(folder, made | {"models": models, "output_dir": str(folder / "run")})
    return command("doctor", str(folder / "recipe.yaml"), "--json", "--prompts", "2")


def finding(said: Ended) -> dict[str, Any]:
    (found,) = [one for one in json.loads(said.out)["findings"] if one["name"] == "cost/engine"]
    return found


def test_doctor_times_both_samplers_on_a_whole_step(engine, tmp_path):
    found = finding(examined(tmp_path, engine.url))
    numbers = found["numbers"]
    assert "the responses to 6 prompts" in found["says"]
    assert 6 <= numbers["tokens"] <= 6 * 3
    assert numbers["ratio"] == pytest.approx(numbers["process_s"] / (numbers["engine_s"] + numbers["engine_update_s"]))
    assert found["level"] == ("ok" if numbers["ratio"] >= 0.9 else "change")
    assert engine.version == "0"


def test_doctor_skips_engine_that_does_not_answer(engine, tmp_path):
    with running(Engine(lm=engine.lm)) as (gone,):
        pass
    found = finding(examined(tmp_path, gone))
    assert found["level"] == "skipped"
    assert "does not give its models: no connection" in found["says"]


@pytest.mark.parametrize(("seconds", "level"), [(4.0, "ok"), (12.0, "change")])
def test_advice_compares_seconds_per_token_with_the_update(seconds, level):
    """100 tokens in 5 s here are 200 in 10 s."""
    spec = SimpleNamespace(name="distil")
    subject: Any = SimpleNamespace(spec=spec, step_prompts=range(3))
    found = advice(subject, Written(tokens=200, seconds=seconds), Written(tokens=100, seconds=5.0), update=1.0)
    assert found.level == level
    assert found.numbers["ratio"] == pytest.approx(10.0 / (seconds + 1.0))


def test_doctor_refuses_teacher_on_servers(engine, tmp_path):
    said = examined(tmp_path, engine.url, teacher={"server": {"urls": [engine.url]}})
    assert said.code == 2
    assert "models.teacher.server=null models.teacher.path=FOLDER" in " ".join(said.err.split())
    assert not engine.arrived
