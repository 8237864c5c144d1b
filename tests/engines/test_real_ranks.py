"""Two trainer processes with one real vLLM server, against one process with it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.models import byte_tokenizer, tiny
from support.runs import Forks, one_stage, prepare
from support.vllm_server import needs_vllm, vllm

from opd.models import saving

pytestmark = [pytest.mark.engine, needs_vllm]
STEPS = 3


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folders student and teacher."""
    folder, tokenizer = tmp_path_factory.mktemp("models"), byte_tokenizer()
    for name, seed in (("student", 2), ("teacher", 1)):
        saving.save(tiny("llama_tied", tokenizer, seed=seed, hidden=64, spread=0.15), folder / name)
    return folder


@pytest.fixture(scope="module")
def url(models: Path) -> Iterator[str]:
    flags = ("--logprobs-mode", "processed_logprobs", "--worker-extension-cls", "opd.engines.worker.WeightLoader")
    with vllm(models / "student", models / "log", *flags, by_position=False) as one:
        yield one


def trained(forks: Forks, folder: Path, models: Path, url: str, processes: int) -> tuple[list[float], list[Any]]:
    """The losses and the rows of timings of a run."""
    made = one_stage(
        method="topk_reverse_kl",
        options={"k": 4, "by": "teacher", "form": "tail"},
        steps=STEPS,
        prompts_per_step=3,  # one process has two of them
        sampling={"max_completion_length": 8, "n": 2},
        optimizer={"learning_rate": 3e-3},
        engine={"urls": [url]},
    )
    described = {name: {"path": str(models / name)} for name in ("student", "teacher")}
    ended = forks.start(prepare(folder, made | {"models": described}), "train", "recipe.yaml", processes=processes)
    assert ended.code == 0, ended.err
    rows, timings = (
        [json.loads(line) for line in (folder / "run/distil" / name).read_text().splitlines()]
        for name in ("metrics.jsonl", "timings.jsonl")
    )
    return [row["train/loss"] for row in rows if "train/loss" in row], timings


def test_two_processes_with_real_engine_equal_one(forks, models, url, tmp_path):
    one, _ = trained(forks, tmp_path / "one", models, url, 1)
    two, timings = trained(forks, tmp_path / "two", models, url, 2)
    assert len(two) == STEPS
    assert two == pytest.approx(one, abs=1e-4)
    assert max(row["engine_sync_error"] for row in timings) < 1e-4
    assert all(row["engine_failed"] == row["engine_repeated"] == 0 for row in timings)
