"""How many positions a config allows: against the lengths that the models' makers state."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from support.models import build
from transformers import AutoConfig

from opd.models.language_model import positions_of

YARN = {"rope_type": "yarn", "factor": 4.0}


def rope(**settings: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_theta": 10000.0, **settings}}


@pytest.mark.parametrize(
    ("model_type", "settings", "positions"),
    [
        ("llama", {"max_position_embeddings": 32}, 32),
        ("llama", {"max_position_embeddings": 4096, **rope(rope_type="linear", factor=4.0)}, 16384),  # Vicuna 16k
        # Qwen2.5, as its model card says to set it.
        ("qwen2", {"max_position_embeddings": 32768, **rope(**YARN, original_max_position_embeddings=32768)}, 131072),
        ("qwen2", {"max_position_embeddings": 32768, **rope(**YARN)}, 131072),
        ("qwen2", {"max_position_embeddings": 40960, **rope(**YARN, original_max_position_embeddings=32768)}, 131072),
        # DeepSeek-V3 stores the product.
        (
            "deepseek_v3",
            {
                "max_position_embeddings": 163840,
                **rope(rope_type="yarn", factor=40, original_max_position_embeddings=4096),
            },
            163840,
        ),
        # Llama 3.1 stores the product, and its factor is not the ratio.
        (
            "llama",
            {
                "max_position_embeddings": 131072,
                **rope(
                    rope_type="llama3",
                    factor=8.0,
                    low_freq_factor=1.0,
                    high_freq_factor=4.0,
                    original_max_position_embeddings=8192,
                ),
            },
            131072,
        ),
        (
            "gemma3_text",
            {"max_position_embeddings": 131072, "rope_scaling": {"rope_type": "linear", "factor": 8.0}},
            131072,
        ),
        ("llama", {"max_position_embeddings": 32, **rope(rope_type="dynamic", factor=4.0)}, 32),
        # Phi-3-mini-128k: the frequencies change at 4,096.
        (
            "phi3",
            {
                "max_position_embeddings": 131072,
                "original_max_position_embeddings": 4096,
                **rope(rope_type="longrope", short_factor=[1.0] * 48, long_factor=[2.0] * 48),
            },
            4096,
        ),
        ("gpt2", {"n_positions": 1024}, 1024),
        ("opt", {"max_position_embeddings": 2048}, 2048),
        ("falcon", {"alibi": True}, math.inf),
        ("falcon", {"alibi": False}, 2048),
        ("bloom", {}, math.inf),
        ("mpt", {}, 2048),  # transformers makes a table of ALiBi's biases, and raises beyond it
        ("xlnet", {}, math.inf),  # says -1
    ],
)
def test_positions_of_gives_stated_length(model_type: str, settings: dict[str, Any], positions: float):
    assert positions_of(AutoConfig.for_model(model_type, **settings)) == positions


@pytest.mark.parametrize(("kind", "exact"), [("linear", True), ("yarn", True), ("dynamic", False)])
@torch.no_grad()
def test_scaling_keeps_cached_keys_valid(kind: str, exact: bool):
    """Why dynamic scaling ends at `max_position_embeddings`: logits with a cache differ from those of the whole row."""
    model: Any = build("llama", max_position_embeddings=16, **rope(rope_type=kind, factor=4.0))
    ids = torch.tensor([[2 + i % 8 for i in range(40)]])
    cache = model(input_ids=ids[:, :20], use_cache=True).past_key_values
    cached = model(input_ids=ids[:, 20:], past_key_values=cache).logits[:, -1]
    assert torch.allclose(cached, model(input_ids=ids).logits[:, -1], atol=1e-4) == exact
