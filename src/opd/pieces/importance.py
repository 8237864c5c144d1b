"""A policy gradient whose importance weight is cut to 0 outside two bounds (arXiv 2601.02780 eq. 7-8)."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from opd.errors import ConfigError
from opd.pieces.needs import Needs, Reads, Trait, needs_of
from opd.pieces.signals import MeasuredPiece, policy_gradient
from opd.types import Advantage, Tokens

if TYPE_CHECKING:
    from torch import Tensor


def within_bounds(advantage: Advantage, least: float, most: float) -> MeasuredPiece:
    """-sg[w A] log p(y), w = p(y) / mu(y) where least <= p / mu <= most, else 0: Tokens -> [N].

    Unlike a clipped ratio, which keeps a gradient on one side, a token outside the bounds has none. On policy w = 1;
    truncated sampling makes w the mass that it kept. Logs importance/outside, the share of tokens with w = 0. Raises
    ConfigError unless 0 <= least <= 1 <= most < infinity.
    """
    if not 0.0 <= least <= 1.0 <= most < math.inf:
        raise ConfigError(
            f"The bounds of the importance ratio p/mu must include 1, its value on policy, with a least one of at "
            f"least 0; got {least} and {most}. Outside them a token has no gradient."
        )

    def outside(tokens: Tokens) -> Tensor:
        log_ratio = tokens.student_logp.detach() - tokens.sampler_logp
        low = log_ratio.new_tensor(least).log()  # -inf for 0
        return (log_ratio < low) | (log_ratio > math.log(most))

    def weighed(tokens: Tokens) -> Tensor:
        cut = outside(tokens)
        log_ratio = (tokens.student_logp.detach() - tokens.sampler_logp).masked_fill(cut, 0.0)
        return (log_ratio.exp() * advantage(tokens)).masked_fill(cut, 0.0)

    def measure(tokens: Tokens) -> dict[str, Tensor]:
        return {"importance/outside": outside(tokens).float()}

    needs = needs_of(advantage) | Needs(
        batch=frozenset({Reads.SAMPLER_LOGP}), traits=frozenset({Trait.POLICY_GRADIENT})
    )
    return MeasuredPiece(policy_gradient(weighed), needs, measure=measure)
