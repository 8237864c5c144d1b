"""The sampled-token policy gradient with a control variate: the reverse KL, in closed form, as its baseline.

"vOPD", arXiv 2605.07865, eq. 9-15; released code holi-lab/vOPD.

    r_t = log q(y_t | c_t) - log p(y_t | c_t)
    V_t = E_{y~p} r = -KL(p || q) at c_t                           no critic
    A_t = sg[r_t - V_t]
    L   = -(1/N) sum_t A_t log p(y_t | c_t),          y_t ~ p

| paper | here |
|---|---|
| pi_theta, pi_T | p `student_*`, q `teacher_*` |
| V(c_t), whole vocabulary | `baseline="full"`, `baselines.expected_log_ratio` |
| V(c_t) on TopK_S, renormalised | `baseline="top_k"`, `k` |
| m_t, sum m_t | trained tokens, `normalise.per("token")` |
| A_group + A_t, with a task's reward | `task_reward`, `credit.group_reward` |

E_y[V grad log p] = 0: with any baseline that does not depend on y the expected gradient is that of KL(p||q), and a
small `k` only costs variance. This holds for `average="token"`. The 1/T_i of `"sequence"` depends on the sampled
tokens, so there a baseline changes the mean too. The value is not the scalar of least variance, which is
E ||e_y - p||^2 r / E ||e_y - p||^2, `baseline="optimal"`. Where a confident student is wrong, the value can be worse
than no baseline.

Differs from the paper: not in the formula. Responses drawn with top-p < 1, top-k > 0 or another temperature than
the method's are refused, and so are weights that depend on the sampled token: they bias the baseline.
"""

from typing import Literal

from opd.method import Method
from opd.pieces import baselines, credit, normalise, signals, supports
from opd.types import Average


def vopd(
    baseline: Literal["top_k", "full", "optimal"] = "top_k",
    k: int = 100,
    task_reward: bool = False,
    average: Average = "token",
    temperature: float = 1.0,
) -> Method:
    """The log-ratio of each sampled token minus its expectation; `k` belongs to the baseline on the student's top-k."""
    value = baselines.least_variance if baseline == "optimal" else baselines.expected_log_ratio
    distilled = signals.policy_gradient(baselines.against(value, signals.log_ratio))
    return Method(
        support=supports.top_k(k, by="student") if baseline == "top_k" else supports.full(),
        credit=credit.group_reward() if task_reward else credit.no_credit(),
        signal=signals.add(distilled, signals.policy_gradient(signals.credit)) if task_reward else distilled,
        normalise=normalise.per(average),
        temperature=temperature,
    )
