"""Divergences between student p and teacher q, pure and unreduced: (student_logp, teacher_logp) [..., K] -> [...].

Every divergence is a sum over the last axis of a pointwise contribution c(p, q), so a new one is a function of two
log-prob tensors and works with all forms below. `forward_kl = KL(q||p)`, `reverse_kl = KL(p||q)`. Computed in float32
(float64 stays float64), never in place; log-probs must be finite.

A truncated support S holds only part of the mass (P_S of the student, Q_S of the teacher). The *form* decides how the
rest counts. Each form has a name, an exact identity and a bias (z: student logits, l = log p - log q):

    raw            sum_S c(p, q), gradient through everything. For reverse KL the gradient is that of `stop_gradient`
                   plus grad P_S, which pushes mass out of S; the minimum is p = q/e on S (arXiv 2605.11182 eq. 6-9).
    stop_gradient  the value of raw, without that push: the gradient is that of the generalised divergence
                   sum_S c(p, q) - c'(q, q) (p - q), which is zero exactly at p = q on S. For reverse KL this is
                   sum_S p (sg[log p] - log q) (arXiv 2605.11182 eq. 12-13): p_j (l_j 1[j in S] - sum_S p l).
    renormalised   the divergence of p / P_S and q / Q_S (arXiv 2605.11182 eq. 14-16, 2603.25562 eq. 6-8). Zero gradient
                   outside S: the shape inside S is learned, the mass P_S is not controlled.
    tail           adds one entry for the remaining masses: the exact divergence of a coarser vocabulary, never
                   negative, and a lower bound of the full one. Shape and mass of S are learned. The rest 1 - P_S comes
                   from float32 log-probs: below about 1e-6, rounding removes forward KL's gradient on it.

With S = V all four have the value and the gradient of the full divergence.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, TypeAlias

from opd.errors import ConfigError, nearest
from opd.plugins import torch

if TYPE_CHECKING:
    from torch import Tensor

Divergence: TypeAlias = Callable[["Tensor", "Tensor"], "Tensor"]


def reverse_kl(student_logp: Tensor, teacher_logp: Tensor) -> Tensor:
    """KL(p||q) = sum p (log p - log q), [..., K] -> [...]. Mode-seeking; with K = V, d/dz_j = p_j (l_j - KL)."""
    s, t = _at_least_float32(student_logp, teacher_logp)
    return (s.exp() * (s - t)).sum(-1)


def forward_kl(student_logp: Tensor, teacher_logp: Tensor) -> Tensor:
    """KL(q||p) = sum q (log q - log p), [..., K] -> [...]. Mass-covering; with K = V, d/dz_j = p_j - q_j."""
    s, t = _at_least_float32(student_logp, teacher_logp)
    return (t.exp() * (t - s)).sum(-1)


def check_beta(beta: float) -> None:
    """Raise ConfigError unless 0 < beta < 1."""
    _open_unit_interval("beta", beta, "use forward_kl for the limit at 0 and reverse_kl for the limit at 1")


def generalised_jsd(student_logp: Tensor, teacher_logp: Tensor, *, beta: float = 0.5) -> Tensor:
    """beta KL(q||m) + (1 - beta) KL(p||m) with m = beta q + (1 - beta) p, [..., K] -> [...] (GKD, arXiv 2306.13649).

    Its limits, divided by beta or 1 - beta, are forward KL (beta -> 0) and reverse KL (beta -> 1). Raises ConfigError
    unless 0 < beta < 1.
    """
    check_beta(beta)
    s, t = _at_least_float32(student_logp, teacher_logp)
    m = torch.logaddexp(t + math.log(beta), s + math.log1p(-beta))
    return (beta * t.exp() * (t - m) + (1 - beta) * s.exp() * (s - m)).sum(-1)


def skew_kl(student_logp: Tensor, teacher_logp: Tensor, *, alpha: float = 0.1, direction: str = "forward") -> Tensor:
    """Skewed KL, [..., K] -> [...] (DistiLLM, arXiv 2402.03898).

    forward: KL(q || alpha q + (1 - alpha) p); reverse: KL(p || alpha p + (1 - alpha) q). Raises ConfigError unless
    0 < alpha < 1 or for another direction.
    """
    _open_unit_interval("alpha", alpha, "use forward_kl or reverse_kl for the limit at 0")
    if direction not in ("forward", "reverse"):
        raise ConfigError(
            f"skew_kl has no direction {direction!r}: it is 'forward' (KL(q||.)) or 'reverse' (KL(p||.))."
        )
    s, t = _at_least_float32(student_logp, teacher_logp)
    first, second = (t, s) if direction == "forward" else (s, t)
    m = torch.logaddexp(first + math.log(alpha), second + math.log1p(-alpha))
    return (first.exp() * (first - m)).sum(-1)


DIVERGENCES: dict[str, Callable[..., Tensor]] = {
    "reverse_kl": reverse_kl,
    "forward_kl": forward_kl,
    "generalised_jsd": generalised_jsd,
    "skew_kl": skew_kl,
}


def clipped(divergence: Divergence, most: float) -> Divergence:
    """sum min(c(p, q), most), [..., K] -> [...]: a token adds at most `most`, and has no gradient above it.

    The released code of arXiv 2601.18734. Contributions below 0 stay, so the sum may be negative. Raises ConfigError
    for a bound that is not positive and finite.
    """
    if not 0.0 < most < math.inf:
        raise ConfigError(
            f"The bound of a token's contribution to a divergence must be positive and finite, got {most}. Leave it "
            "out for no bound."
        )

    def bounded(student_logp: Tensor, teacher_logp: Tensor) -> Tensor:
        return divergence(student_logp[..., None], teacher_logp[..., None]).clamp(max=most).sum(-1)

    return bounded


def named(divergence: str | Divergence, **options: float | str) -> Divergence:
    """The divergence of that name, or the given function, with options bound.

    Raises ConfigError for an unknown name or invalid options.
    """
    if callable(divergence):
        return partial(divergence, **options) if options else divergence
    if divergence not in DIVERGENCES:
        raise ConfigError(
            f"There is no divergence {divergence!r}.{nearest(divergence, DIVERGENCES)} "
            f"Known: {', '.join(DIVERGENCES)}; a function (student_logp, teacher_logp) -> [...] works too."
        )
    if not options:
        return DIVERGENCES[divergence]
    function = partial(DIVERGENCES[divergence], **options)
    try:
        function(torch.zeros(1), torch.zeros(1))  # refuses invalid options here, not in the first step
    except TypeError as error:
        raise ConfigError(f"{divergence} does not take these options: {error}.") from error
    return function


def on_support(
    divergence: str | Divergence,
    student_support_logp: Tensor,
    teacher_support_logp: Tensor,
    form: str = "tail",
    mask: Tensor | None = None,
) -> Tensor:
    """The divergence on a truncated support, [..., K] -> [...]. The module's docstring lists the forms.

    Both log-probs are full-vocabulary log-probs of the same tokens. `mask` [..., K] marks the existing entries (None:
    all). An empty support gives 0. Raises ConfigError for an unknown divergence or form.
    """
    if form not in FORMS:
        raise ConfigError(f"There is no form {form!r}.{nearest(form, FORMS)} Known: {', '.join(FORMS)}.")
    s, t = _at_least_float32(student_support_logp, teacher_support_logp)
    if mask is None:
        mask = torch.ones_like(s, dtype=torch.bool)
    # Masked entries may be NaN. Replace them before any arithmetic, so that no NaN reaches a gradient.
    s, t = s.masked_fill(~mask, 0.0), t.masked_fill(~mask, 0.0)
    return FORMS[form](named(divergence), s, t, mask)


def _raw(divergence: Divergence, s: Tensor, t: Tensor, mask: Tensor) -> Tensor:
    return _pointwise(divergence, s, t, mask).sum(-1)


def _stop_gradient(divergence: Divergence, s: Tensor, t: Tensor, mask: Tensor) -> Tensor:
    mass = s.exp().masked_fill(~mask, 0.0).sum(-1)
    return _raw(divergence, s, t, mask) - slope_at_equality(divergence) * (mass - mass.detach())


def _renormalised(divergence: Divergence, s: Tensor, t: Tensor, mask: Tensor) -> Tensor:
    # Mask again: at masked entries 0 minus the log of a tiny mass is large, and its exp would overflow.
    s = (s - _log_mass(s, mask)).masked_fill(~mask, 0.0)
    t = (t - _log_mass(t, mask)).masked_fill(~mask, 0.0)
    return _pointwise(divergence, s, t, mask).sum(-1)


def _tail(divergence: Divergence, s: Tensor, t: Tensor, mask: Tensor) -> Tensor:
    s_tail, t_tail = _log_rest(_log_mass(s, mask)), _log_rest(_log_mass(t, mask))
    some = mask.any(-1)
    return _raw(divergence, s, t, mask) + _pointwise(divergence, s_tail, t_tail, some[..., None]).sum(-1)


FORMS = {"raw": _raw, "stop_gradient": _stop_gradient, "renormalised": _renormalised, "tail": _tail}


def slope_at_equality(divergence: Divergence) -> float:
    """d c(p, q) / dp at p = q: 1 for reverse KL, -1 for forward KL, 0 for JSD.

    The gradient of `raw` is that of `stop_gradient` plus this slope times grad P_S. Constant for every f-divergence,
    c(p, q) = q f(p / q); assumed constant for a user's divergence.
    """
    with torch.inference_mode(False), torch.enable_grad():
        s = torch.zeros(1, dtype=torch.float64, requires_grad=True)  # p = q = 1, where d/dp = d/dlog p
        (slope,) = torch.autograd.grad(divergence(s, torch.zeros(1, dtype=torch.float64)), s)
    return float(slope)


def _pointwise(divergence: Divergence, s: Tensor, t: Tensor, mask: Tensor) -> Tensor:
    """c(p, q) of each entry, [..., K] -> [..., K]; 0 at masked entries."""
    return divergence(s[..., None], t[..., None]).masked_fill(~mask, 0.0)


def _log_mass(logp: Tensor, mask: Tensor) -> Tensor:
    """log of the mass on the support, [..., K] -> [..., 1]; for an empty support, of all entries."""
    exists = mask | ~mask.any(-1, keepdim=True)
    return logp.masked_fill(~exists, -torch.inf).logsumexp(-1, keepdim=True)


def _log_rest(log_mass: Tensor) -> Tensor:
    """log(1 - exp(log_mass)); a rest below the dtype's eps counts as eps, with zero gradient."""
    a = log_mass.clamp(max=-torch.finfo(log_mass.dtype).eps)
    near_zero = a > -math.log(2.0)
    large = torch.log(-torch.expm1(a.masked_fill(~near_zero, -1.0)))
    small = torch.log1p(-a.masked_fill(near_zero, -1.0).exp())
    return torch.where(near_zero, large, small)


def _at_least_float32(student_logp: Tensor, teacher_logp: Tensor) -> tuple[Tensor, Tensor]:
    both64 = student_logp.dtype == torch.float64
    return (student_logp, teacher_logp.double()) if both64 else (student_logp.float(), teacher_logp.float())


def _open_unit_interval(name: str, value: float, remedy: str) -> None:
    if not 0.0 < value < 1.0:
        raise ConfigError(f"{name} must lie strictly between 0 and 1, got {value}: {remedy}.")
