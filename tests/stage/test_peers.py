"""Several models in one stage, each a teacher of the others: against a step in plain torch."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from support.runs import sums, tiny_model, write_rows
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

import opd
from opd.errors import ConfigError
from opd.recipe.schema import DataSection, StageSpec, TaskSection
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


@pytest.mark.numeric
def test_saved_model_is_the_mean_of_lora_products(work: Path):
    made = recipe(work, lora={"rank": 2, "alpha": 4}) | {"output_dir": str(work / "lora")}
    opd.run(made, quiet=True)
    after, _ = saved(work / "lora/together", 4)
    base, merged = (
        dict(AutoModelForCausalLM.from_pretrained(work / f"lora/{stage}/model").named_parameters())
        for stage in ("warm", "together")
    )
    places = {name.split("base_model.model.")[-1].partition(".lora_")[0] for name in after[0]["student"]}
    off: list[float] = []
    for place in sorted(places):
        factors = [
            [next(t for n, t in one["student"].items() if place in n and f"lora_{side}" in n) for side in "AB"]
            for one in after
        ]
        mean = sum((2.0 * b.double() @ a.double() for a, b in factors), torch.zeros(())) / 2
        got = merged[f"{place}.weight"].double() - base[f"{place}.weight"].double()
        assert float((got - mean).abs().max()) < 1e-7
        (a0, b0), (a1, b1) = factors
        of_factors = 2.0 * (b0 + b1).double() @ (a0 + a1).double() / 4
        off.append(float((of_factors - mean).norm() / mean.norm()))
    assert min(off) > 0.1  # the mean of the factors is another model


def change(made: dict[str, Any], **stage: Any) -> dict[str, Any]:
    made["stages"][1] |= stage
    return made


def without(made: dict[str, Any], *keys: str) -> dict[str, Any]:
    made["stages"][1] = {key: value for key, value in made["stages"][1].items() if key not in keys}
    return made


def other_model(made: dict[str, Any], **spec: Any) -> dict[str, Any]:
    made["models"]["two"] = spec
    return made


def other_owner(made: dict[str, Any], owner: str | None) -> dict[str, Any]:
    made["stages"][1]["tasks"]["two"]["train"] = owner
    return made


ALONE = {"data": {"path": "one.jsonl"}, "reward": {"name": "support.ranks:odd"}, "task_order": "alternate"}
REFUSED: dict[str, tuple[Any, str]] = {
    "one branch": (
        lambda made: change(without(made, "tasks", "peers"), **ALONE),
        "needs several models in one stage: name the others in `peers`",
    ),
    "no teaching": (lambda made: change(made, topology="none"), "needs several models in one stage"),
    "no peers in the method": (lambda made: change(made, method="grpo", options={}), "lets none of them teach another"),
    "another start": (lambda made: other_model(made, **tiny_model(7)), "do not begin with the same weights"),
    "another tokenizer": (
        lambda made: other_model(made, **tiny_model(1, characters="0123456789+=x")),
        "do not begin with the same weights",
    ),
    "another adapter": (
        lambda made: other_model(made, from_stage="warm", lora={"rank": 2}),
        "weights of other names or shapes",
    ),
    "twice": (lambda made: change(made, peers=["one"]), "one of them twice"),
    "no model": (lambda made: change(made, peers=["too"]), "Did you mean 'two'"),
    "no owner": (lambda made: other_owner(made, None), "tasks.two.train is None"),
    "no own data": (lambda made: other_owner(made, "one"), "'two' has no data of its own"),
    "adapter": (lambda made: change(made, save="adapter"), "the mean of LoRA factors is not the mean of models"),
    "order": (lambda made: change(made, task_order="alternate"), "Set `task_order: mixed`"),
    "diagnostics": (lambda made: change(made, diagnostics={"every": 2}), "`diagnostics.every` is not supported"),
    "cycle": (lambda made: change(made, options={"together": 0}), "1 or more"),
    "beta": (lambda made: change(made, options={"beta": 0.0}), "factor 0"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_recipe_of_several_models_is_refused(work: Path, tmp_path: Path, case: str):
    spoil, why = REFUSED[case]
    made = spoil(recipe(work)) | {"output_dir": str(tmp_path / "run")}
    if "data" in made["stages"][1]:
        made["stages"][1]["data"] = {"path": str(work / "one.jsonl")}
    with pytest.raises(ConfigError, match=re.escape(why)):
        opd.run(made, quiet=True)
    loaded = case == "another adapter"  # alone this one needs the weights
    assert (tmp_path / "run/together/metrics.jsonl").exists() is False
    assert (tmp_path / "run/warm/model").exists() is loaded


def test_setting_of_peers_is_refused_for_one_model(work: Path):
    with pytest.raises(ConfigError, match=r"`tasks\.one\.train` is for several models"):
        opd.run(without(recipe(work), "peers"), quiet=True)


def test_hub_learns_from_all_and_the_others_from_it():
    tasks = {name: TaskSection(data=DataSection(path="x"), train=name) for name in "abc"}
    spec = StageSpec(name="s", train="a", peers=["b", "c"], method="copd", data=None, tasks=tasks, steps=1)
    taught = {
        topology: {
            view.train: [task.teacher for task in view.tasks.values() if task.teacher]
            for view in spec.model_copy(update={"topology": topology}).views
        }
        for topology in ("all", "hub", "none")
    }
    assert taught["all"] == {"a": ["b", "c"], "b": ["a", "c"], "c": ["a", "b"]}
    assert taught["hub"] == {"a": ["b", "c"], "b": ["a"], "c": ["a"]}
    assert taught["none"] == {"a": [], "b": [], "c": []}


def test_models_without_teaching_train_as_alone_and_are_merged(work: Path, tmp_path: Path):
    """The mean of experts: each model makes the steps that it makes in a stage of its own."""
    made = change(recipe(work), method="grpo", options={}, topology="none") | {"output_dir": str(tmp_path / "run")}
    opd.run(made, quiet=True)
    together, _ = saved(tmp_path / "run/together", 4)
    for k, name in enumerate(MODELS):
        alone = without(change(recipe(work), method="grpo", options={}, train=name), "peers")
        alone["stages"][1]["tasks"] = {name: alone["stages"][1]["tasks"][name] | {"train": None}}
        opd.run(alone | {"output_dir": str(tmp_path / name)}, quiet=True)
        own, _ = saved(tmp_path / name / "together", 4)
        weights = together[k]["student"]
        assert all(torch.equal(values, weights[key]) for key, values in own[0]["student"].items())
