"""`engine: {weights: lora}`: only the adapter is sent, under a new name after every update, and proved."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.engines import Engine, refused, running
from support.http_server import Arrived, Said
from support.runs import Forks, command, one_stage, prepare, tiny_model

import opd
from opd.errors import TrainingError
from opd.models.loading import load_model
from opd.recipe.schema import ModelSpec

STEPS = 3
LORA = {"rank": 4, "alpha": 8}


@pytest.fixture
def engine() -> Iterator[Engine]:
    """A server of the student's base model."""
    one = Engine(lm=load_model(ModelSpec(**tiny_model(2)), name="student", seed=0), name="student", longest=512)
    with running(one):
        yield one


def recipe(engine: Engine, *, lora: dict[str, Any] | None = LORA, **section: Any) -> dict[str, Any]:
    made = one_stage(
        method="topk_reverse_kl",
        options={"k": 4, "by": "teacher", "form": "tail"},
        steps=STEPS,
        prompts_per_step=3,
        sampling={"max_completion_length": 5, "n": 2},
        optimizer={"learning_rate": 0.02, "eps": 1e-4},
        engine={"urls": [engine.url], "patience_s": 2.0, "weights": "lora", **section},
    )
    made["models"]["student"] |= {} if lora is None else {"lora": lora}
    return made


def rows(folder: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "run/distil" / name).read_text().splitlines()]


def trained(forks: Forks, folder: Path, made: dict[str, Any], processes: int = 1) -> Path:
    ended = forks.start(prepare(folder, made), "train", "recipe.yaml", processes=processes)
    assert ended.code == 0, ended.err
    return folder


