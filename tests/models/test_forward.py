"""Hidden states by every layout: padded, with shared prefixes read once, packed; values, gradients and tokens read."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from support.models import FAMILIES, tiny
from torch import Tensor

from opd.models import forward
from opd.models.forward import batches, response_states
from opd.models.language_model import LanguageModel, Reading

SYSTEM = [2, 3, 4, 5, 6, 7, 8, 9] * 3
OTHER = [*SYSTEM[::-1], 5, 6, 2]
GROUPS = [[*SYSTEM, 3], [*SYSTEM, 3], OTHER, OTHER]
ALONE = [[*SYSTEM, 3], [*SYSTEM, 7, 8], [*SYSTEM, 5, 6, 2], [*SYSTEM, 4]]
SHORT = [[3], [7, 8], [5, 6, 2], [4]]
RESPONSES = [[2, 3, 4], [5], [6, 7, 8, 9, 2, 3], [4, 4]]


def states(lm: LanguageModel, prompts: list[list[int]]) -> Tensor:
    """[sum of lengths, H], response after response."""
    got = response_states(lm, prompts, RESPONSES)
    return torch.cat([got.of(i, len(response)) for i, response in enumerate(RESPONSES)])


def one_by_one(lm: LanguageModel, prompts: list[list[int]]) -> Tensor:
    """The same, from the model's own forward over each whole sequence."""
    parts = []
    for prompt, response in zip(prompts, RESPONSES, strict=True):
        hidden = lm.hidden(torch.tensor([[*prompt, *response]]))[0]
        parts.append(hidden[len(prompt) - 1 : len(prompt) + len(response) - 1])
    return torch.cat(parts)


def gradient(lm: LanguageModel, hidden: Tensor) -> dict[str, Tensor]:
    lm.model.zero_grad(set_to_none=True)
    (hidden * torch.linspace(-1, 1, hidden.numel()).view_as(hidden)).sum().backward()
    return {name: p.grad.clone() for name, p in lm.trainable().items() if p.grad is not None}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("prompts", [GROUPS, ALONE, SHORT], ids=["groups", "system prompt", "nothing shared"])
@pytest.mark.parametrize("training", [False, True])
def test_read_gives_states_and_gradients_of_each_sequence(
    family: str, prompts: list[list[int]], training: bool, monkeypatch: pytest.MonkeyPatch
):
    lm = tiny(family)
    lm.model.train(training)
    calls: list[int] = []
    original = LanguageModel.forward

    def counted(self: LanguageModel, input_ids: Tensor, **kwargs: Any) -> Any:
        calls.append(input_ids.numel())
        return original(self, input_ids, **kwargs)

    expected = one_by_one(lm, prompts)
    wanted = gradient(lm, expected)
    monkeypatch.setattr(LanguageModel, "forward", counted)
    got = states(lm, prompts)
    assert len(calls) == (1 if prompts is SHORT else 2)  # the prefixes, then the rest
    torch.testing.assert_close(got, expected, atol=2e-5, rtol=2e-5)
    found = gradient(lm, got)
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        scale = float(value.abs().max())
        torch.testing.assert_close(found[name], value, atol=2e-5 * scale + 1e-6, rtol=1e-4, msg=name)


def test_read_forwards_shared_prompt_once(monkeypatch: pytest.MonkeyPatch):
    lm = tiny()
    tokens: list[tuple[int, ...]] = []
    original = LanguageModel.forward

    def counted(self: LanguageModel, input_ids: Tensor, **kwargs: Any) -> Any:
        tokens.append(tuple(input_ids.shape))
        return original(self, input_ids, **kwargs)

    monkeypatch.setattr(LanguageModel, "forward", counted)
    response_states(lm, GROUPS, RESPONSES)
    # Two prompts up to their last token; then that token and each response but its last, which predicts nothing.
    assert tokens == [(2, len(SYSTEM) + 2), (4, 6)]
    tokens.clear()
    response_states(lm, SHORT, RESPONSES)
    assert tokens == [(4, 3 + 6 - 1)]


@pytest.mark.parametrize("prompts", [GROUPS, SHORT], ids=["groups", "short"])
def test_read_keeps_sequences_apart_when_packed(prompts: list[list[int]], monkeypatch: pytest.MonkeyPatch):
    """FlashAttention keeps sequences apart by their positions; on a CPU, transformers does so with a mask."""
    lm = tiny()
    expected = one_by_one(lm, prompts)
    wanted = gradient(lm, expected)
    monkeypatch.setattr(LanguageModel, "packs", property(lambda self: True))
    got = states(lm, prompts)
    torch.testing.assert_close(got, expected, atol=2e-5, rtol=2e-5)
    for name, value in gradient(lm, got).items():
        torch.testing.assert_close(value, wanted[name], atol=1e-5, rtol=1e-4, msg=name)


def test_packs_is_true_only_for_flash_attention():
    lm = tiny()
    assert not lm.packs
    assert lm.caches
    lm.causal_lm.config._attn_implementation_internal = "flash_attention_2"
    assert lm.packs
    assert not lm.caches  # a packed row repeats the prefix, and micro_batch_tokens must count it each time


def test_read_keeps_gradients_when_gradient_checkpointing(monkeypatch: pytest.MonkeyPatch):
    lm = tiny()
    expected = gradient(lm, one_by_one(lm, GROUPS))
    lm.model.gradient_checkpointing_enable()
    lm.model.train()
    assert not lm.caches
    found = gradient(lm, states(lm, GROUPS))
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, atol=1e-5, rtol=1e-4, msg=name)


@pytest.mark.parametrize("tokens", [1, 40, 70, 100, 10**6])
@pytest.mark.parametrize("prompts", [GROUPS, ALONE, SHORT])
def test_batches_cover_rows_once_within_token_limit(prompts: list[list[int]], tokens: int):
    lengths = [len(response) for response in RESPONSES]
    lm = tiny()
    alone = replace(lm, reading=Reading(continues=False))
    for reads in (lm, alone):
        got = batches(reads, prompts, lengths, tokens)
        assert sorted(i for rows in got for i in rows) == [0, 1, 2, 3]
        for rows in got:
            padded = max(len(prompts[i]) + lengths[i] for i in rows) * len(rows)
            assert len(rows) == 1 or padded <= tokens or reads.caches
    if tokens == 100 and prompts is GROUPS:  # 2 prefixes of 26 and 4 rows of 8 fit; 4 rows of 33 do not
        assert len(batches(lm, prompts, lengths, tokens)) < len(batches(alone, prompts, lengths, tokens))


def test_batches_keep_rows_of_group_adjacent():
    prompts = [[1, *[2] * 30], [3, *[2] * 30]] * 3
    got = batches(tiny(), prompts, [5, 60, 6, 50, 7, 4], 10**6)
    assert got == [[1, 3, 5, 4, 2, 0]]
    assert forward.shared_prefixes(prompts) is not None
