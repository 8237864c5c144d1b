"""`opd plan RECIPE`: what it prints, and what it refuses."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.runs import command, one_stage, prepare, tiny_model


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(prepare(tmp_path / "work", one_stage()))
    return tmp_path / "work"


def test_plan_prints_memory_bytes_and_seconds(folder):
    ended = command("plan", "recipe.yaml", "--gpu", "h200")
    assert ended.code == 0, ended.err
    assert "1 x h200: 131.3 GiB" in ended.out
    parameters = 4 * 16 * 16 + 3 * 16 * 32 + 2 * 16 + 16 + 2 * 15 * 16  # one layer, the last norm, 15 tokens
    assert f"teacher scores: {parameters:,} parameters, whole on every device" in ended.out
    assert "2 prompts x 1 responses, 4 + 3 tokens; per device 2 rows in 1 micro-batches of 2" in ended.out
    for name in ("moments", "activations", "KV cache", "teacher's hidden states", "nothing leaves the device"):
        assert name in ended.out
    assert "fits in 131.3 GiB" in ended.out
    assert not (folder / "run").exists()


def test_plan_counts_one_response_of_the_data_per_prompt(folder):
    prepare(folder, one_stage(method="sft", teacher=None, sampling={"n": 4, "max_completion_length": 3}))
    (folder / "rows.jsonl").write_text('{"prompt": "1+1=", "response": "2"}\n' * 4)
    ended = command("plan", "recipe.yaml", "stages.0.data.path=rows.jsonl")
    assert "2 prompts x 1 responses, 4 + 3 tokens; per device 2 rows" in ended.out, ended.err
    prepare(folder, one_stage(sampling={"n": 4, "max_completion_length": 3}))
    assert "2 prompts x 4 responses" in command("plan", "recipe.yaml").out


def test_plan_says_what_does_not_fit(folder):
    assert "does not fit in 0.0 GiB" in command("plan", "recipe.yaml", "--memory-gib", "0.00001").out


def test_plan_of_lora_and_autocast(folder):
    recipe = one_stage()
    recipe["models"]["student"] = tiny_model(2, autocast=True, gradient_checkpointing=True, lora={"rank": 2})
    prepare(folder, recipe)
    out = command("plan", "recipe.yaml", "--response-tokens", "100", "--prompt-tokens", "50").out
    matrices = [(16, 16)] * 4 + [(32, 16), (32, 16), (16, 32)]
    assert f"autocast, LoRA of {sum(2 * (a + b) for a, b in matrices)}, gradient checkpointing" in out
    assert "50 + 100 tokens" in out
    assert "bfloat16 copies of weights" in out


def test_plan_of_served_teacher_counts_its_bytes(folder):
    recipe = one_stage(method="topk_reverse_kl", options={"k": 4, "by": "student", "form": "tail"})
    recipe["models"]["teacher"] = {"server": {"urls": ["http://127.0.0.1:1"]}}
    prepare(folder, recipe)
    out = command("plan", "recipe.yaml").out
    assert "teacher scores: a model, on its servers, which are not counted" in out
    assert "log-probs by position (teacher)" in out
    assert "gets the top 16 instead" in out


def test_plan_refuses_what_training_refuses(folder):
    prepare(folder, one_stage(engine={"urls": ["http://127.0.0.1:1"], "sleep": True}))
    ended = command("plan", "recipe.yaml", "--devices", "2")
    assert ended.code == 2
    assert "another process may still draw. Remove `sleep`" in " ".join(ended.err.split())
    assert "weights to an engine's servers" in command("plan", "recipe.yaml").out
