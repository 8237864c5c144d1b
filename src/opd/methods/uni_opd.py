"""Uni-OPD: the teacher's log-ratios, shifted so that right responses score above wrong ones.

"Uni-OPD", arXiv 2605.03677, eq. 9-11; released code WenjinHou/Uni-OPD (08fcec0, d91adac).

    r_t    = sg[log q(y_t) - log mu(y_t)],   G_i = mean_t r_t
    gap    = mean_right G - mean_wrong G, or min_right G - max_wrong G      over the group of responses to one prompt
    lambda = max(0, delta - gap);   A_t = r_t + lambda / 2 in a right response, r_t - lambda / 2 in a wrong one
    L      = -(1/B) sum_i (1/|y_i|) sum_t min(rho_t A_t, clip(rho_t, 1 - e_low, 1 + e_high) A_t),   rho_t = p / mu

| paper | here |
|---|---|
| pi_T, pi_old | `teacher_logp`; `policy_logp`, recorded during sampling |
| gap statistic: `mean` (scripts), `minmax` (eq. 9-11) | `gap` |
| "Spread", "Lift", incorrect down | `side`: both, correct_up (lambda on right ones), incorrect_down |
| margin mask (`margin="mask"`), least share of a class | `margins.in_order`, `keep` |
| correct:incorrect ratio of the online balance | `balance`; `filters.balanced`, within a prompt's group |
| mask of tokens with abs(log p - log q) >= 10 | `bound` |
| offline balance: prompts that are sometimes right occur more often | `data: {upsample: ...}` of the recipe |

The shift adds a reward: the fixed point is no longer the teacher. It is constant per token, so a mean per token would
push a response of 500 tokens 100 times as far as one of 5, and is refused. A mean shift leaves single pairs disordered.
Multimodal runs of the paper: side correct_up, delta 0. `margin="none"` is the same without shift and mask.

Differs from the paper: right is a reward of at least `passes`. The released code balances over the whole step by
default, with an unseeded choice, and its scripts within the group; here the choice is seeded. A response that the
balance leaves out has no part in the gap and the denominator. The code's one-process path shifts correct_up always,
and a failed teacher scores 0; here it is an error.
"""

from typing import Literal

from opd.method import Method
from opd.pieces import credit, filters, margins, normalise, signals, weights
from opd.types import Average


def uni_opd(
    margin: Literal["shift", "mask", "none"] = "shift",
    gap: margins.Gap = "mean",
    side: margins.Side = "both",
    delta: float = 0.4,
    keep: float = 0.25,
    balance: float | None = 1.0,
    balance_seed: int = 0,
    bound: float | None = 10.0,
    passes: float = 1.0,
    clip_low: float = 0.2,
    clip_high: float = 0.28,
    average: Average = "sequence",
    temperature: float = 1.0,
) -> Method:
    """On-policy distillation whose advantages are put in the order of the outcomes, by a shift or by a mask.

    `side` belongs to the shift, `keep` to the mask. None switches `balance` or `bound` off.
    """
    order = margins.Margin(delta=delta, gap=gap, passes=passes)
    near = weights.every_token() if bound is None else margins.near_teacher(bound)
    return Method(
        filter=filters.everything() if balance is None else filters.balanced(balance, passes, balance_seed),
        memory={"order": margins.ordered(order, bound)},
        credit=margins.shifted(order, side) if margin == "shift" else credit.discounted(0.0),
        weight=weights.times(near, margins.in_order(order, keep)) if margin == "mask" else near,
        signal=signals.policy_gradient(signals.credit, clip=(clip_low, clip_high)),
        normalise=normalise.per(average),
        temperature=temperature,
    )
