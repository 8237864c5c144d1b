"""A whole run that starts vLLM for the teacher and for the student's responses, against a local run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from support.models import byte_tokenizer, tiny
from support.runs import one_stage, prepare
from support.vllm_server import needs_vllm

import opd
from opd.models import saving
from opd.stage.folder import StageDir

pytestmark = [pytest.mark.engine, needs_vllm]


def run(folder: Path, models: dict[str, Any], **stage: Any) -> tuple[list[float], list[str]]:
    """The losses of a run, and the teacher's responses to held-out prompts. Greedy ones depend on the weights alone."""
    made = one_stage(
        method="topk_reverse_kl",
        options={"k": 4, "by": "teacher", "form": "tail"},
        steps=6,
        sampling={"max_completion_length": 8, "temperature": 0},
        optimizer={"learning_rate": 3e-3},
        data={"path": str(folder / "train.jsonl")},
        evaluate={
            "data": {"path": str(folder / "held_out.jsonl")},
            "sampling": {"greedy": {"temperature": 0, "max_completion_length": 8}},
            "teacher": True,
        },
        **stage,
    )
    prepare(folder, made | {"models": models, "output_dir": str(folder / "run")})
    opd.run(str(folder / "recipe.yaml"), quiet=True)
    rows = [json.loads(line) for line in (folder / "run" / "distil" / "metrics.jsonl").read_text().splitlines()]
    written = StageDir(folder / "run" / "distil").read_held_out("teacher")
    return [row["train/loss"] for row in rows if "train/loss" in row], [row["response"] for row in written]


def test_run_that_starts_its_servers_equals_local_run(tmp_path):
    tokenizer = byte_tokenizer()
    for name, seed in (("teacher", 1), ("student", 2)):
        saving.save(tiny("llama_tied", tokenizer, seed=seed, hidden=64, spread=0.15), tmp_path / name)
    local = {name: {"path": str(tmp_path / name)} for name in ("teacher", "student")}
    flags = ["--enforce-eager", "--max-num-seqs", "16"]
    start = {"flags": flags, "env": {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}}
    served = local | {"teacher": {"server": {"start": {**start, "path": str(tmp_path / "teacher")}}}}
    far, far_written = run(tmp_path / "far", served, engine={"start": start, "sleep": True})
    near, near_written = run(tmp_path / "near", local)
    assert far_written == near_written
    assert len(set(near_written)) > 1
    assert far == pytest.approx(near, abs=1e-3)
    assert near[-1] < near[0]
