"""Writes a LanguageModel as a Hugging Face folder."""

from __future__ import annotations

import copy
from pathlib import Path

from torch import nn

from opd.models.language_model import LanguageModel


def merged_state(lm: LanguageModel) -> nn.Module:
    """A plain transformers model: a copy with the adapters merged, or the model itself."""
    if not lm.adapters:
        return lm.causal_lm
    return copy.deepcopy(lm.model).merge_and_unload()  # type: ignore[operator]


def save(lm: LanguageModel, folder: Path) -> None:
    """Safetensors, config and tokenizer: `AutoModelForCausalLM.from_pretrained(folder)` loads it."""
    merged_state(lm).save_pretrained(folder)  # type: ignore[operator]
    lm.tokenizer.save_pretrained(folder)
