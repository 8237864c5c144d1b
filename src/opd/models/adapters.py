"""Low-rank adapters of a model."""

from __future__ import annotations

from typing import Any

from torch import nn


def add_lora(model: nn.Module, *, rank: int, alpha: float, target_modules: str | list[str]) -> nn.Module:
    """The model with trainable low-rank adapters (arXiv 2106.09685) and everything else frozen."""
    from peft import LoraConfig, get_peft_model

    targets: Any = target_modules
    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=targets, lora_dropout=0.0, task_type="CAUSAL_LM")  # type: ignore[arg-type]
    return get_peft_model(model, config)  # type: ignore[arg-type]
