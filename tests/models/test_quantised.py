"""Models of 4 bits: the same numbers at every time, merged exactly, trained by adapters, and what is refused."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from support.models import LETTERS, build
from torch import Tensor

from opd.errors import ConfigError
from opd.models import quantised, saving
from opd.models.loading import load_model
from opd.models.new import character_tokenizer
from opd.recipe.schema import ModelSpec, Quantization

bitsandbytes = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")

IDS = torch.tensor([[2, 5, 3, 9, 4, 6], [3, 3, 7, 2, 8, 1]])
LORA = {"rank": 2}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    tokenizer = character_tokenizer(LETTERS)
    build("llama_tied", tokenizer, hidden_size=64, intermediate_size=128).save_pretrained(folder)  # type: ignore[operator]
    tokenizer.save_pretrained(folder)
    return folder


def loaded(base: Path, **spec: Any) -> Any:
    return load_model(ModelSpec(path=str(base), **spec), name="m")


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(IDS).logits


def with_random_adapter(base: Path, section: dict[str, Any]) -> Any:
    lm = loaded(base, quantization=section, lora=LORA)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in lm.trainable().values():
            parameter.copy_(0.05 * torch.randn(parameter.shape, generator=generator))
    return lm


SECTIONS = [{}, {"double": False}, {"type": "fp4"}]


@pytest.mark.parametrize("section", SECTIONS)
def test_loaded_model_is_plain_one_with_rounded_weights(base: Path, section: dict[str, Any]):
    """The oracle: the plain model, each layer's weight quantised and dequantised by bitsandbytes."""
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    plain: Any = loaded(base).model
    for name, module in plain.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            double, kind = section.get("double", True), section.get("type", "nf4")
            packed, state = quantize_4bit(module.weight.data, compress_statistics=double, quant_type=kind)
            module.weight.data = dequantize_4bit(packed, state)
    got = loaded(base, quantization=section)
    assert quantised.is_quantised(got.model)
    torch.testing.assert_close(logits(got.model), logits(plain), atol=1e-5, rtol=0)


@pytest.mark.parametrize("section", SECTIONS)
def test_numbers_do_not_change_by_an_evaluation(base: Path, section: dict[str, Any]):
    """With gradient, without, and with again: bitsandbytes stores weights anew for a forward without one."""
    lm = with_random_adapter(base, section)
    before = lm.model(IDS).logits.detach()
    assert torch.equal(logits(lm.model), logits(lm.model))
    torch.testing.assert_close(logits(lm.model), before, atol=1e-6, rtol=0)
    assert torch.equal(lm.model(IDS).logits.detach(), before)


@pytest.mark.parametrize("section", SECTIONS)
def test_saved_model_is_the_trained_one(base: Path, tmp_path: Path, section: dict[str, Any]):
    lm = with_random_adapter(base, section)
    expected = logits(lm.model)
    saving.save(lm, tmp_path / "saved")
    again = loaded(tmp_path / "saved")
    assert not quantised.is_quantised(again.model)
    assert not hasattr(again.model.config, "quantization_config")
    torch.testing.assert_close(logits(again.model), expected, atol=1e-4, rtol=0)  # 4 bits move them by 0.1
    assert torch.equal(logits(lm.model), expected)  # the trained model is as it was
    with lm.model.disable_adapter():
        assert not torch.allclose(logits(lm.model), expected, atol=1e-3)


def test_merging_into_4_bits_is_another_model(base: Path):
    """Why `merged` does not leave it to PEFT."""
    lm = with_random_adapter(base, {})
    expected = logits(lm.model)
    by_peft = copy.deepcopy(lm.model).merge_and_unload()
    assert (logits(by_peft) - expected).abs().max() > 10 * (logits(saving.merged_state(lm)) - expected).abs().max()


def test_adapters_alone_are_trained(base: Path):
    lm = loaded(base, quantization={}, lora=LORA)
    assert lm.trainable()
    assert all("lora_" in name for name in lm.trainable())
    lm.model(IDS).logits.sum().backward()
    assert all(parameter.grad is not None for parameter in lm.trainable().values())


def test_bytes_per_weight_are_those_of_the_tensors():
    """A matrix of 2 ** 20 weights: half a byte each, and the scales that bitsandbytes keeps."""
    from bitsandbytes.functional import quantize_4bit

    for double in (True, False):
        packed, state = quantize_4bit(torch.randn(1024, 1024), compress_statistics=double, quant_type="nf4")
        kept = [packed, state.absmax, *([state.state2.absmax] if double else [])]
        expected = sum(one.numel() * one.element_size() for one in kept)
        assert quantised.bytes_per_weight(Quantization(double=double)) * 2**20 == pytest.approx(expected, rel=1e-6)


def test_plan_counts_the_bytes_of_the_weights(base: Path):
    """The matrices inside the layers; norms are counted as if they had 4 bits, too, and are few."""
    from opd.commands.plan.formulas import weights_bytes
    from opd.commands.plan.recipe import shape_of

    lm = loaded(base, quantization={})
    plain = loaded(base).causal_lm
    shape = shape_of(plain.config, plain).shape
    kept = 0.0
    for parameter in lm.model.parameters():
        kept += parameter.numel() * parameter.element_size()
        if (state := getattr(parameter, "quant_state", None)) is not None:
            kept += state.absmax.numel() + 4 * state.state2.absmax.numel()
    norms = 4 * sum(p.numel() for name, p in lm.model.named_parameters() if "layernorm" in name)
    planned = weights_bytes(shape, 4, quantised.bytes_per_weight(Quantization()))
    assert planned == pytest.approx(kept - norms, rel=0.05)


def test_adapter_in_path_is_refused(base: Path, tmp_path: Path):
    lm = with_random_adapter(base, {})
    saving.save_adapter(lm, tmp_path / "adapter", str(base))
    with pytest.raises(ConfigError, match=r"is an adapter, and models\.m\.quantization cannot merge it"):
        loaded(tmp_path / "adapter", quantization={})


def test_quantization_is_refused_without_bitsandbytes(base: Path, monkeypatch: pytest.MonkeyPatch):
    import sys

    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ConfigError, match=r"models\.m\.quantization needs bitsandbytes.*opd\[quantization\]"):
        loaded(base, quantization={})


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"offload": True, "path": "x"}, "`offload` moves whole weights"),
        ({"init": {"model_type": "llama"}}, "`init` does not read `quantization`"),
        ({"server": {"urls": ["http://localhost:1"]}}, "`server` does not read `quantization`"),
    ],
)
def test_sections_that_cannot_be_quantised_are_refused(spec: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        ModelSpec(quantization=Quantization(), **spec)
