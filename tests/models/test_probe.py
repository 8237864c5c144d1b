"""The probe of a model: the ways of reading that it finds exact; and sampling, scoring and training are exact then."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.architectures import small_model
from support.exactness import exactness
from support.models import build, prompts_of, sampler, tiny
from torch import nn

from opd.errors import ConfigError
from opd.models import probe as probes
from opd.models import wrapping
from opd.models.language_model import LanguageModel, Reading
from opd.models.new import character_tokenizer

CHARACTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456"


def small(model_type: str, seed: int = 0) -> LanguageModel:
    return wrapping.wrap(small_model(model_type, seed=seed), character_tokenizer(CHARACTERS), name=model_type)


# docs/architectures.md has all of them; these are the ways in which architectures differ.
@pytest.mark.parametrize(
    ("model_type", "reading"),
    [
        ("gemma4_text", Reading()),  # sliding windows, shorter than the rows
        ("llama4_text", Reading()),  # chunks of positions
        ("inkling_text", Reading(recurrent=True)),  # hidden states divided before the output layer
        ("bart", Reading(padding=False)),  # learned positions count the padding
        ("bamba", Reading(recurrent=True)),  # positions after a cache must be given
        ("qwen3_next", Reading(recurrent=True)),
        ("kimi_linear", Reading(recurrent=True)),
        ("minimax", Reading(recurrent=True)),  # states outside of the cache's layers
        ("mamba", Reading(padding=False, continues=False, recurrent=True)),
        ("lfm2", Reading(recurrent=True)),
        ("rwkv", Reading(cache=False, padding=False, continues=False)),
        ("recurrent_gemma", Reading(cache=False, padding=False, continues=False)),
        ("openai-gpt", Reading(cache=False, padding=False, continues=False)),
        ("phimoe", Reading(training=False)),  # a router with noise
    ],
)
def test_probe_finds_exact_ways_of_reading(model_type: str, reading: Reading):
    student = small(model_type)
    assert student.reading == reading
    assert exactness(student, small(model_type, seed=1)).exact


def test_probe_refuses_model_that_looks_ahead():
    model = small_model("bert-generation", is_decoder=False)
    with pytest.raises(ConfigError, match=r"bert: BertGenerationDecoder predicts a token with the help of later"):
        wrapping.wrap(model, character_tokenizer(CHARACTERS), name="bert")


def test_probe_refuses_model_without_gradient_in_eval():
    with pytest.raises(ConfigError, match=r"reformer: .* has no gradient in eval\(\)"):
        small("reformer")


def batch_sensitive(model: Any) -> nn.Module:
    """The states of a row grow with the number of rows in its batch."""

    def scaled(module: nn.Module, args: Any, hidden: torch.Tensor) -> torch.Tensor:
        return hidden * (1 + 0.1 * (len(hidden) - 1))

    model.model.norm.register_forward_hook(scaled)
    return model


def test_rows_are_read_alone_when_states_depend_on_batch():
    models = [batch_sensitive(build(seed=seed)) for seed in (0, 1)]
    student, teacher = (wrapping.wrap(model, tiny().tokenizer, name=f"m{i}") for i, model in enumerate(models))
    assert student.reading == Reading(together=False, padding=False)
    assert student.notes == (
        "m0: LlamaForCausalLM gives a row other states in a batch than alone, so each row is read alone, which is slow",
    )
    found = exactness(student, teacher)
    assert max(found.sampler, found.teacher) < 1e-5
    assert found.gradient < 1e-4


def test_model_trains_in_eval_when_train_has_noise():
    lm = tiny()

    def noisy(module: nn.Module, args: Any, hidden: torch.Tensor) -> torch.Tensor:
        return hidden + torch.randn_like(hidden) if module.training else hidden

    lm.model.model.norm.register_forward_hook(noisy)
    again = wrapping.wrap(lm.model, lm.tokenizer, name="noisy")
    assert again.reading == Reading(training=False)
    assert "other states in train() than in eval()" in again.notes[0]
    found = exactness(again, tiny(seed=1))
    assert found.gradient < 1e-4


def test_probe_leaves_model_and_random_state_as_they_were():
    lm = tiny()
    for training in (False, True):
        lm.model.train(training)
        torch.manual_seed(3)
        before = torch.random.get_rng_state()
        wrapping.wrap(lm.model, lm.tokenizer)
        assert lm.model.training == training
        assert torch.equal(torch.random.get_rng_state(), before)


def test_sampler_decodes_prompts_of_one_length_together():
    """Bart reads each prompt's length apart; the responses are those of each prompt sampled alone."""
    lm = small("bart")
    prompts = prompts_of("abc", "de", "fgh", "ij", "klmno")
    shapes: list[tuple[int, int]] = []
    backbone = lm.backbone
    forward = backbone.forward

    def counted(*args: Any, **kwargs: Any) -> Any:
        if kwargs.get("past_key_values") is None:
            shapes.append(tuple(kwargs["input_ids"].shape))
        return forward(*args, **kwargs)

    backbone.forward = counted  # type: ignore[method-assign]
    together = sampler(lm, n=2)(prompts, seed=(0, 0))
    assert shapes == [(2, 2), (2, 3), (1, 5)]
    alone = [rollout for prompt in prompts for rollout in sampler(lm, n=2)([prompt], seed=(0, 0))]
    assert [r.response_ids.tolist() for r in together] == [r.response_ids.tolist() for r in alone]


@pytest.mark.parametrize("model_type", ["mixtral", "minimax_m2"])
def test_wrap_switches_off_jitter_of_routers(model_type: str):
    """Noise on the routers' inputs in train() alone; the saved config keeps it."""
    model = small_model(model_type, router_jitter_noise=0.5)
    lm = wrapping.wrap(model, character_tokenizer(CHARACTERS), name="m")
    assert lm.reading.training
    assert lm.causal_lm.config.router_jitter_noise == 0.5
    ids = torch.tensor([[3, 4, 5, 6]])
    with torch.no_grad():
        expected = lm.hidden(ids)
        lm.model.train()
        assert torch.equal(lm.hidden(ids), expected)


def test_notes_say_that_checkpointing_has_no_effect_in_eval():
    model: Any = small_model("phimoe")
    model.gradient_checkpointing_enable()
    lm = wrapping.wrap(model, character_tokenizer(CHARACTERS), name="m")
    assert "so it trains in eval(), and gradient checkpointing has no effect" in lm.notes[-1]


@pytest.mark.parametrize(("moved", "times"), [(0.0, 1.0), (5e-5, 4.0), (1.0, 10.0), (float("inf"), 10.0)])
def test_limit_follows_rounding_that_the_model_amplifies(monkeypatch: pytest.MonkeyPatch, moved: float, times: float):
    """SmolLM2's batches differ from single rows by 6e-5 nats on one processor and by 1.8e-4 on another."""
    lm = small("llama")
    rows = probes.rows_for(lm)
    with torch.no_grad():
        expected = [probes.log_probs(lm, hidden) for hidden in probes.alone(lm, rows)]
        assert 0 < probes.amplified(lm, rows, expected, torch.finfo(torch.float32).eps) < 1e-5
        monkeypatch.setattr(probes, "amplified", lambda *_: 0.0)
        least = probes.rounding(lm, rows, expected)
        monkeypatch.setattr(probes, "amplified", lambda *_: moved)
        assert probes.rounding(lm, rows, expected) == pytest.approx(times * least, rel=0.02)
