"""Distillation beyond the teacher: a signal of three models, and its measurements.

The target is pi = q^lambda b^(1 - lambda) / Z, with the teacher q and a fixed base b (`Tokens.base_logp`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeAlias

from opd.errors import ConfigError
from opd.pieces.memory import SavedAttributes
from opd.pieces.needs import Needs, Piece, Reads, Trait, needing
from opd.pieces.packed import valid
from opd.plugins import torch
from opd.types import Batch, Gather, MakeMemory, Signal, Tokens

if TYPE_CHECKING:
    from torch import Tensor

Clip: TypeAlias = Literal["teacher/student", "student/sampler", "none"]  # the ratio that weighs a token, up to a bound


@dataclass(frozen=True, slots=True, kw_only=True)
class ExtrapolationPiece(Piece[[Tokens], "Tensor"]):
    """A signal whose target is beyond the teacher, so that `opd doctor` can compare lambda with its limit."""

    strength: float
    clip: Clip
    bound: float
    allow_cliff: bool


def extrapolation_of(signal: Signal) -> ExtrapolationPiece | None:
    """The signal's extrapolation; None for any other signal."""
    return signal if isinstance(signal, ExtrapolationPiece) else None


def extrapolated(
    strength: float, *, clip: Clip = "teacher/student", bound: float = 5.0, allow_cliff: bool = False
) -> ExtrapolationPiece:
    """-sg[w A] log p(y), A = lambda log q - log p - (lambda - 1) log b = lambda log(q/b) - log(p/b), [N].

    Without a weight (`clip="none"`) the mean of its gradient over y ~ p is that of KL(p||pi): zero at p = pi, where A
    is log Z for every token. lambda = 1 is the log-ratio of plain distillation.

    teacher/student  w = min(c, q/p)     no gradient at p = pi only while Z = 1: w weighs the constant log Z unevenly
    student/sampler  w = min(c, p/mu)    1 on policy; the importance weight of truncated sampling

    `allow_cliff` is for `opd doctor`, which refuses a lambda beyond `maths.extrapolation.largest_strength`. Raises
    ConfigError for a lambda that is not positive and finite, and unless 1 < c < infinity.
    """
    if not 0.0 < strength < math.inf:
        raise ConfigError(
            f"lambda must be positive and finite, got {strength}: below 1 the target is between base and teacher, at 1 "
            "it is the teacher, above 1 beyond it."
        )
    if clip != "none" and not 1.0 < bound < math.inf:
        raise ConfigError(f"The bound of the ratio {clip} must be above 1 and finite, got {bound}.")

    def signal(tokens: Tokens) -> Tensor:
        assert tokens.base_logp is not None, "declared: Reads.BASE_LOGP"
        p = tokens.student_logp.detach()
        advantage = (tokens.teacher_logp - p) + (strength - 1.0) * (tokens.teacher_logp - tokens.base_logp)
        if clip != "none":
            log_ratio = tokens.teacher_logp - p if clip == "teacher/student" else p - tokens.sampler_logp
            advantage = advantage * log_ratio.clamp(max=math.log(bound)).exp()
        return -advantage.detach() * tokens.student_logp

    reads = {Reads.BASE_LOGP} | ({Reads.SAMPLER_LOGP} if clip == "student/sampler" else set[Reads]())
    needs = Needs(batch=frozenset(reads), traits=frozenset({Trait.POLICY_GRADIENT, Trait.MINIMISES_DIVERGENCE}))
    return ExtrapolationPiece(signal, needs, strength=strength, clip=clip, bound=bound, allow_cliff=allow_cliff)


class Measured(SavedAttributes):
    """extrapolation/teacher_over_base: mean log q - log b, in nats; extrapolation/clipped: the share of cut weights."""

    def __init__(self, clip: Clip, bound: float) -> None:
        self.clip, self.bound = clip, bound

    def observe(self, batch: Batch, gather: Gather) -> Mapping[str, float]:
        """The metrics of a step's trained tokens, of all processes. Saves nothing."""
        assert batch.base_logp is not None, "declared: Reads.BASE_LOGP"
        over_base = valid(batch.teacher_logp - batch.base_logp, batch.mask).double().sum().item()
        log_ratio = batch.teacher_logp - batch.policy_logp
        if self.clip == "student/sampler":
            log_ratio = batch.policy_logp - batch.sampler_logp
        cut = int((valid(log_ratio, batch.mask) > math.log(self.bound)).sum()) if self.clip != "none" else 0
        totals = torch.tensor(gather([over_base, cut, int(batch.mask.sum())]), dtype=torch.float64).sum(0)
        tokens = max(totals[2].item(), 1.0)
        return {
            "extrapolation/teacher_over_base": totals[0].item() / tokens,
            "extrapolation/clipped": totals[1].item() / tokens,
        }


def measured(clip: Clip, bound: float) -> MakeMemory:
    """A maker of `Measured`."""
    return needing(lambda: Measured(clip, bound), Reads.TEACHER_LOGP, Reads.POLICY_LOGP, Reads.BASE_LOGP)
