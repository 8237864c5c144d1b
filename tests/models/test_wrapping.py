"""Architectures: where the hidden states come from, and what is refused by name."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.models import LETTERS, prompts_of
from transformers import AutoConfig, AutoModelForCausalLM, MllamaForCausalLM

from opd.errors import ConfigError
from opd.models import wrapping
from opd.models.new import character_tokenizer
from opd.samplers.hf import TransformersSampler
from opd.types import Sampling

COMMON = {"hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 2, "vocab_size": 10}
LLAMA4 = {
    **COMMON,
    "intermediate_size": 16,
    "intermediate_size_mlp": 16,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "num_local_experts": 2,
    "pad_token_id": 0,
}
MLLAMA = {**COMMON, "intermediate_size": 16, "num_key_value_heads": 2, "cross_attention_layers": [], "pad_token_id": 0}


def made(model_type: str, settings: dict[str, Any]) -> Any:
    ids = {"bos_token_id": 0, "eos_token_id": 1}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config: Any = AutoConfig.for_model(model_type, **{**ids, **settings})
        if model_type == "mllama_text_model":  # the text model of a larger one
            return MllamaForCausalLM(config).float().eval()
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


@pytest.mark.parametrize(("model_type", "settings"), [("llama4_text", LLAMA4), ("mllama_text_model", MLLAMA)])
def test_wrap_finds_backbone_that_prefix_does_not_name(model_type: str, settings: dict[str, Any]):
    model = made(model_type, settings)
    assert not hasattr(model, model.base_model_prefix)
    lm = wrapping.wrap(model, character_tokenizer(LETTERS), name="m")
    ids = torch.tensor([[2, 5, 3, 9]])
    with torch.no_grad():
        torch.testing.assert_close(lm.head().logits(lm.hidden(ids)), model(input_ids=ids).logits)
    (rollout,) = TransformersSampler(lm=lm, sampling=Sampling(max_completion_length=4))(prompts_of("abc"), seed=(0, 0))
    row = torch.tensor([[*rollout.prompt_ids, *rollout.response_ids.tolist()]])
    with torch.no_grad():
        logp = model(input_ids=row).logits[0, len(rollout.prompt_ids) - 1 : -1].log_softmax(-1)
    assert rollout.sampler_logp is not None
    expected = logp.gather(-1, rollout.response_ids[:, None])[:, 0]
    torch.testing.assert_close(rollout.sampler_logp, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("model_type", "settings", "name"),
    [
        ("xlm", {"vocab_size": 10, "emb_dim": 16, "n_heads": 2, "n_layers": 1}, "XLMWithLMHeadModel"),
        ("xlnet", {"vocab_size": 10, "d_model": 16, "n_head": 2, "n_layer": 1, "d_inner": 16}, "XLNetLMHeadModel"),
    ],
)
def test_wrap_refuses_architectures_that_look_ahead(model_type: str, settings: dict[str, Any], name: str):
    with pytest.raises(ConfigError, match=f"m: {name} predicts a token with the help of later tokens"):
        wrapping.wrap(made(model_type, settings), character_tokenizer(LETTERS), name="m")
