"""Weights of an agent's turns, from how far student and teacher are apart in each: SOD, arXiv 2605.07725.

A turn is a run of tokens that the student wrote, up to the environment's next answer (`Rollout.turn`, `trained`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Literal, TypeAlias

from opd.errors import ConfigError
from opd.pieces.credit import log_ratio
from opd.pieces.memory import SavedAttributes, recalled
from opd.pieces.needs import Piece, Reads, needing, needs_of
from opd.plugins import torch
from opd.types import Batch, Credit, Gather, MakeMemory

if TYPE_CHECKING:
    from torch import Tensor

Reference: TypeAlias = Literal["first", "batch"]
MUTED = 0.01  # a weight below it leaves a turn practically without distillation


def turn_of(batch: Batch) -> Tensor:
    """The number of each own token's turn, from 0 in each response; -1 at others' tokens. [B, T] int64."""
    own = torch.zeros_like(batch.mask)
    turn = torch.zeros_like(batch.response_ids)
    for row, rollout in enumerate(batch.rollouts):
        tokens = min(len(rollout.trained), own.shape[1])
        own[row, :tokens] = rollout.trained[:tokens].to(own.device)
        turn[row, :tokens] = rollout.turn[:tokens].to(turn.device)
    before = own.roll(1, 1) & (turn == turn.roll(1, 1))
    before[:, 0] = False
    return torch.where(own, (own & ~before).cumsum(1) - 1, -1)


def divergences(batch: Batch) -> Tensor:
    """d_k = mean over turn k of |log q - log p|, [B, K] in nats per token; NaN for a turn without a scored token.

    log p is the log-prob recorded during sampling. K is the largest number of turns of the batch, at least 1.
    """
    turn = turn_of(batch).masked_fill(~batch.mask, -1)
    number = int(turn.max()) + 1 if turn.numel() else 0
    size = log_ratio(batch).abs().masked_fill(turn < 0, 0.0)
    count = size.new_zeros(len(size), max(number, 1) + 1)  # the last column takes the tokens outside
    place = torch.where(turn < 0, count.shape[1] - 1, turn)
    total = torch.zeros_like(count).scatter_add_(1, place, size)
    count.scatter_add_(1, place, torch.ones_like(size))
    return (total / count)[:, :-1]


def weights(apart: Tensor, reference: Tensor, epsilon: float, bound: float) -> Tensor:
    """w_k = min((reference + epsilon) / (d_k + epsilon), 1 + bound), and 1 for the first scored turn: [B, K].

    `apart` are d [B, K], `reference` [B]. The paper's product of (d_u + epsilon) / (d_{u+1} + epsilon) over the turns
    before k telescopes to this with the first turn's d. NaN where d is.
    """
    ratio = (reference[:, None] + epsilon) / (apart + epsilon)
    return torch.where(_first(apart), torch.ones_like(ratio), ratio.clamp(max=1.0 + bound))


def _first(apart: Tensor) -> Tensor:
    """Which turn is the first with a scored token, [B, K] bool."""
    known = ~apart.isnan()
    return known & (known.cumsum(1) == 1)


def first_divergences(apart: Tensor) -> Tensor:
    """d of each response's first scored turn, [B]; NaN for a response without one."""
    first = _first(apart)
    return torch.where(first.any(1), apart.nan_to_num().masked_fill(~first, 0.0).sum(1), torch.nan)


def _known(values: Tensor) -> list[float]:
    return [float(value) for value in values[~values.isnan()]]


def _mean(values: Sequence[float]) -> float:
    """0 of none: then no token is trained, and no weight read."""
    return math.fsum(values) / len(values) if values else 0.0


class TurnWeights(SavedAttributes):
    """Measures the turns of a step of all processes; with reference `batch` the mean of d_1 over its responses.

    sod/first_divergence is that mean, in nats per token. Over turns after the first: sod/divergence, sod/weight,
    sod/at_bound (the share with w = 1 + bound) and sod/muted (the share with w < 0.01: where both models agree on the
    first turn, all later ones are practically not distilled). sod/turns is the mean number of a response's own turns.
    """

    def __init__(self, reference: Reference, epsilon: float, bound: float) -> None:
        self.reference: Reference = reference
        self.epsilon, self.bound = epsilon, bound
        self.mean: float | None = None  # of d_1 in the last observed step; None: that of the batch itself

    def of(self, apart: Tensor) -> Tensor:
        """w [B, K] of a batch's d."""
        reference = first_divergences(apart)
        if self.reference == "batch":
            reference = torch.full_like(reference, _mean(_known(reference)) if self.mean is None else self.mean)
        return weights(apart, reference, self.epsilon, self.bound)

    def observe(self, batch: Batch, gather: Gather) -> Mapping[str, float]:
        """The metrics of a step; saves nothing."""
        apart = divergences(batch)
        first = first_divergences(apart)
        firsts = [value for part in gather(_known(first)) for value in part]
        self.mean = _mean(firsts)
        if not firsts:
            return {}
        later = ~apart.isnan() & ~_first(apart)
        w, d = self.of(apart)[later].double(), apart[later].double()
        sums = [len(w), w.sum().item(), d.sum().item(), int((w >= 1.0 + self.bound).sum()), int((w < MUTED).sum())]
        number, weight, divergence, bounded, muted = map(sum, zip(*gather(sums), strict=True))
        metrics = {"sod/first_divergence": self.mean, "sod/turns": (number + len(firsts)) / len(firsts)}
        if number:
            metrics["sod/divergence"] = divergence / number
            metrics["sod/weight"] = weight / number
            metrics["sod/at_bound"] = bounded / number
            metrics["sod/muted"] = muted / number
        return metrics


def weighing(reference: Reference = "first", epsilon: float = 1e-6, bound: float = 0.2) -> MakeMemory:
    """A maker of `TurnWeights`. Raises ConfigError for an epsilon that is not positive, or a bound below 0."""
    if not (0.0 < epsilon < math.inf and 0.0 <= bound < math.inf):
        raise ConfigError(
            f"The weights of turns need an epsilon above 0 and a bound of at least 0, both finite; got {epsilon} and "
            f"{bound}. The bound limits a weight to 1 + bound; the paper's are 1e-6 and 0.2."
        )
    return needing(lambda: TurnWeights(reference, epsilon, bound), Reads.TEACHER_LOGP, Reads.POLICY_LOGP)


def weighed(credit: Credit, name: str = "turns") -> Credit:
    """`credit` times the weight of its token's turn, from the memory `name`, a `TurnWeights`; 0 outside all turns."""

    def made(batch: Batch) -> Tensor:
        w = recalled(batch.memory, name, TurnWeights).of(divergences(batch)).nan_to_num()
        turn = turn_of(batch)
        factor = w.gather(1, turn.clamp(min=0)).masked_fill(turn < 0, 0.0)
        return factor * credit(batch)

    return Piece(made, needs_of(credit))
