"""Weights that are missing, damaged or of other shapes are errors, before they load and when they load."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.models import LETTERS, build
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from opd.errors import ConfigError
from opd.models.loading import load_model
from opd.models.new import character_tokenizer
from opd.models.weights import check_weights
from opd.recipe.schema import ModelSpec

DOWN, NORM = "model.layers.0.mlp.down_proj.weight", "model.norm.weight"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return written(tmp_path / "model")


def written(folder: Path, family: str = "llama", **settings: object) -> Path:
    tokenizer = character_tokenizer(LETTERS)
    build(family, tokenizer, **settings).save_pretrained(folder)  # type: ignore[operator]
    tokenizer.save_pretrained(folder)
    return folder


def changed(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    file = folder / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, {"format": "pt"})


def configured(folder: Path, **settings: object) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **settings}))


def refused(folder: Path, message: str) -> None:
    """By the check that reads no values, and by the load."""
    with pytest.raises(ConfigError, match=message):
        check_weights(folder, ModelSpec(path=str(folder)), "models.teacher.path")
    with pytest.raises(ConfigError, match=message):
        load_model(ModelSpec(path=str(folder)), name="teacher")


def test_load_model_refuses_missing_tensors(folder: Path):
    changed(folder, lambda tensors: [tensors.pop(DOWN), tensors.pop(NORM), tensors.pop("lm_head.weight")])
    refused(
        folder, rf"models\.teacher\.path: {folder}: the weights lack 3 tensors of the model \(lm_head.weight, {DOWN}"
    )


def test_load_model_refuses_config_with_more_layers(folder: Path):
    configured(folder, num_hidden_layers=3)  # of which the file has two
    refused(folder, r"lack 9 tensors of the model \(model\.layers\.2\.input_layernorm")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model_type": "llama9"}, r"config\.json cannot be read: The checkpoint .* has model type `llama9`"),
        ({"hidden_size": "64"}, r"config\.json cannot be read: .*'hidden_size' expected int, got str"),
        ({"model_type": "t5"}, r"is a t5 model, of which transformers' AutoModelForCausalLM makes none"),
    ],
)
def test_load_model_refuses_other_kinds_of_config(folder: Path, settings: dict[str, Any], message: str):
    configured(folder, **settings)
    refused(folder, message)


def test_load_model_notes_tensors_nothing_uses(folder: Path):
    configured(folder, num_hidden_layers=1)
    notes = load_model(ModelSpec(path=str(folder)), name="teacher").notes
    assert "9 tensors that the model does not use (model.layers.1.input_layernorm" in notes[0]
    assert list(notes) == check_weights(folder, ModelSpec(path=str(folder)), "models.teacher.path")


def test_load_model_refuses_other_shapes(folder: Path):
    changed(folder, lambda tensors: tensors.update({NORM: torch.ones(5)}))
    refused(folder, rf"shapes of 1 tensors differ from the model's \({NORM} has \(5,\), the model \(16,\)\)")


@pytest.mark.parametrize("size", [0, 7, 1000])
def test_load_model_names_damaged_file(folder: Path, size: int):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:size])
    refused(folder, rf"{file} \({size:,} bytes\) is not a whole safetensors file")


def test_load_model_names_missing_weight_file(folder: Path):
    parts = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    where = {name: f"model-{1 + (name == NORM)}.safetensors" for name in parts}
    for file in set(where.values()):
        save_file({name: parts[name] for name in parts if where[name] == file}, folder / file, {"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    assert check_weights(folder, ModelSpec(path=str(folder)), "x") == []
    assert load_model(ModelSpec(path=str(folder)), name="teacher").notes == ()
    (folder / "model-2.safetensors").unlink()
    refused(
        folder, r"lacks 1 of the 2 weight files that model\.safetensors\.index\.json names \(model-2\.safetensors\)"
    )


def test_load_model_refuses_folder_without_weights(folder: Path):
    (folder / "model.safetensors").unlink()
    refused(folder, "has no weights: neither model.safetensors nor")


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_load_model_names_tensor_with_nan(folder: Path, value: float):
    changed(folder, lambda tensors: tensors[DOWN][3].fill_(value))
    with pytest.raises(ConfigError, match=rf"the tensor {DOWN} in {folder}/model.safetensors holds NaN or infinity"):
        load_model(ModelSpec(path=str(folder)), name="teacher")


@pytest.mark.parametrize("family", ["llama_tied", "gemma2", "gpt2", "phi"])
def test_check_weights_accepts_what_save_pretrained_writes(tmp_path: Path, family: str):
    folder = written(tmp_path, family)
    assert check_weights(folder, ModelSpec(path=str(folder)), "x") == []


@pytest.mark.parametrize("prefix", ["model.", ""])
def test_check_weights_accepts_names_of_backbone(tmp_path: Path, prefix: str):
    folder = written(tmp_path, "llama_tied")
    names = {name: prefix + name.removeprefix("model.") for name in load_file(folder / "model.safetensors")}
    changed(folder, lambda t: [t.update({new: t.pop(old)}) for old, new in names.items()])
    assert check_weights(folder, ModelSpec(path=str(folder)), "x") == []


def test_check_weights_refuses_missing_expert(tmp_path: Path):
    """The file has a tensor per expert, which transformers joins: the names alone do not match the model's."""
    folder = tmp_path / "moe"
    config = AutoConfig.for_model(
        "qwen3_moe",
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=8,
        moe_intermediate_size=8,
        num_experts=4,
        num_experts_per_tok=2,
        vocab_size=10,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    character_tokenizer(LETTERS).save_pretrained(folder)
    assert check_weights(folder, ModelSpec(path=str(folder)), "x") == []
    changed(folder, lambda tensors: tensors.pop("model.layers.0.mlp.experts.2.down_proj.weight"))
    refused(folder, r"experts\.down_proj has \(3, 16, 8\), the model \(4, 16, 8\)")
