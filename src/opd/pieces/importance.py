"""Importance weights p / mu of a policy gradient: capped, or cut to 0 outside two bounds."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal, TypeAlias

from opd.errors import ConfigError
from opd.pieces.memory import SavedAttributes
from opd.pieces.needs import Needs, Reads, Trait, needing, needs_of
from opd.pieces.packed import valid
from opd.pieces.signals import MeasuredPiece, policy_gradient
from opd.types import Advantage, Batch, Gather, MakeMemory, Tokens, Weight

if TYPE_CHECKING:
    from torch import Tensor


def within_bounds(advantage: Advantage, least: float, most: float) -> MeasuredPiece:
    """-sg[w A] log p(y), w = p(y) / mu(y) where least <= p / mu <= most, else 0: Tokens -> [N].

    arXiv 2601.02780 eq. 7-8.

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


Level: TypeAlias = Literal["token", "sequence"]


def truncated(level: Level, cap: float) -> Weight:
    """min(cap, p / mu), without gradient: [B, T]. Ionides 2008 (doi 10.1198/106186008X320456).

        token     w_t = min(cap, p(y_t) / mu(y_t))
        sequence  w_t = min(cap, prod_s p(y_s) / mu(y_s)), over all tokens of the response that the student wrote

    Without the cap, `sequence` makes the mean over responses of mu that over responses of p; `token` corrects the
    choice of each token and leaves the prefixes to mu, with less variance. The cap makes both biased towards 0. Raises
    ConfigError for a cap below 1, the weight on policy.
    """
    if not 1.0 <= cap < math.inf:
        raise ConfigError(f"`cap` bounds the importance weight p/mu, which is 1 on policy: give 1 or more, got {cap}.")

    def weight(batch: Batch) -> Tensor:
        return log_weights(batch, level).clamp(max=math.log(cap)).exp()

    return needing(weight, Reads.SAMPLER_LOGP, Reads.POLICY_LOGP)


def log_weights(batch: Batch, level: Level) -> Tensor:
    """log(p / mu) of the token or of its response, [B, T] float32; 0 at padding and at tokens of others."""
    log_ratio = (batch.policy_logp - batch.sampler_logp).nan_to_num(nan=0.0)
    return log_ratio if level == "token" else log_ratio.sum(1, keepdim=True).expand_as(log_ratio)


class Weighed(SavedAttributes):
    """Measures the weights of a step: importance/mean, importance/capped (the share at the cap) and importance/ess.

    The last is the effective sample size (sum w)^2 / sum w^2 as a share of the trained tokens.
    """

    def __init__(self, level: Level, cap: float) -> None:
        self.level: Level = level
        self.cap = cap

    def observe(self, batch: Batch, gather: Gather) -> Mapping[str, float]:
        """The metrics of a step's trained tokens, of all processes. Saves nothing."""
        own, most = valid(log_weights(batch, self.level), batch.mask).double(), math.log(self.cap)
        w = own.clamp(max=most).exp()
        sums = [len(own), w.sum().item(), (w * w).sum().item(), int((own > most).sum())]
        tokens, first, second, capped = map(sum, zip(*gather(sums), strict=True))
        if not second:
            return {}
        return {
            "importance/mean": first / tokens,
            "importance/capped": capped / tokens,
            "importance/ess": first * first / (tokens * second),
        }


def weighed(level: Level, cap: float) -> MakeMemory:
    """A maker of `Weighed`."""
    return needing(lambda: Weighed(level, cap), Reads.SAMPLER_LOGP, Reads.POLICY_LOGP)
