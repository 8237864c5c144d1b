"""Reverse KL on the k most likely tokens.

Zhu et al., "The Many Faces of On-Policy Distillation", arXiv 2605.11182, eq. 6-9 (raw), 12-13 (stop-gradient), 14-16
(renormalised), 17 (intersection); Li et al., arXiv 2604.13016, eq. 5 (student's k, renormalised).

    raw            L_t = sum_S p (log p - log q)
    stop_gradient  L_t = sum_S p (sg[log p] - log q)
    renormalised   L_t = sum_S p/P_S (log p/P_S - log q/Q_S)
    tail           L_t = sum_S p (log p - log q) + (1 - P_S) log (1 - P_S)/(1 - Q_S)

| paper | here |
|---|---|
| S_K | `support_ids` [N, K], chosen `by` teacher, student, intersection, union, symmetric_difference |
| K | `k`; 20 in the paper's Table 1 |
| P_S, Q_S | masses on the support, logged as support/student_mass and support/teacher_mass |

Differs from the paper: the default form is `tail`, the only one that keeps the sign of the mass on the support; the
paper's experiments use stop_gradient and renormalised together on the intersection (its engine's limit), which is
`form="renormalised", by="intersection"`: with renormalisation the stop-gradient changes nothing.
"""

import warnings
from typing import Literal

from opd import normalise, signals, supports
from opd.method import Method


def topk_reverse_kl(
    k: int = 20,
    by: Literal["teacher", "student", "intersection", "union", "symmetric_difference"] = "teacher",
    form: Literal["raw", "stop_gradient", "renormalised", "tail"] = "tail",
    with_sampled: bool = False,
    average: Literal["token", "sequence"] = "sequence",
    temperature: float = 1.0,
) -> Method:
    """A truncated reverse KL: K numbers a position instead of V."""
    if form == "raw":
        warnings.warn(
            "form='raw' is biased: its gradient pushes the student's mass out of the support (arXiv 2605.11182, "
            "eq. 6-9). Use it to study that; to train use tail, stop_gradient or renormalised.",
            stacklevel=2,
        )
    return Method(
        support=supports.top_k(k, by=by, with_sampled=with_sampled),
        signal=signals.divergence("reverse_kl", form=form),
        normalise=normalise.per_token() if average == "token" else normalise.per_sequence(),
        temperature=temperature,
    )
