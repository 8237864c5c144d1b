"""How much the top k tokens of two models overlap at each position. Pure functions of ids and log-probs.

S_p and S_q are the k most likely tokens of student and teacher at a position (arXiv 2604.13016; k = 16 there,
20 in arXiv 2605.11182). Natural logs; log-probs are full-vocabulary ones.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from opd.maths import divergences
from opd.plugins import torch
from opd.types import Support

if TYPE_CHECKING:
    from torch import Tensor


def shared(student_top: Tensor, teacher_top: Tensor) -> Tensor:
    """Which of the student's top tokens are also the teacher's: ids [..., k] and [..., k'] -> [..., k] bool."""
    return (student_top[..., :, None] == teacher_top[..., None, :]).any(-1)


def overlap_ratio(in_both: Tensor) -> Tensor:
    """|S_p and S_q| / k, [..., k] bool of `shared` -> [...] (arXiv 2604.13016 eq. 6)."""
    return in_both.float().mean(-1)


def overlap_mass(logp: Tensor, in_both: Tensor) -> Tensor:
    """Probability on the shared tokens: log-probs of S_p and `shared`, [..., k] -> [...].

    arXiv 2604.13016 eq. 9 for the student and 10 for the teacher.
    """
    return logp.exp().masked_fill(~in_both, 0.0).sum(-1)


def overlap_advantage(student_logp: Tensor, teacher_logp: Tensor, in_both: Tensor) -> Tensor:
    """(1 / |S|) sum_S bar-p (log bar-q - log bar-p) on the shared tokens S, [..., k] -> [...] (arXiv 2604.13016 eq. 7).

    bar-p and bar-q are renormalised on S, so the value is -KL(bar-p || bar-q) / |S|: never above 0, and 0 where both
    models agree on S, whatever mass they have outside. Read it together with `overlap_mass`. A position without shared
    tokens gives 0: leave it out of a mean.
    """
    divergence = divergences.on_support("reverse_kl", student_logp, teacher_logp, "renormalised", in_both)
    return -divergence / in_both.sum(-1).clamp(min=1)


def entropy(logp: Tensor) -> Tensor:
    """-sum p log p over the last axis in nats, [..., V] -> [...]."""
    return torch.special.entr(logp.exp()).sum(-1)


def rank(ids: Tensor, top: Tensor) -> Tensor:
    """Rank of the tokens `ids` [...] in `top` [..., k], most likely first: 1 to k, or k + 1 if absent.

    `teacher_rank` of the released code of arXiv 2605.11182.
    """
    here = top == ids[..., None]
    return torch.where(here.any(-1), here.int().argmax(-1) + 1, top.shape[-1] + 1)


def overlap_of_support(support: Support, exists: Tensor) -> Tensor | None:
    """|S_p and S_q| / k from the mask [..., K] of a scored support, [...]; None if it is not built from both top k.

    Columns are ordered as in `supports.support_tokens`.
    """
    if support.kind != "top_k" or support.by in ("teacher", "student"):
        return None
    k = support.k
    if support.by == "intersection":
        return overlap_ratio(exists[..., :k])  # the student's top k that are also the teacher's
    if support.by == "union":
        return overlap_ratio(~exists[..., k : 2 * k])  # the teacher's top k that are also the student's
    return overlap_ratio(~exists[..., :k])  # here the existing entries are the student's only
