"""Weights: Batch -> weight [B, T] >= 0, in phase A."""

from __future__ import annotations

import torch
from torch import Tensor

from opd.types import Batch, Weight, needing, needs_of, reads


def every_token() -> Weight:
    """1 for every trained token."""
    return needing(lambda batch: torch.ones_like(batch.teacher_logp))


def times(*weights: Weight) -> Weight:
    """The product of several weights."""

    def weight(batch: Batch) -> Tensor:
        return torch.stack([one(batch) for one in weights]).prod(0)

    unsaid = {"teacher_logp"} if any(reads(one, "teacher_logp") for one in weights) else set[str]()
    return needing(weight, *needs_of(*weights), *unsaid)
