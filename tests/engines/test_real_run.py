"""A whole run with a real vLLM server for the teacher and one for the student's responses, against a local run."""

from __future__ import annotations

import json
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from support.in_order import in_order
from support.models import byte_tokenizer, tiny
from support.runs import one_stage, prepare
from support.vllm_server import needs_vllm, vllm

import opd
from opd.engines.control import check_control, check_draws
from opd.engines.replicas import Replicas
from opd.engines.server import Server
from opd.errors import ConfigError
from opd.models import saving

pytestmark = [pytest.mark.engine, needs_vllm]
STEPS = 20
DRAWING = ("--logprobs-mode", "processed_logprobs", "--worker-extension-cls", "opd.engines.worker.WeightLoader")


def run(folder: Path, models: dict[str, Any], **stage: Any) -> tuple[list[float], list[dict[str, float]]]:
    """The losses and the timings of a run. Greedy responses depend on the weights alone."""
    made = one_stage(
        method="topk_reverse_kl",
        options={"k": 4, "by": "teacher", "form": "tail"},
        steps=STEPS,
        sampling={"max_completion_length": 8, "temperature": 0},
        optimizer={"learning_rate": 3e-3},
        **stage,
    )
    prepare(folder, made | {"models": models, "output_dir": str(folder / "run")})
    data = {"data": {"path": str(folder / "train.jsonl")}}
    made["stages"][0] |= data
    prepare(folder, made | {"models": models, "output_dir": str(folder / "run")})
    opd.run(str(folder / "recipe.yaml"), quiet=True)
    rows = [json.loads(line) for line in (folder / "run" / "distil" / "metrics.jsonl").read_text().splitlines()]
    timings = [json.loads(line) for line in (folder / "run" / "distil" / "timings.jsonl").read_text().splitlines()]
    return [row["train/loss"] for row in rows if "train/loss" in row], timings


def test_served_run_with_engine_equals_local_run(tmp_path):
    tokenizer = byte_tokenizer()
    for name, seed, hidden in (("teacher", 1, 64), ("student", 2, 64)):
        saving.save(tiny("llama_tied", tokenizer, seed=seed, hidden=hidden, spread=0.15), tmp_path / name)
    local = {name: {"path": str(tmp_path / name)} for name in ("teacher", "student")}
    with ExitStack() as stack:
        teacher, engine = (
            stack.enter_context(vllm(tmp_path / name, tmp_path / f"{name}.log", *more, by_position=False))
            for name, more in (("teacher", ()), ("student", DRAWING))
        )
        served = local | {"teacher": {"server": {"urls": [teacher]}}}
        far, timings = run(tmp_path / "far", served, engine={"urls": [engine]})
        replicas = Replicas(servers=(Server(url=teacher, timeout_s=120.0),))
        with pytest.raises(ConfigError, match=r"--worker-extension-cls opd\.engines\.worker\.WeightLoader"):
            check_control(replicas, "teacher", len(tokenizer), None)
        with pytest.raises(ConfigError, match="--logprobs-mode processed_logprobs"):
            check_draws(replicas, "teacher", len(tokenizer))
    near, _ = run(tmp_path / "near", local)
    assert len(far) == len(near) == STEPS
    assert far == pytest.approx(near, abs=1e-3)
    assert near[-1] < near[0]
    assert max(row["engine_sync_error"] for row in timings) < 1e-3
    assert all(row["teacher_failed"] == row["engine_failed"] == row["teacher_repeated"] == 0 for row in timings)


def test_run_one_step_ahead_equals_loop_in_order(tmp_path):
    """The thread that draws changes no number: neither what is drawn nor the weights that draw it."""
    tokenizer = byte_tokenizer()
    teacher, student = (tiny("llama_tied", tokenizer, seed=seed, hidden=64, spread=0.15) for seed in (1, 2))
    for name, lm in (("teacher", teacher), ("student", student)):
        saving.save(lm, tmp_path / name)
    with vllm(tmp_path / "student", tmp_path / "log", *DRAWING, by_position=False) as engine:
        made = one_stage(
            method="topk_reverse_kl",
            options={"k": 4, "by": "student", "form": "tail"},
            steps=6,
            sampling={"max_completion_length": 8, "n": 2},
            optimizer={"learning_rate": 3e-3, "schedule": "constant"},
            engine={"urls": [engine]},
            ahead=1,
            data={"path": str(tmp_path / "train.jsonl")},
        )
        models = {name: {"path": str(tmp_path / name)} for name in ("teacher", "student")}
        prepare(tmp_path, made | {"models": models, "output_dir": str(tmp_path / "run")})
        opd.run(str(tmp_path / "recipe.yaml"), quiet=True)
        wanted = in_order(made["stages"][0], student, teacher, tmp_path / "again")
    rows = [json.loads(line) for line in (tmp_path / "run/distil/metrics.jsonl").read_text().splitlines()]
    assert [row["train/loss"] for row in rows] == pytest.approx(wanted, abs=1e-5)
    assert [row["rollout/staleness_max"] for row in rows] == [0, 1, 1, 1, 1, 1]
