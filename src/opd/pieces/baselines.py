"""Baselines: what a sampled token's advantage is compared with, in closed form: Tokens -> [N]. Pure, detached, phase B.

A number b that depends on the prefix alone may be taken from every token's advantage: E_y[b grad log p(y)] = 0 over
y ~ p. What it does to the variance is the point. It holds only where y is drawn from p itself, all of it, at the
temperature at which it is compared, and where no weight looks at y: `opd check` refuses the rest
(`Trait.UNBIASED_BASELINE`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor

from opd.pieces.needs import Needs, Piece, Trait, needs_of
from opd.pieces.packed import support_of
from opd.types import Advantage, Tokens

Baseline: TypeAlias = Callable[[Tokens], Tensor]  # -> [N]


def expected_log_ratio(tokens: Tokens) -> Tensor:
    """E_{y~p} log q(y)/p(y) = -KL(p||q), [N]: the value of the prefix (arXiv 2605.07865).

    On a top-k support both distributions are renormalised on it; an empty one gives 0.
    """
    s, t = (part.detach() for part in support_of(tokens))
    if tokens.support_mask is not None:
        exists = tokens.support_mask
        s, t = (part.masked_fill(~exists, -torch.inf).log_softmax(-1).masked_fill(~exists, 0.0) for part in (s, t))
        return (s.exp() * (t - s)).masked_fill(~exists, 0.0).sum(-1)
    return (s.exp() * (t - s)).sum(-1)


def least_variance(tokens: Tokens) -> Tensor:
    """E_{y~p} ||e_y - p||^2 log q(y)/p(y) / E_{y~p} ||e_y - p||^2, [N]: what minimises the variance of the gradient
    with respect to the logits; the whole vocabulary is needed."""
    s, t = (part.detach() for part in support_of(tokens))
    assert tokens.support_mask is None, "a support of a few tokens does not give this expectation"
    p = s.exp()
    squares = 1.0 - 2.0 * p + p.square().sum(-1, keepdim=True)  # ||e_y - p||^2, [N, V]
    squares = p * squares.clamp(min=0.0)
    return (squares * (t - s)).sum(-1) / squares.sum(-1).clamp(min=torch.finfo(p.dtype).tiny)


def against(baseline: Baseline, advantage: Advantage) -> Advantage:
    """`advantage` less the baseline, [N]."""
    unbiased = Needs(traits=frozenset({Trait.UNBIASED_BASELINE}))
    return Piece(lambda tokens: advantage(tokens) - baseline(tokens).detach(), needs_of(advantage) | unbiased)
