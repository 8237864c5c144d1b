"""Variance and mean of the sampled token's gradient over y ~ p, exact by enumeration, with and without a baseline."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from opd.pieces import baselines, signals
from opd.types import Tokens

VOCABULARY = 200  # of the tables


TOP = 20


REGIMES = ("mild gap", "large gap", "peaked student", "confident and wrong")


BASELINES = ("none", "value", "top-20", "optimal")


def table_of(regime: str, seed: int, pairs: int) -> tuple[Tensor, Tensor]:
    """Log-probs [pairs, V] of student and teacher, float64."""
    generator = torch.Generator().manual_seed(seed)

    def noise() -> Tensor:
        return torch.randn(pairs, VOCABULARY, generator=generator, dtype=torch.float64)

    if regime == "confident and wrong":
        first = torch.zeros(pairs, VOCABULARY, dtype=torch.float64)
        first[:, 0] = 1.0
        rest = (0.1 * noise()).masked_fill(first.bool(), -math.inf).softmax(-1)
        return (0.99 * first + 0.01 * rest).log(), (0.007 * first + 0.993 * rest).log()
    scale, gap = {"mild gap": (2.0, 0.5), "large gap": (2.0, 3.0), "peaked student": (6.0, 1.0)}[regime]
    student = scale * noise()
    return student.log_softmax(-1), (student + gap * noise()).log_softmax(-1)


def moments(student: Tensor, teacher: Tensor, names: Sequence[str]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Variance over y ~ p of the logits' gradient, and its mean's relative distance from the exact one.

    From log-probs [N, V]; results [N] by baseline.
    """
    p = student.exp()
    log_ratio = teacher - student
    exact = p * (-log_ratio - (p * -log_ratio).sum(-1, keepdim=True))  # p (l - KL)
    squares = 1.0 - 2.0 * p + p.square().sum(-1, keepdim=True)  # ||e_y - p||^2
    variance: dict[str, Tensor] = {}
    bias: dict[str, Tensor] = {}
    for name in names:
        advantage = log_ratio - baseline_of(name, student, teacher)[:, None]
        mean = -(p * advantage - p * (p * advantage).sum(-1, keepdim=True))  # E_y[-A (e_y - p)]
        variance[name] = (p * advantage.square() * squares).sum(-1) - mean.square().sum(-1)
        bias[name] = (mean - exact).norm(dim=-1) / exact.norm(dim=-1)
    return variance, bias


def baseline_of(name: str, student: Tensor, teacher: Tensor) -> Tensor:
    """The baseline [N] of that name, from the library's code."""
    if name == "none":
        return torch.zeros_like(student[:, 0])
    ids = student.topk(TOP, dim=-1).indices if name == "top-20" else None
    tokens = _on(student, teacher, ids)
    return baselines.least_variance(tokens) if name == "optimal" else baselines.expected_log_ratio(tokens)


def loss_bias(student: Tensor, teacher: Tensor) -> Tensor:
    """Relative distance [N] of the renormalised top-20 loss' gradient from the exact one."""
    z = student.clone().requires_grad_()
    p = z.log_softmax(-1)
    ids = student.topk(TOP, dim=-1).indices
    tokens = _on(p, teacher, ids)
    (grad,) = torch.autograd.grad(signals.divergence("reverse_kl", form="renormalised")(tokens).sum(), z)
    q = student.exp()
    ratio = student - teacher
    exact = q * (ratio - (q * ratio).sum(-1, keepdim=True))
    return (grad - exact).norm(dim=-1) / exact.norm(dim=-1)


def _on(student: Tensor, teacher: Tensor, ids: Tensor | None) -> Tokens:
    """Log-probs [N, V] on the support `ids` [N, K], or on all tokens, as the input of a signal."""
    nothing = torch.zeros_like(student[:, 0]).detach()
    return Tokens(
        student_logp=nothing,
        sampler_logp=nothing,
        teacher_logp=nothing,
        advantage=nothing,
        weight=nothing,
        student_support_logp=student if ids is None else student.gather(-1, ids),
        teacher_support_logp=teacher if ids is None else teacher.gather(-1, ids),
        support_mask=None if ids is None else torch.ones_like(ids, dtype=torch.bool),
    )
