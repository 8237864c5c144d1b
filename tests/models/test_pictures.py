"""Pictures in prompts: scores and gradients equal those of transformers with `pixel_values`, for every family."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from support.visions import FAMILIES, noise, opened, vision
from torch import Tensor

from opd.models.forward import response_states
from opd.models.head import UNWRITTEN
from opd.models.language_model import LanguageModel, Reading
from opd.models.render import render
from opd.types import Prompt


@pytest.fixture(scope="module")
def models(tmp_path_factory: Any) -> dict[str, LanguageModel]:
    folder = tmp_path_factory.mktemp("vision")
    return {family: vision(family, folder / family) for family in FAMILIES}


def mark(lm: LanguageModel) -> str:
    return lm.tokenizer.pictures.mark


def prompts_for(lm: LanguageModel) -> list[Prompt]:
    """Of one and two pictures, and of none; a picture first, in the middle and last; equal words, other pixels."""
    at = mark(lm)
    shown = [
        (f"abc{at}de", (noise(1),)),
        (f"abc{at}de", (noise(2),)),
        (f"{at}ab{at}ba", (noise(2), noise(3))),
        ("abcdefgh", ()),
        (f"fgh{at}", (noise(1),)),
    ]
    return [Prompt(id=i, content=text, images=images) for i, (text, images) in enumerate(shown)]


RESPONSES = ([7, 9, 11, 1], [8, 12, 1], [10, 9, 13, 14, 15], [9, 1], [12, 13, 1])


def plain_logp(lm: LanguageModel, model: Any, prompt: Prompt, response: list[int]) -> Tensor:
    """[T, V]: log-probs of the response's places by transformers alone, from the processor's tensors."""
    images = [opened(image) for image in prompt.images]
    given = lm.tokenizer.processor(text=[prompt.content], images=[images] if images else None, return_tensors="pt")
    before = given["input_ids"].shape[1]
    new = torch.tensor([response])
    given["input_ids"] = torch.cat([given["input_ids"], new], 1)
    for name, value in (("attention_mask", 1), ("token_type_ids", 0), ("mm_token_type_ids", 0)):
        if name in given:
            given[name] = torch.cat([given[name], torch.full_like(new, value)], 1)
    dtype = next(model.parameters()).dtype
    given = {k: v.to(dtype) if v.is_floating_point() else v for k, v in given.items()}
    if not images:
        given.pop("token_type_ids", None)
    logits = model(**given).logits[0, before - 1 : -1]
    masked = logits.index_fill(-1, torch.tensor(sorted(lm.unwritten)), -torch.inf)
    return masked.log_softmax(-1)


def own_logp(lm: LanguageModel, prompts: list[Prompt], responses: list[list[int]]) -> list[Tensor]:
    """[T, V] of each row, as opd scores and trains."""
    ids = [render(prompt, lm.tokenizer) for prompt in prompts]
    states = response_states(lm, ids, responses)
    return [lm.head().logits(states.of(i, len(r))).log_softmax(-1) for i, r in enumerate(responses)]


@pytest.mark.parametrize("family", FAMILIES)
def test_log_probs_equal_those_of_transformers(models: dict[str, LanguageModel], family: str):
    lm = models[family]
    assert lm.reading == Reading()
    prompts = prompts_for(lm)
    with torch.no_grad():
        for got, prompt, response in zip(own_logp(lm, prompts, list(RESPONSES)), prompts, RESPONSES, strict=True):
            expected = plain_logp(lm, lm.model, prompt, response)
            written = [i for i in range(expected.shape[1]) if i not in lm.unwritten]
            torch.testing.assert_close(got[:, written], expected[:, written], atol=1e-5, rtol=0)
            assert bool((got[:, sorted(lm.unwritten)] < UNWRITTEN / 2).all())


@pytest.mark.parametrize("family", FAMILIES)
def test_gradient_equals_that_of_transformers(models: dict[str, LanguageModel], family: str):
    """Of all parameters, the vision tower's included, in float64."""
    model = copy.deepcopy(models[family].model).double()
    lm = LanguageModel(
        model=model,
        tokenizer=models[family].tokenizer,
        vocabulary=models[family].vocabulary,
        stop_ids=models[family].stop_ids,
        unwritten=models[family].unwritten,
    )
    prompts, responses = prompts_for(lm), list(RESPONSES)
    total = sum(
        logp.gather(-1, torch.tensor(r)[:, None]).sum()
        for logp, r in zip(own_logp(lm, prompts, responses), responses, strict=True)
    )
    total.backward()
    own = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    expected = sum(
        plain_logp(lm, model, prompt, r).gather(-1, torch.tensor(r)[:, None]).sum()
        for prompt, r in zip(prompts, responses, strict=True)
    )
    assert abs(float(total) - float(expected)) < 2e-4  # the head computes in float32
    expected.backward()
    for name, p in model.named_parameters():
        assert (own[name] is None) == (p.grad is None), name
        if p.grad is not None:
            torch.testing.assert_close(own[name], p.grad, atol=2e-5, rtol=2e-5, msg=lambda m, n=name: f"{n}: {m}")
    assert any("vision" in name and g is not None and bool(g.abs().max() > 1e-3) for name, g in own.items())
