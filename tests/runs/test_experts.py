"""A stage that trains a mixture of experts: what is checked, said and measured."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from support.runs import one_stage, prepare, tiny_model

import opd
from opd.commands.check import check_recipe
from opd.errors import ConfigError
from opd.recipe.load import load_recipe, parse_recipe
from opd.recipe.schema import StageSpec

LINE = "its config has a load-balancing loss of its routers with the coefficient 0.001, which is not trained"
EXPERTS = {"experts/load_max", "experts/unused_share", "experts/entropy"}


def mixture(**init: Any) -> dict[str, Any]:
    """A model section: a Mixtral of four experts, of which each token takes two."""
    made = tiny_model(2)
    made["init"] |= {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2, **init}
    return made


def recipe(model: dict[str, Any] | None = None, **stage: Any) -> dict[str, Any]:
    made = one_stage(micro_batch_tokens=8, **stage)
    made["models"]["student"] = mixture() if model is None else model
    return made


def checked(folder: Path, monkeypatch: pytest.MonkeyPatch, made: dict[str, Any]) -> list[str]:
    prepare(folder, made)
    monkeypatch.chdir(folder)
    return check_recipe(load_recipe("recipe.yaml"))


def spec_with(value: Any) -> StageSpec:
    return parse_recipe(recipe(router_aux_loss=value)).stages[0]


def test_check_recipe_says_that_loss_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    lines = checked(tmp_path, monkeypatch, recipe())
    assert sum(LINE in line for line in lines) == 1
    for other in (recipe(router_aux_loss=0.1), recipe(router_aux_loss=True), one_stage()):
        assert not any("load-balancing" in line for line in checked(tmp_path, monkeypatch, other))


def test_check_recipe_refuses_loss_that_model_cannot_have(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(ConfigError, match=r"router_aux_loss is 0\.1, and the model \(LlamaForCausalLM\) has no router"):
        checked(tmp_path, monkeypatch, one_stage(router_aux_loss=0.1))
    with pytest.raises(ConfigError, match=r"router_aux_loss is true, which means the coefficient of the config"):
        checked(tmp_path, monkeypatch, recipe(mixture(router_aux_loss_coef=0.0), router_aux_loss=True))


@pytest.mark.parametrize("value", [False, True, 0.0, 1.0, 0.25])
def test_router_aux_loss_keeps_its_value(value: bool | float):
    found = spec_with(value).router_aux_loss
    assert found == value
    assert type(found) is type(value)


def test_router_aux_loss_reads_numbers_and_refuses_others():
    assert spec_with(1).router_aux_loss is not True
    assert spec_with("1e-3").router_aux_loss == 0.001  # as YAML reads 1e-3
    for wrong in (-0.1, "config", float("nan"), float("inf")):
        with pytest.raises(ConfigError, match="router_aux_loss"):
            spec_with(wrong)


def test_run_reports_load_and_adds_loss(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    prepare(tmp_path, recipe())
    monkeypatch.chdir(tmp_path)
    plain = opd.run("recipe.yaml", "output_dir=plain")
    said = " ".join(capsys.readouterr().out.split())
    assert said.count("which is not trained") == 1
    balanced = opd.run("recipe.yaml", "output_dir=balanced", "router_aux_loss=0.5")
    of_config = opd.run("recipe.yaml", "output_dir=of_config", "router_aux_loss=true")
    assert "which is not trained" not in " ".join(capsys.readouterr().out.split())
    first, with_loss, with_config = (run.metrics[0] for run in (plain, balanced, of_config))
    assert {name for name in first if name.startswith("experts/")} == EXPERTS
    assert {name for name in with_loss if name.startswith("experts/")} == {*EXPERTS, "experts/balance_loss"}
    added = with_loss["experts/balance_loss"]
    assert 1.9 < added < 4  # 2 if all experts are chosen equally
    assert with_loss["train/loss"] - first["train/loss"] == pytest.approx(0.5 * added, rel=1e-4)
    assert with_config["train/loss"] - first["train/loss"] == pytest.approx(0.001 * added, rel=1e-2)
    same = [name for name in first if name not in ("train/loss", "optim/grad_norm")]
    assert [with_loss[name] for name in same] == [first[name] for name in same]
