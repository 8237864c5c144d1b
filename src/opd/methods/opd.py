"""On-policy distillation with the sampled token: the policy gradient of the reverse KL.

Zhu et al., "The Many Faces of On-Policy Distillation", arXiv 2605.11182, eq. 4-5; also arXiv 2604.13016 eq. 3 and
arXiv 2603.25562 eq. 2 (the token-level estimator).

    A_t = sg[log q(y_t | x, y_<t) - log p(y_t | x, y_<t)]
    L   = -(1/B) sum_i (1/T_i) sum_t A_t log p(y_t | x, y_<t),        y ~ p

| paper | here |
|---|---|
| pi_T, q | `teacher_logp` |
| pi, p | `student_logp` |
| A_t | `signals.log_ratio` |
| 1/T_i (2605.11182 eq. 1), 1/sum T_i (2603.25562 eq. 8) | `average`: sequence, token |

The expected gradient over y_t is exactly that of KL(p||q) at the prefix, with the variance of one sample. Rollouts with
top-p < 1 are drawn from another distribution than p; `importance=True` multiplies by p(y_t) / mu(y_t), which restores
the gradient on the tokens that truncation left.

Differs from the paper: p in A_t is the student of the update itself, not the rollout engine's record of it; on policy
they are equal up to rounding.
"""

from typing import Literal

from opd import normalise, signals
from opd.method import Method


def opd(
    average: Literal["token", "sequence"] = "sequence",
    importance: bool = False,
    temperature: float = 1.0,
) -> Method:
    """The teacher's log-ratio of each sampled token as its advantage; the cheapest score a teacher can give."""
    return Method(
        signal=signals.policy_gradient(signals.log_ratio, importance=importance),
        normalise=normalise.per_token() if average == "token" else normalise.per_sequence(),
        temperature=temperature,
    )
