"""Divergences on the whole vocabulary with their gradients in closed form.

Each function takes student and teacher log-probs [n, V] and returns the divergence [n] and its derivative with respect
to the student's logits [n, V]. Values equal those of `opd.maths.divergences`, derivatives those of autograd, which
makes more passes over [n, V] (tests/loss/test_cost.py counts them). p student, q teacher, l = log p - log q.

In float32 p does not sum to 1. `log_softmax` on a CPU keeps one float32 sum of exp per vector lane (8 with AVX2, 16
with AVX-512), and these sums lose small terms: over 150,000 tokens p sums to 1 + 1e-5, always more than 1. Then
h_j - p_j sum_v h_v sums to -1e-5 sum_v h_v. This error is a visible part of the gradient where the divergence is larger
than its gradient (p and q far apart, such as the generalised JSD near log 2). `_centred` divides by the sum of p.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, TypeAlias

from opd.deferred import torch
from opd.maths import divergences

if TYPE_CHECKING:
    from torch import Tensor

WithGradient: TypeAlias = Callable[["Tensor", "Tensor"], tuple["Tensor", "Tensor"]]


def reverse_kl(student_logp: Tensor, teacher_logp: Tensor) -> tuple[Tensor, Tensor]:
    """KL(p||q) and p_j (l_j - KL), [n, V] -> [n], [n, V] (arXiv 2605.11182 eq. 3)."""
    p = student_logp.exp()
    part = (student_logp - teacher_logp).mul_(p)  # p l
    value = part.sum(-1)  # not a dot product: its float32 sum over V is a hundred times less exact
    return value, _centred(part, p, value)


def forward_kl(student_logp: Tensor, teacher_logp: Tensor) -> tuple[Tensor, Tensor]:
    """KL(q||p) and p_j - q_j, [n, V] -> [n], [n, V]. No term with the divergence, so no centring."""
    q = teacher_logp.exp()
    value = (teacher_logp - student_logp).mul_(q).sum(-1)
    return value, student_logp.exp().sub_(q)


def generalised_jsd(student_logp: Tensor, teacher_logp: Tensor, *, beta: float = 0.5) -> tuple[Tensor, Tensor]:
    """beta KL(q||m) + (1 - beta) KL(p||m) and (1 - beta) p_j (log(p_j / m_j) - KL(p||m)), m = beta q + (1 - beta) p.

    [n, V] -> [n], [n, V]. The derivative through m vanishes because m = beta q + (1 - beta) p.
    """
    log_m = torch.logaddexp(teacher_logp + math.log(beta), student_logp + math.log1p(-beta))
    p = student_logp.exp()
    part = (student_logp - log_m).mul_(p)
    student_value, teacher_value = part.sum(-1), teacher_logp.exp().mul_(teacher_logp - log_m).sum(-1)
    value = beta * teacher_value + (1 - beta) * student_value
    return value, _centred(part, p, student_value).mul_(1 - beta)


def _centred(h: Tensor, p: Tensor, total: Tensor) -> Tensor:
    """h_j - p_j total / sum_v p_v, [n, V], with total [n] = sum_v h_v, so that each row sums to 0.

    The result overwrites h; p is overwritten too.
    """
    return h.sub_(p.mul_((total / p.sum(-1))[:, None]))


CLOSED: Mapping[Callable[..., Tensor], Callable[..., tuple[Tensor, Tensor]]] = {
    divergences.reverse_kl: reverse_kl,
    divergences.forward_kl: forward_kl,
    divergences.generalised_jsd: generalised_jsd,
}


def closed_form(divergence: Callable[..., Tensor] | None) -> WithGradient | None:
    """The closed form of a divergence, with its options bound; None if it has no closed form.

    Raises ConfigError for invalid options.
    """
    options: Mapping[str, Any] = {}
    if isinstance(divergence, partial) and not divergence.args:
        divergence, options = divergence.func, divergence.keywords
    known = next((closed for function, closed in CLOSED.items() if function is divergence), None)
    if known is None or divergence is None:
        return None
    divergence(torch.zeros(1), torch.zeros(1), **options)
    return partial(known, **options) if options else known
