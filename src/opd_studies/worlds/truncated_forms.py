"""Truncated reverse KL in every form that the papers compare, from the library's own code, and exact identities.

Forms are those of `opd.maths.divergences`, and `released_code` from arXiv 2604.13016. Gradients are with respect to the
student's logits at one position.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from opd.maths import divergences
from opd.pieces import signals
from opd.types import Tokens

FORMS = ("raw", "stop_gradient", "renormalised", "tail", "released_code")


def on_support(form: str, student_logp: Tensor, teacher_logp: Tensor, mask: Tensor) -> Tensor:
    """Reverse KL in one of FORMS, from the library's own code, [..., K] -> [...]."""
    if form != "released_code":
        return divergences.on_support("reverse_kl", student_logp, teacher_logp, form, mask)
    nothing = torch.zeros_like(student_logp[..., 0])
    return signals.support_policy_gradient()(
        Tokens(
            student_logp=nothing,
            sampler_logp=nothing,
            teacher_logp=nothing,
            advantage=nothing,
            weight=nothing,
            student_support_logp=student_logp,
            teacher_support_logp=teacher_logp,
            support_mask=mask,
        )
    )


def identity_errors(seed: int, vocabulary: int = 50, k: int = 8) -> dict[str, float]:
    """The largest error over tokens of each identity, for random p and q and the student's k most likely tokens."""
    generator = torch.Generator().manual_seed(seed)
    z = (2 * torch.randn(vocabulary, generator=generator, dtype=torch.float64)).requires_grad_()
    t = (2 * torch.randn(vocabulary, generator=generator, dtype=torch.float64)).log_softmax(-1)
    p, q = z.detach().softmax(-1), t.exp()
    inside = torch.zeros(vocabulary, dtype=torch.bool).index_fill(0, p.topk(k).indices, True)
    everything = torch.ones_like(inside)

    def gradient(form: str, mask: Tensor) -> Tensor:
        (grad,) = torch.autograd.grad(on_support(form, z.log_softmax(-1), t, mask), z)
        return grad

    raw, stopped, renormalised, released = (
        gradient(form, inside) for form in ("raw", "stop_gradient", "renormalised", "released_code")
    )
    p_s, q_s = float(p[inside].sum()), float(q[inside].sum())
    grad_mass = p * (inside.double() - p_s)
    value = float(on_support("renormalised", z.detach().log_softmax(-1), t, inside))
    full = p * (p.log() - t - (p * (p.log() - t)).sum())
    one_token = means_of_sampled(z, t)
    return {
        "raw - stop-gradient = grad P_S": _largest(raw - stopped - grad_mass),
        "released code = stop-gradient / P_S": _largest(released - stopped / p_s),
        "released code - renormalised = (log P_S/Q_S + value) grad log P_S": _largest(
            released - renormalised - (math.log(p_s / q_s) + value) * grad_mass / p_s
        ),
        "renormalised = 0 outside S": _largest(renormalised[~inside]),
        "S = V: every form = exact": max(_largest(gradient(form, everything) - full) for form in FORMS),
        "mean of the sampled policy gradient = exact": _largest(one_token[0] - full),
        "mean of the differentiated log-ratio = 0": _largest(one_token[1]),
    }


def means_of_sampled(z: Tensor, teacher_logp: Tensor) -> tuple[Tensor, Tensor]:
    """Means over y ~ p, by enumeration, of the gradients of policy gradient and log p(y) - log q(y): [V] each."""
    logp = z.log_softmax(-1)
    nothing = torch.zeros_like(teacher_logp)
    tokens = Tokens(
        student_logp=logp,
        sampler_logp=logp.detach(),
        teacher_logp=teacher_logp,
        advantage=nothing,
        weight=nothing,
    )
    policy_gradient = signals.policy_gradient(signals.log_ratio)
    chance = logp.detach().exp()
    (right,) = torch.autograd.grad((chance * policy_gradient(tokens)).sum(), z, retain_graph=True)
    (wrong,) = torch.autograd.grad((chance * (logp - teacher_logp)).sum(), z)
    return right, wrong


def _largest(values: Tensor) -> float:
    return float(values.abs().max())