def run(folder: Path, made: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(prepare(folder, made))
    opd.run("recipe.yaml", quiet=True)


def same(one: Path, other: Path) -> None:
    wanted, found = ([row["train/loss"] for row in rows(folder, "metrics.jsonl")] for folder in (one, other))
    assert found == pytest.approx(wanted, rel=2e-5)
    assert len(set(wanted)) == STEPS


def test_adapter_run_equals_run_with_whole_weights(forks, engine, tmp_path):
    lora = trained(forks, tmp_path / "lora", recipe(engine))
    assert not engine.loads  # no whole weights
    full = trained(forks, tmp_path / "full", recipe(engine, weights="full"))
    same(full, lora)
    assert max(row["engine_sync_error"] for row in rows(lora, "timings.jsonl")) < 1e-5
    sizes = {one.name: one.stat().st_size for one in next((lora / "run/distil/engine").iterdir()).iterdir()}
    assert sizes["adapter_model.safetensors"] == sum(sizes[name] for name in sizes if name.endswith(".safetensors"))


def test_two_processes_with_adapters_equal_one(forks, engine, tmp_path):
    one = trained(forks, tmp_path / "one", recipe(engine))
    two = trained(forks, tmp_path / "two", recipe(engine), processes=2)
    same(one, two)
    assert not [one for one in engine.arrived if one.target == "/v1/completions"]  # two at a time end a real one


def test_adapter_names_are_new_and_old_ones_unloaded(engine, tmp_path, monkeypatch):
    for name in ("one", "two"):
        run(tmp_path / name, recipe(engine), monkeypatch)
    names = engine.names_used
    assert len(set(names)) == len(names) >= 2 * STEPS
    assert [name.split("-")[1] for name in names[:STEPS]] == ["0", "1", "2"]
    assert list(engine.adapters) == [names[len(names) // 2 - 1], names[-1]]  # the last of each run
    asked = [one["model"] for one in engine.drawn]
    assert list(dict.fromkeys(asked)) == names[:STEPS] + names[len(names) // 2 :][:STEPS]


def test_adapter_without_effect_ends_the_run(engine, tmp_path, monkeypatch):
    """A server that answers the load of the second adapter with success, and draws with the first one's weights."""
    real = Engine._load_adapter

    def load(self: Engine, name: str, folder: Path) -> Said:
        if self.names_used:
            tensors = load_file(folder / "adapter_model.safetensors")
            save_file({n: torch.zeros_like(t) for n, t in tensors.items()}, folder / "adapter_model.safetensors")
        return real(self, name, folder)

    monkeypatch.setattr(Engine, "_load_adapter", load)
    with pytest.raises(TrainingError, match=r"does not draw with the student's adapter of step 1: .* nats"):
        run(tmp_path, recipe(engine), monkeypatch)


def test_other_base_model_ends_the_run(engine, tmp_path, monkeypatch):
    engine.lm = load_model(ModelSpec(**tiny_model(3)), name="student", seed=0)
    with pytest.raises(TrainingError, match="Does it serve the model that the student's adapter belongs to"):
        run(tmp_path, recipe(engine), monkeypatch)


def test_new_base_weights_end_the_run(engine, tmp_path, monkeypatch):
    """Another run gives the server whole weights: vLLM stamps their version on the tokens of adapters too."""

    def fault(arrived: Arrived, said: Said) -> Said:
        if arrived.request in engine.drawn:
            engine.version = "4"
        return said

    engine.fault = fault
    with pytest.raises(TrainingError, match="with the weights of version 4, and the student is at version default"):
        run(tmp_path, recipe(engine), monkeypatch)


@pytest.mark.parametrize(
    ("rank", "fault", "message"),
    [
        (32, None, "LoRA rank 32 is greater than max_lora_rank 16"),
        (4, refused(404, "Not Found"), "VLLM_ALLOW_RUNTIME_LORA_UPDATING=1, `--enable-lora`, `--max-lora-rank` of at"),
    ],
)
def test_refused_adapter_ends_the_run_with_remedy(engine, tmp_path, monkeypatch, rank, fault, message):
    if fault is not None:
        engine.fault = lambda arrived, said: fault if arrived.target == "/v1/load_lora_adapter" else said
    with pytest.raises(TrainingError, match=message):
        run(tmp_path, recipe(engine, lora={"rank": rank, "alpha": 8}), monkeypatch)


def test_restarted_server_gets_the_next_adapter(engine, tmp_path, monkeypatch):
    """It has lost the adapter before, which cannot be unloaded."""
    clean = tmp_path / "clean"
    run(clean, recipe(engine), monkeypatch)

    def fault(arrived: Arrived, said: Said) -> Said:
        if arrived.target == "/v1/load_lora_adapter":
            for name in list(engine.adapters)[:-1]:
                engine.adapters.pop(name)
        return said

    engine.fault = fault
    run(tmp_path / "ill", recipe(engine), monkeypatch)
    same(clean, tmp_path / "ill")


def test_update_that_fails_once_is_repeated(engine, tmp_path, monkeypatch):
    """Also one whose adapter was loaded before the failure: its name is new, so it is the same adapter."""
    clean = tmp_path / "clean"
    run(clean, recipe(engine), monkeypatch)
    failed: set[str] = set()

    def fault(arrived: Arrived, said: Said) -> Said:
        name, draws = arrived.request.get("model"), arrived.request.get("sampling_params", {})
        if draws.get("temperature") == 2.0 and name not in failed:
            failed.add(str(name))
            return refused(500, "a fault")
        return said

    engine.fault = fault
    run(tmp_path / "ill", recipe(engine), monkeypatch)
    same(clean, tmp_path / "ill")
    assert len(failed) >= STEPS
    assert sum(row["engine_repeated"] for row in rows(tmp_path / "ill", "timings.jsonl")) >= STEPS


def test_live_check_says_whether_adapters_are_taken(engine, tmp_path, monkeypatch):
    monkeypatch.chdir(prepare(tmp_path, recipe(engine)))
    said = command("check", "recipe.yaml", "--live")
    assert "take adapters" in " ".join(said.out.split())
    assert not engine.names_used
    engine.fault = lambda arrived, said: refused(404, "Not Found") if "lora" in arrived.target else said
    said = command("check", "recipe.yaml", "--live")
    assert said.code
    assert "does not give its routes for adapters: HTTP 404" in " ".join(said.err.split())


def test_check_refuses_adapters_of_a_model_without(engine, tmp_path, monkeypatch):
    monkeypatch.chdir(prepare(tmp_path, recipe(engine, lora=None)))
    said = command("check", "recipe.yaml")
    assert said.code
    assert "`weights: lora` sends an adapter, and the model 'student' trains its full weights" in said.err.replace(
        "\n", " "
    )
    assert not engine.arrived
