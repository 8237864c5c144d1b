"""The sampler of a stage with an engine, and a student that changes as if it had been trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from opd.models.language_model import LanguageModel
from opd.recipe.schema import EngineSection, StageSpec
from opd.runs.served import engine_samplers
from opd.samplers.vllm import EngineSampler


def engine_sampler(lm: LanguageModel, folder: Path, section: EngineSection, **sampling: Any) -> EngineSampler:
    """`folder`: for the weights. By default three responses of 12 tokens to a prompt."""
    spec = StageSpec.model_validate(
        {
            "name": "distil",
            "train": "student",
            "method": "opd",
            "data": {"path": "x"},
            "steps": 1,
            "sampling": {"max_completion_length": 12, "n": 3, **sampling},
        }
    )
    return engine_samplers(spec, section, lm, folder)[None]


def changed(lm: LanguageModel, seed: int) -> None:
    """Add noise to all trained weights."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in lm.trainable().values():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator).to(parameter))
