"""Gradients in the student's logits at one node, a prompt with the first tokens of a response: arXiv 2605.10889.

    j      one of the tokens S that are compared at the node
    P_j    the student's probability of j; q_j the teacher's; both renormalised on S
    Q_j    the mean reward of responses that go on with j and that the student then writes to their end
    g*_j = P_j (Q_j - E_P Q)    ideal: reach times g* is the gradient of the expected reward
    g_j  = P_j (f_j - E_P f)    a teacher's: f = log(q / P) gives minus the gradient of KL(P || q), and f = q / P gives
                                q - P, minus the gradient of KL(q || P)

reach is the probability that the student's response passes the node. All are directions of ascent. The alignment of a
teacher is the cosine of g* and g. On a truncated S both are the gradients of the choice among S alone.

A measured Q is noise around the true one, so the measured alignment is too small. Two estimates of Q from independent
halves of the continuations say by how much: `ceiling`, `same_direction`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from opd.plugins import np

TINY = 1e-12  # a gradient below this length has no direction; equal Q, or equal models, give one of about 1e-17


def node_gradient(probs: Tensor, value: Tensor) -> Tensor:
    """P_j (f_j - E_P f), [..., S] -> [..., S]; sums to 0. `value` is f: Q for the ideal gradient."""
    return probs * (value - (probs * value).sum(-1, keepdim=True))


def teacher_values(student_logp: Tensor, teacher_logp: Tensor) -> dict[str, Tensor]:
    """f by the divergence that is descended, [..., S] -> [..., S] each; log-probs of the whole vocabulary or of S.

    "reverse_kl": log(q / P), "forward_kl": q / P, both after renormalisation on S.
    """
    gap = teacher_logp.log_softmax(-1) - student_logp.log_softmax(-1)
    return {"reverse_kl": gap, "forward_kl": gap.exp()}


def cosine(first: Tensor, second: Tensor) -> float | None:
    """The cosine of two vectors [S]; None if one of them has no direction."""
    lengths = first.norm() * second.norm()
    if min(float(first.norm()), float(second.norm())) < TINY:
        return None
    return float((first @ second / lengths).clamp(-1.0, 1.0))


def ceiling(between_halves: float) -> float:
    """The alignment that the true ideal gradient would have with the measured one, from the cosine between its halves.

    sqrt(2 r / (1 + r)): the formula of Spearman (1910) and Brown (1910) for the reliability of both halves together,
    and its root for the correlation with the truth. Exact for vectors of independent entries; 0 if r is not positive.
    """
    return math.sqrt(2 * between_halves / (1 + between_halves)) if between_halves > 0 else 0.0


def same_direction(sums: Mapping[str, float]) -> float | None:
    """The cosine of ideal and teacher's gradient of many nodes as one vector, without the noise of the ideal's length.

    `sums` over nodes, weighted: "product" of the measured ideal and the teacher's gradient, "teacher" of the latter's
    square, "halves" of the products of the two halves of the ideal. "product" and "halves" are unbiased for the true
    sums, whatever the number of continuations. None if "halves" is not positive: there are too few of them.
    """
    if sums["halves"] <= 0 or sums["teacher"] <= 0:
        return None
    return sums["product"] / math.sqrt(sums["halves"] * sums["teacher"])


def symmetric_noise(shape: tuple[int, ...], seed: tuple[int, ...]) -> Tensor:
    """Standard normal float64 numbers, a function of the seed: values f of a teacher that knows nothing.

    f and -f are equally likely, so the alignment has mean 0 at every node, whatever P and Q.
    """
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape))
