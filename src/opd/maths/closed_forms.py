"""Divergences on the whole vocabulary with their gradients in closed form.

Each function takes the logits of student and teacher [n, V], the largest of each row 0, and the weight of each row. It
works in the memory of both: on a CPU the passes over a tile are what a loss costs beside the products. Values equal
those of `opd.maths.divergences`, derivatives those of autograd, which makes more passes over [n, V]
(tests/loss/test_cost.py counts them). p student, q teacher, l = log p - log q.

The exponentials are divided by their own sum, so p and q sum to 1 as well as float32 can, and a row of the gradient
sums to 0. `log_softmax` on a CPU keeps one float32 sum of exp per vector lane (8 with AVX2, 16 with AVX-512), and these
sums lose small terms: over 150,000 tokens its p sums to 1 + 1e-5.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, TypeAlias

from opd.maths import divergences
from opd.plugins import torch

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Closed:
    """A divergence and both normalisers, [n] each. Its gradient is where the student's logits were."""

    value: Tensor
    student_log_z: Tensor
    teacher_log_z: Tensor


# (student's logits [n, V], teacher's logits [n, V], weight [n]) -> Closed. The student's logits become the gradient of
# sum_i weight_i value_i in them; the teacher's are lost. The largest logit of a row is 0: no exponential overflows, and
# differences of logits of ten thousand in size keep their digits.
ClosedForm: TypeAlias = Callable[["Tensor", "Tensor", "Tensor"], Closed]


def reverse_kl(student: Tensor, teacher: Tensor, weight: Tensor) -> Closed:
    """KL(p||q) and p_j (l_j - KL), [n, V] -> [n], [n, V] (arXiv 2605.11182 eq. 3)."""
    pair = _Pair.of(student, teacher)
    value = torch.mul(pair.log_ratio, student, out=teacher).sum(-1, keepdim=True).div_(pair.student_sum)
    pair.log_ratio.sub_(value).mul_(student)
    torch.mul(pair.log_ratio, weight[:, None] / pair.student_sum, out=student)
    return pair.closed(value)


def forward_kl(student: Tensor, teacher: Tensor, weight: Tensor) -> Closed:
    """KL(q||p) and p_j - q_j, [n, V] -> [n], [n, V]."""
    pair = _Pair.of(student, teacher)
    value = pair.log_ratio.mul_(teacher).sum(-1, keepdim=True).div_(pair.teacher_sum).neg_()
    student.mul_(weight[:, None] / pair.student_sum)
    student.sub_(teacher.mul_(weight[:, None] / pair.teacher_sum))
    return pair.closed(value)


def generalised_jsd(student: Tensor, teacher: Tensor, weight: Tensor, *, beta: float = 0.5) -> Closed:
    """beta KL(q||m) + (1 - beta) KL(p||m) and (1 - beta) p_j (log(p_j / m_j) - KL(p||m)), m = beta q + (1 - beta) p.

    [n, V] -> [n], [n, V]. The derivative through m vanishes because m = beta q + (1 - beta) p.
    """
    pair = _Pair.of(student, teacher)
    own, rest = pair.log_ratio.new_tensor([math.log1p(-beta), math.log(beta)])
    # log(p / m) = -log(1 - beta + beta q / p), log(q / m) = -log(beta + (1 - beta) p / q)
    student_side = torch.logaddexp(own, rest - pair.log_ratio).neg_()
    teacher_side = torch.logaddexp(rest, pair.log_ratio.add_(own)).neg_()
    teacher_value = teacher_side.mul_(teacher).sum(-1, keepdim=True).div_(pair.teacher_sum)
    student_value = torch.mul(student_side, student, out=teacher).sum(-1, keepdim=True).div_(pair.student_sum)
    student_side.sub_(student_value).mul_(student)
    torch.mul(student_side, (1 - beta) * weight[:, None] / pair.student_sum, out=student)
    return pair.closed(beta * teacher_value + (1 - beta) * student_value)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Pair:
    """Logits become exponentials, p = student / student_sum."""

    log_ratio: Tensor  # [n, V] l
    student_sum: Tensor  # [n, 1]
    teacher_sum: Tensor  # [n, 1]
    student_log_z: Tensor  # [n, 1]
    teacher_log_z: Tensor  # [n, 1]

    @classmethod
    def of(cls, student: Tensor, teacher: Tensor) -> _Pair:
        log_ratio = student - teacher
        student_sum, teacher_sum = student.exp_().sum(-1, keepdim=True), teacher.exp_().sum(-1, keepdim=True)
        student_log_z, teacher_log_z = student_sum.log(), teacher_sum.log()
        return cls(
            log_ratio=log_ratio.sub_(student_log_z - teacher_log_z),
            student_sum=student_sum,
            teacher_sum=teacher_sum,
            student_log_z=student_log_z,
            teacher_log_z=teacher_log_z,
        )

    def closed(self, value: Tensor) -> Closed:
        """The result with `value` [n, 1]."""
        return Closed(value=value[:, 0], student_log_z=self.student_log_z[:, 0], teacher_log_z=self.teacher_log_z[:, 0])


CLOSED: Mapping[Callable[..., Tensor], Callable[..., Closed]] = {
    divergences.reverse_kl: reverse_kl,
    divergences.forward_kl: forward_kl,
    divergences.generalised_jsd: generalised_jsd,
}


def closed_form(divergence: Callable[..., Tensor] | None) -> ClosedForm | None:
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
