"""Several models in one stage, each a teacher of the others: against a step in plain torch."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from support.runs import sums, tiny_model, write_rows
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

import opd
from opd.stage import checkpoint
from opd.stage.folder import StageDir

BETA, RATE, CLOSE = 0.7, 0.02, 2e-6
MODELS = ("one", "two")


def recipe(
    folder: Path, *, swapped: bool = False, lora: Mapping[str, Any] | None = None, **stage: Any
) -> dict[str, Any]:
    """Three steps alone and one in which both teach; checkpoints of the last two."""
    first, second = MODELS[::-1] if swapped else MODELS
    tasks = {
        name: {"train": name, "data": {"path": str(folder / f"{name}.jsonl")}, "reward": {"name": reward}}
        for name, reward in (("one", "support.ranks:odd"), ("two", "support.ranks:rare"))
    }
    warm = {"name": "warm", "train": "base", "method": "sft", "data": {"path": str(folder / "one.jsonl")}, "steps": 2}
    together = {
        "name": "together",
        "train": first,
        "peers": [second],
        "method": "copd",
        "options": {"alone": 3, "together": 1, "beta": BETA},
        "tasks": tasks,
        "task_order": "mixed",
        "steps": 4,
        "prompts_per_step": 6,
        "micro_batch_tokens": 60,
        "sampling": {"max_completion_length": 5, "n": 3},
        "optimizer": {"learning_rate": RATE, "max_grad_norm": 0.5},
        "checkpoint": {"every": 1, "keep": 2},
        "samples_every": 1,
        **stage,
    }
    models = {"base": tiny_model(1), **{name: {"from_stage": "warm", "lora": lora} for name in MODELS}}
    return {"name": "peers", "output_dir": str(folder / "run"), "models": models, "stages": [warm, together]}


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("peers")
    write_rows(folder / "one.jsonl", sums(0, 8))
    write_rows(folder / "two.jsonl", sums(8, 8))
    return folder


@pytest.fixture(scope="module")
def run(work: Path) -> Path:
    opd.run(recipe(work), quiet=True)
    return work / "run"


def saved(stage: Path, step: int) -> tuple[list[dict[str, dict[str, Tensor]]], dict[str, Any]]:
    """The groups of both models, and the state."""
    found = checkpoint.load(stage / "checkpoints" / f"step_{step:06d}")
    peer = {g.removeprefix("peer0."): t for g, t in found.tensors.items() if g.startswith("peer0.")}
    return [{g: t for g, t in found.tensors.items() if not g.startswith("peer0.")}, peer], found.state


def model_of(run: Path, weights: Mapping[str, Tensor]) -> nn.Module:
    model = AutoModelForCausalLM.from_pretrained(run / "warm/model", dtype=torch.float64).eval()
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, values in weights.items():
            parameters[name].copy_(values)
    return model


def logp_of(model: nn.Module, row: Mapping[str, Any], prompt_ids: list[int]) -> Tensor:
    ids = torch.tensor([prompt_ids + row["response_ids"]])
    logp = model(input_ids=ids, use_cache=False).logits[0].log_softmax(-1)[len(prompt_ids) - 1 : -1]
    return logp.gather(1, torch.tensor(row["response_ids"])[:, None])[:, 0]


def loss_of(model: nn.Module, peer: nn.Module, rows: list[dict[str, Any]], vocabulary: Mapping[str, int]) -> Tensor:
    """GRPO on the model's own rows, and BETA times the cross term on its peer's prompts: arXiv 2604.27083."""
    own, taught = ([row for row in rows if row["part"] == part] for part in ("", "taught"))
    assert own
    assert taught
    total = torch.zeros((), dtype=torch.float64)
    for part, factor in ((own, 1.0), (taught, BETA)):
        for row in part:
            prompt_ids = [vocabulary[c] for c in row["prompt"]]
            logp = logp_of(model, row, prompt_ids)
            if part is own:
                group = torch.tensor([r["reward"] for r in own if r["prompt_id"] == row["prompt_id"]]).double()
                advantage: Any = (row["reward"] - group.mean()) / (group.std() + 1e-4)
            else:
                with torch.no_grad():
                    advantage = logp_of(peer, row, prompt_ids) - logp
            ratio = (logp - torch.tensor(row["sampler_logp"]).double()).exp()
            gain = torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.28) * advantage)
            total = total - factor * gain.mean() / len(part)
    return total


def updated(model: nn.Module, before: Mapping[str, dict[str, Tensor]], loss: Tensor) -> nn.Module:
    """AdamW's fourth step from the saved moments, after clipping the norm of this model's gradient alone."""
    new = copy.deepcopy(model)
    names = [name for name, _ in model.named_parameters() if name in before["student"]]
    parameters = dict(model.named_parameters())
    grads = torch.autograd.grad(loss, [parameters[name] for name in names])
    norm = torch.stack([g.square().sum() for g in grads]).sum().sqrt()
    scale = min(1.0, 0.5 / float(norm))
    target = dict(new.named_parameters())
    with torch.no_grad():
        for name, grad in zip(names, grads, strict=True):
            g = grad * scale
            m = 0.9 * before["adamw.exp_avg"][name].double() + 0.1 * g
            v = 0.999 * before["adamw.exp_avg_sq"][name].double() + 0.001 * g.square()
            target[name] -= RATE * (m / (1 - 0.9**4)) / ((v / (1 - 0.999**4)).sqrt() + 1e-8)
    return new


def distance(model: nn.Module, weights: Mapping[str, Tensor]) -> float:
    parameters = dict(model.named_parameters())
    return max(float((parameters[name].detach() - values).abs().max()) for name, values in weights.items())


@pytest.mark.numeric
def test_step_of_two_models_is_plain_torch_from_one_snapshot(run: Path):
    stage = run / "together"
    before, state = saved(stage, 3)
    after, _ = saved(stage, 4)
    assert state["updates"] == 3
    models = [model_of(run, one["student"]) for one in before]
    folders = [StageDir(stage), StageDir(stage / "peers/two")]
    rows = [[row for row in folder.read_samples() if row["step"] == 4] for folder in folders]
    vocabulary = AutoTokenizer.from_pretrained(run / "warm/model").get_vocab()
    new = [updated(models[k], before[k], loss_of(models[k], models[1 - k], rows[k], vocabulary)) for k in range(2)]
    for model, then in zip(new, after, strict=True):
        assert distance(model, then["student"]) < CLOSE
    # Another algorithm: the second model is taught by the first one after its update.
    late = updated(models[1], before[1], loss_of(models[1], new[0], rows[1], vocabulary))
    assert distance(late, after[1]["student"]) > 1000 * CLOSE
    ids = torch.arange(5)[None]
    with torch.no_grad():
        assert float((late(input_ids=ids).logits - new[1](input_ids=ids).logits).abs().max()) > 0.01


def test_order_of_models_changes_nothing(run: Path, work: Path):
    other = recipe(work, swapped=True) | {"output_dir": str(work / "swapped")}
    opd.run(other, quiet=True)
    mine, _ = saved(run / "together", 4)
    theirs, _ = saved(work / "swapped/together", 4)
    for one, same in zip(mine, theirs[::-1], strict=True):
        assert all(torch.equal(values, same["student"][name]) for name, values in one["student"].items())


def test_saved_model_is_the_mean_of_whole_weights(run: Path):
    after, _ = saved(run / "together", 4)
    merged = AutoModelForCausalLM.from_pretrained(run / "together/model")
    for name, values in merged.named_parameters():
        mean = (after[0]["student"][name].double() + after[1]["student"][name].double()) / 2
        assert torch.equal(values, mean.float())


def test_steps_alone_have_no_rows_of_peers(run: Path):
    rows = StageDir(run / "together").read_metrics()
    assert [row["part/taught/rows"] for row in rows] == [0, 0, 0, 9]
    assert len({row["train/loss"] for row in rows}) == 4
