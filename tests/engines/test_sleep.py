"""Servers that sleep while the trainer trains: the order of calls, and the same numbers as without."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
from support.engines import Engine, refused, running
from support.http_server import Arrived, Said
from support.runs import command, one_stage, prepare, tiny_model

import opd
from opd.models.loading import load_model
from opd.recipe.schema import EngineSection, ModelSpec


@dataclass
class Sleeper(Engine):
    """An engine that gives up its weights when it sleeps, and answers no request for tokens until it is awake."""

    calls: list[str] = field(default_factory=list)
    weights: bool = True
    cache: bool = True

    def answer(self, arrived: Arrived) -> Said:
        target = arrived.target
        if target in ("/sleep?level=2", "/wake_up?tags=weights", "/wake_up"):
            self.calls.append(target)
            self.weights = target != "/sleep?level=2"
            self.cache = target == "/wake_up"
            if not self.weights:
                for parameter in self.lm.model.parameters():
                    parameter.data.zero_()
            return Said(body={"status": "awake"})
        if target == "/collective_rpc":
            self.calls.append("load")
            if not self.weights:
                return refused(500, "no memory for the weights")
        elif target in ("/v1/completions", "/inference/v1/generate"):
            self.calls.append("draw" if target == "/inference/v1/generate" else "score")
            if not (self.weights and self.cache):
                return refused(500, "asleep")
        return super().answer(arrived)


@pytest.fixture
def engine() -> Iterator[Sleeper]:
    one = Sleeper(lm=load_model(ModelSpec(**tiny_model(2)), name="student", seed=0), name="student", longest=512)
    with running(one):
        yield one


def run(folder: Path, engine: Sleeper, monkeypatch: pytest.MonkeyPatch, **section: Any) -> list[float]:
    """Two tasks, so that a step draws twice."""
    folder.mkdir()
    monkeypatch.chdir(folder)
    task = {"data": {"path": "train.jsonl"}, "teacher": "teacher", "sampling": {"max_completion_length": 3}}
    made = one_stage(
        method="topk_reverse_kl",
        options={"k": 4, "by": "teacher", "form": "tail"},
        data=None,
        teacher=None,
        sampling=None,
        tasks={"one": task, "two": task},
        task_order="mixed",
        steps=2,
        optimizer={"learning_rate": 0.01},
        engine={"urls": [engine.url], "retries": 0, "patience_s": 2.0, **section},
    )
    prepare(folder, made)
    opd.run("recipe.yaml", quiet=True)
    rows = [json.loads(line) for line in next(folder.glob("run/*/metrics.jsonl")).read_text().splitlines()]
    return [row["train/loss"] for row in rows if "train/loss" in row]


def test_servers_sleep_after_each_draw_and_wake_for_weights(engine, tmp_path, monkeypatch):
    awake = run(tmp_path / "awake", engine, monkeypatch)
    assert not {call for call in engine.calls if "sleep" in call or "wake" in call}
    engine.calls.clear()
    assert run(tmp_path / "asleep", engine, monkeypatch, sleep=True) == awake
    assert engine.calls[0] == "/wake_up"  # before the first question: a killed run may have left them asleep
    shown = [call for call, _ in groupby(call for call in engine.calls[1:] if call != "score")]
    update = ["/wake_up?tags=weights", "load", "/wake_up"]
    draw = [*update, "draw", "/sleep?level=2"]  # of a step's second task: with the weights that they had
    assert shown == [*draw, *draw, *draw, *draw]


def test_check_refuses_sleep_where_something_still_draws(engine, tmp_path, monkeypatch):
    section = {"urls": [engine.url], "sleep": True}
    monkeypatch.chdir(prepare(tmp_path, one_stage(method="reverse_kl", engine=section, ahead=1)))
    said = command("check", "recipe.yaml")
    assert said.code
    assert "`ahead: 1` draws meanwhile. Remove `sleep`" in " ".join(said.err.split())
    with pytest.raises(ValueError, match="leave `start` and `sleep` out"):
        EngineSection.model_validate({**section, "weights": "lora"})
    assert not engine.calls
