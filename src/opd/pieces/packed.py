"""Packed values of a record: trained tokens without padding, and the scored support."""

from __future__ import annotations

from typing import TYPE_CHECKING

from opd.errors import ConfigError
from opd.plugins import torch
from opd.types import Tokens

if TYPE_CHECKING:
    from torch import Tensor


def valid(values: Tensor, mask: Tensor) -> Tensor:
    """`values[mask]`: padding never reaches arithmetic (through `where`, its NaN would reach gradients)."""
    assert mask.dtype is torch.bool
    assert values.shape[: mask.dim()] == mask.shape
    return values[mask]


def support_of(tokens: Tokens) -> tuple[Tensor, Tensor]:
    """Student and teacher log-probs on the support, [N, K] each. Raises ConfigError for a method without a support."""
    if tokens.student_support_logp is None or tokens.teacher_support_logp is None:
        raise ConfigError(
            "This signal compares distributions, but the method's support is `sampled` or none, with at most one token "
            "per position. Give the method support=top_k(k) or support=full()."
        )
    return tokens.student_support_logp, tokens.teacher_support_logp
