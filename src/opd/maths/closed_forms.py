"""Divergences on the whole vocabulary with their gradients in closed form.

Each function takes student and teacher log-probs [n, V] and gives the divergence [n], equal to that of
`opd.maths.divergences`, and its derivative with respect to the student's logits [n, V], equal to what autograd makes of
it. Autograd makes more passes over [n, V] (tests/unit/test_cost.py counts them). p student, q teacher, l = log p - log
q.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor

from opd.maths import divergences

WithGradient: TypeAlias = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def reverse_kl(student_logp: Tensor, teacher_logp: Tensor) -> tuple[Tensor, Tensor]:
    """KL(p||q) and p_j (l_j - KL), [n, V] -> [n], [n, V] (arXiv 2605.11182 eq. 3)."""
    p = student_logp.exp()
    part = (student_logp - teacher_logp).mul_(p)  # p l
    value = part.sum(-1)  # not a dot product: its float32 sum over V is a hundred times less exact
    return value, part.sub_(p.mul_(value[:, None]))


def forward_kl(student_logp: Tensor, teacher_logp: Tensor) -> tuple[Tensor, Tensor]:
    """KL(q||p) and p_j - q_j, [n, V] -> [n], [n, V]."""
    q = teacher_logp.exp()
    value = (teacher_logp - student_logp).mul_(q).sum(-1)
    return value, student_logp.exp().sub_(q)


def generalised_jsd(student_logp: Tensor, teacher_logp: Tensor, *, beta: float = 0.5) -> tuple[Tensor, Tensor]:
    """beta KL(q||m) + (1 - beta) KL(p||m) and (1 - beta) p_j (log(p_j / m_j) - KL(p||m)), m = beta q + (1 - beta) p.

    [n, V] -> [n], [n, V]. The derivative through m vanishes: beta q + (1 - beta) p = m there.
    """
    log_m = torch.logaddexp(teacher_logp + math.log(beta), student_logp + math.log1p(-beta))
    p = student_logp.exp()
    part = (student_logp - log_m).mul_(p)
    student_value, teacher_value = part.sum(-1), teacher_logp.exp().mul_(teacher_logp - log_m).sum(-1)
    value = beta * teacher_value + (1 - beta) * student_value
    return value, part.sub_(p.mul_(student_value[:, None])).mul_(1 - beta)


CLOSED: Mapping[Callable[..., Tensor], Callable[..., tuple[Tensor, Tensor]]] = {
    divergences.reverse_kl: reverse_kl,
    divergences.forward_kl: forward_kl,
    divergences.generalised_jsd: generalised_jsd,
}


def closed_form(divergence: Callable[..., Tensor] | None) -> WithGradient | None:
    """The closed form of a divergence, with its options bound; None if none is written.

    Raises ConfigError for options that the divergence refuses.
    """
    options: Mapping[str, Any] = {}
    if isinstance(divergence, partial) and not divergence.args:
        divergence, options = divergence.func, divergence.keywords
    known = next((closed for function, closed in CLOSED.items() if function is divergence), None)
    if known is None or divergence is None:
        return None
    divergence(torch.zeros(1), torch.zeros(1), **options)
    return partial(known, **options) if options else known
