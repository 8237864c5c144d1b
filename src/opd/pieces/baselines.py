"""Baselines of a sampled token's advantage, in closed form: Tokens -> [N]. Pure, detached, phase B.

A number b that depends only on the prefix may be subtracted from the advantage, to reduce its variance:
E_y[b grad log p(y)] = 0 over y ~ p. This requires that y is drawn from the whole distribution p, at the temperature at
which it is scored, and that no weight depends on y. `opd check` refuses other cases (`Trait.UNBIASED_BASELINE`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, TypeAlias

from opd.pieces.needs import Needs, Piece, Trait, needs_of
from opd.pieces.packed import support_of
from opd.plugins import torch
from opd.types import Advantage, Tokens

if TYPE_CHECKING:
    from torch import Tensor

Baseline: TypeAlias = Callable[[Tokens], "Tensor"]  # -> [N]


def expected_log_ratio(tokens: Tokens) -> Tensor:
    """E_{y~p} log q(y)/p(y) = -KL(p||q), [N]: the value of the prefix (arXiv 2605.07865).

    Both distributions are renormalised on a top-k support; an empty support gives 0.
    """
    s, t = (part.detach() for part in support_of(tokens))
    if tokens.support_mask is not None:
        exists = tokens.support_mask
        s, t = (part.masked_fill(~exists, -torch.inf).log_softmax(-1).masked_fill(~exists, 0.0) for part in (s, t))
        return (s.exp() * (t - s)).masked_fill(~exists, 0.0).sum(-1)
    return (s.exp() * (t - s)).sum(-1)


def least_variance(tokens: Tokens) -> Tensor:
    """E_{y~p} ||e_y - p||^2 log q(y)/p(y) / E_{y~p} ||e_y - p||^2, [N].

    The baseline of least variance of the gradient with respect to the logits. Needs the whole vocabulary.
    """
    s, t = (part.detach() for part in support_of(tokens))
    assert tokens.support_mask is None, "this expectation needs the whole vocabulary"
    p = s.exp()
    squares = 1.0 - 2.0 * p + p.square().sum(-1, keepdim=True)  # ||e_y - p||^2, [N, V]
    squares = p * squares.clamp(min=0.0)
    return (squares * (t - s)).sum(-1) / squares.sum(-1).clamp(min=torch.finfo(p.dtype).tiny)


def against(baseline: Baseline, advantage: Advantage) -> Advantage:
    """`advantage` minus the baseline, [N]."""

    def less(tokens: Tokens) -> Tensor:
        return advantage(tokens) - baseline(tokens).detach()

    return Piece(less, needs_of(advantage) | Needs(traits=frozenset({Trait.UNBIASED_BASELINE})))
