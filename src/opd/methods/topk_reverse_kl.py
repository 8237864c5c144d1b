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
| stop-gradient and renormalised together (Table 1) | `form="renormalised"`, where the stop-gradient changes nothing |
| P_S, Q_S | masses on the support, logged as support/student_mass and support/teacher_mass |

The defaults are those of its Table 1 and eq. 17. We recommend `by="teacher", form="tail"`, which is "Tail-Aware Top-k
On-Policy Distillation", arXiv 2608.14728: the only form with a gradient of the right sign for the mass on the support;
the renormalised form does not control this mass (study `losses`). Forward KL: `topk_forward_kl`.

The released code (ulab-uiuc/Open-On-Policy-Distillation, a fork of slime) asks the teacher's server for a list of its
own top tokens. For a token v of S that the list lacks it takes the student's recorded log p(v) as log q(v). The value
of its term is then 0, and so is its gradient in `stop_gradient`; `raw` and `tail` still differentiate p(v), and `raw`
adds grad p(v), which lowers v. Renormalised on the intersection, such tokens are left out. Here the teacher scores
every token of S, so that no log q(v) is filled in. Neither clips log p(v) - log q(v); slime itself, THUDM/slime, has no
top-k loss.

Differs from the paper: `tail` is only in its released code, for the student's k. Positions with an empty intersection
have no loss and stay in the mean.
"""

import warnings
from typing import Literal

from opd.method import Method
from opd.pieces import normalise, signals, supports
from opd.types import Average, ChosenBy


def topk_reverse_kl(
    k: int = 20,
    by: ChosenBy = "intersection",
    form: Literal["raw", "stop_gradient", "renormalised", "tail"] = "renormalised",
    with_sampled: bool = False,
    average: Average = "sequence",
    temperature: float = 1.0,
) -> Method:
    """A truncated reverse KL: K numbers per position instead of V."""
    if form == "raw":
        warnings.warn(
            "form='raw' is biased: its gradient pushes the student's mass out of the support (arXiv 2605.11182, "
            "eq. 6-9). Use it to study that; to train use tail, stop_gradient or renormalised.",
            stacklevel=2,
        )
    scored = supports.top_k(k, by=by, with_sampled=with_sampled)
    return Method(
        support=supports.for_renormalised(scored, ", or form: tail") if form == "renormalised" else scored,
        signal=signals.divergence("reverse_kl", form=form),
        normalise=normalise.per(average),
        temperature=temperature,
    )
