"""Reverse KL on the student's own top-k tokens, as the paper writes it or as its code computes it.

Li et al., "Rethinking On-Policy Distillation of Large Language Models", arXiv 2604.13016, eq. 2 and 5, section 4.2
(supports) and 6.3 (k); the released code.

    paper     L_t = sum_S p/P_S (log p/P_S - log q/Q_S)                                S = the student's k, eq. 5
    released  L_t = -sum_S A(v) p(v)/sg[p(v)],   A(v) = sg[w(v) (log q(v) - log p(v))]
              w = p, q or 1 on S, divided by its sum over S

| paper | here |
|---|---|
| S_t = TopK(p_t, k) | `support_ids` [N, K], chosen `by` student, teacher, intersection, union, symmetric_difference |
| k | `k`; 16 in the paper's Table 1 |
| bar-p, bar-q | p/P_S, q/Q_S: `form="renormalised"` of `signals.divergence` |
| token_reward_direct, reward_weight_mode | `form="released"`, `weights` |
| overlap, non-overlap tokens (section 4.2) | `by="intersection"`, `by="symmetric_difference"` |
| sampled token (eq. 3) | method `opd` with `average="token"` |

The two forms treat the mass on S differently: the gradient of `released` is that of `paper` plus
(log P_S/Q_S + D) grad log P_S, with D the value of eq. 5. With one token eq. 5 is identically 0.

Differs from the paper: no PPO clip, which never binds with one update per batch. As in the released code, weights on
the symmetric difference are not divided by their sum unless `normalised=True`. The mean is over the tokens of the step;
the paper sums over a response's tokens, and its code averages by micro-batch.
"""

from typing import Literal

from opd.errors import ConfigError
from opd.method import Method
from opd.pieces import normalise, signals, supports
from opd.types import Average, ChosenBy, Signal


def rethinking_opd(
    k: int = 16,
    by: ChosenBy = "student",
    form: Literal["paper", "released"] = "paper",
    weights: Literal["student", "teacher", "none"] = "student",
    normalised: bool | None = None,
    average: Average = "token",
    temperature: float = 1.0,
) -> Method:
    """A truncated reverse KL; `weights` and `normalised` are for the released form (None: as in its code)."""
    scored = supports.top_k(k, by=by)
    return Method(
        support=supports.for_renormalised(scored, ", or form: released") if form == "paper" else scored,
        signal=_paper(weights, normalised) if form == "paper" else _released(by, weights, normalised),
        normalise=normalise.per(average),
        temperature=temperature,
    )


def _paper(weights: str, normalised: bool | None) -> Signal:
    if weights != "student" or normalised is False:
        raise ConfigError(
            f"The paper's form has fixed weights, those of the renormalised student, but got weights={weights!r}, "
            f"normalised={normalised}. Set form: released, or leave both out."
        )
    return signals.divergence("reverse_kl", form="renormalised")


def _released(by: str, weights: Literal["student", "teacher", "none"], normalised: bool | None) -> Signal:
    as_released = by != "symmetric_difference"
    return signals.support_policy_gradient(weights, normalised=as_released if normalised is None else normalised)
