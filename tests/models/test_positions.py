"""How many positions a config allows: against the lengths that the models' makers state."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from support.architectures import small_model
from support.models import build
from transformers import AutoConfig

from opd.errors import DataError
from opd.models import probe, wrapping
from opd.models.language_model import LanguageModel
from opd.models.new import character_tokenizer
from opd.models.positions import positions_of

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
        # An index selects 2,048 tokens.
        *((kind, {}, 2048) for kind in ("deepseek_v32", "glm_moe_dsa", "axk2", "hy_v4", "dots3_note_text")),
        ("deepseek_v4", {}, 1048576),  # selects among compressed tokens
        ("doge", {"max_position_embeddings": 8192}, 2048),
        ("minimax_m3_vl_text", {}, 2048),  # 16 blocks of 128
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


@pytest.mark.parametrize(("kind", "key"), [("deepseek_v32", "index_topk"), ("doge", "keep_window_size")])
def test_selected_tokens_are_exact_up_to_positions(kind: str, key: str, monkeypatch: pytest.MonkeyPatch):
    """Read token by token, a row of so many tokens has the log-probs that it has alone; a long one has others."""
    model = small_model(kind, **{key: 16, "max_position_embeddings": 256})
    lm = wrapping.wrap(model.eval(), character_tokenizer("abcdefghijklmnopqrstuvwxyz0123456789"))
    assert lm.positions == 16

    def off(tokens: int, seed: int = 0) -> float:
        row = torch.randint(2, lm.vocabulary, (tokens,), generator=torch.Generator().manual_seed(seed)).tolist()
        with torch.no_grad():
            (whole,), (states,) = probe.alone(lm, [row]), probe.decoded(lm, [row])
            alone = probe.log_probs(lm, whole)[-len(states) :]
            return probe.distance(probe.log_probs(lm, states), alone)

    assert max(off(16, seed) for seed in range(8)) < 1e-4
    with pytest.raises(DataError, match="would read 57 tokens in all, but has only 16 positions"):
        off(60)
    monkeypatch.setattr(LanguageModel, "check_length", lambda *_: None)
    assert max(off(60, seed) for seed in range(8)) > 1e-3
