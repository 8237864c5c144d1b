"""Weights laid out for oneDNN while a response is written: the same distribution, and a model that is as it was."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from support.models import FAMILIES, build, byte_tokenizer, prompts_of, sampler, tiny
from torch import nn

from opd.models import adapters, wrapping
from opd.models.head import Head
from opd.samplers import prepack
from opd.samplers.prepack import prepacked

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch is built without oneDNN")
PROMPTS = prompts_of("a", "bcdefgh", "hg", "abab")


@pytest.fixture
def every_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepack, "SMALLEST", 0)


def linear_layers(model: nn.Module) -> list[nn.Linear]:
    return [module for module in model.modules() if type(module) is nn.Linear]


def swapped(model: nn.Module) -> int:
    return sum("forward" in vars(module) for module in model.modules())


@pytest.mark.parametrize("family", FAMILIES)
def test_prepacked_gives_logits_and_states_of_model(family: str, every_size: None):
    lm = tiny(family, seed=1, padding_rows=3)
    ids = torch.tensor([[2, 3, 4], [5, 6, 7]])
    with torch.inference_mode():
        hidden = lm.hidden(ids)
        with prepacked(lm) as logits_of:
            assert swapped(lm.model) == len(linear_layers(lm.model)) - 1  # all but the output layer, which nobody calls
            packed = lm.hidden(ids)
            logits = logits_of(hidden)
        torch.testing.assert_close(packed, hidden, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(logits, lm.head().logits(hidden), atol=1e-5, rtol=1e-5)
        assert logits.shape == (2, 3, lm.vocabulary)
        assert swapped(lm.model) == 0


def test_prepacked_keeps_responses_of_adapters(every_size: None, monkeypatch: pytest.MonkeyPatch):
    adapted = adapters.add_lora(build(seed=1), rank=4, alpha=8, target_modules="all-linear")
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.3)
    lm = wrapping.wrap(adapted, tiny().tokenizer)
    packed = sampler(lm)(PROMPTS, seed=(0, 0))
    monkeypatch.setattr(prepack, "SMALLEST", 10**9)
    plain = sampler(lm)(PROMPTS, seed=(0, 0))
    for a, b in zip(packed, plain, strict=True):
        assert a.response_ids.tolist() == b.response_ids.tolist()
        torch.testing.assert_close(a.policy_logp, b.policy_logp, atol=1e-5, rtol=1e-5)


def test_prepacked_follows_changed_weights(every_size: None):
    lm = tiny(seed=1)
    (before,) = sampler(lm, temperature=0.0)(PROMPTS[:1], seed=(0, 0))
    with torch.no_grad():
        for parameter in lm.model.parameters():
            parameter.copy_(dict(tiny(seed=2).model.named_parameters())[_name(lm.model, parameter)])
    (after,) = sampler(lm, temperature=0.0)(PROMPTS[:1], seed=(0, 0))
    (expected,) = sampler(tiny(seed=2), temperature=0.0)(PROMPTS[:1], seed=(0, 0))
    assert after.response_ids.tolist() == expected.response_ids.tolist() != before.response_ids.tolist()


def _name(model: nn.Module, parameter: nn.Parameter) -> str:
    return next(name for name, p in model.named_parameters() if p is parameter)


def test_prepacked_restores_model_after_error(every_size: None):
    lm = tiny()
    with pytest.raises(KeyboardInterrupt), prepacked(lm):
        raise KeyboardInterrupt
    assert swapped(lm.model) == 0
    lm.hidden(torch.tensor([[2, 3]])).sum().backward()
    assert all(layer.weight.grad is not None for layer in linear_layers(lm.model)[:-1])


def test_prepacked_skips_small_layers_and_other_precisions():
    small = tiny(tokenizer=byte_tokenizer())
    half = wrapping.wrap(build().to(torch.bfloat16), tiny().tokenizer)
    for lm in (small, half, replace(small, autocast=True)):
        with prepacked(lm) as logits_of:
            assert swapped(lm.model) == 0
            assert isinstance(getattr(logits_of, "__self__", None), Head)


def test_prepacked_takes_only_large_layers(monkeypatch: pytest.MonkeyPatch):
    lm = tiny(tokenizer=byte_tokenizer(), hidden=16)
    monkeypatch.setattr(prepack, "SMALLEST", 16 * 32)  # the MLP's 16 x 32, the head; not the attention's 16 x 16
    with prepacked(lm) as logits_of:
        assert swapped(lm.model) == 2 * 3
        assert not isinstance(getattr(logits_of, "__self__", None), Head)
