"""Top-k policy gradient with lower token weights and shorter responses where teacher and student overlap too little.

"Prune-OPD", arXiv 2605.07804, and the authors' released code, which the formulas follow.

    r_tv    = sg[(log q(v) - log p(v)) p~(v)],   p~ = p / P_S on S = TopK(p_t)
    lost_t  = 1[|TopK(p_t) and TopK(q_t)| / K < tau]
    W_t     = clip(1 - w_drop sum_{j <= t} lost_j, 0, 1)
    L       = -(1/N) sum_t (W_t + w_base) sum_{v in S} r_tv p(v)/sg[p(v)]
    budget  : hit = mean_i [#{t : W_t > 0} >= max(B_min, B - margin)];   hit >= rho: B <- min(B + step, B_max),
              after `patience` steps in a row without: B <- max(B - step, B_min)

| paper | here |
|---|---|
| K, tau, w_drop, w_base | `k`, `threshold`, `drop`, `base`; `drift.Drift`, `drift.trusted` |
| metric `overlap`, `teacher_top_p_accept` | `metric`; the second: y_t outside the teacher's top-p (p = tau) of its k |
| B, B_min, B_max | `budget`, `budget_min`, `budget_max`, in tokens, of the next step's responses; `drift.Budget` |
| step, margin, rho, patience | `budget_step`, `margin`, `hit_share`, `patience` |

`stop="rollout"` has no budget: the teacher scores a response every `every` tokens during sampling, and a response ends
when its W_t reaches 0. `stop="none"` only sets the weights. `loss="sampled"` weighs the sampled token instead of the
top-k, which leaves the loss to another method: `method: vopd+prune_opd`. The largest budget must not exceed
sampling.max_completion_length. With the metric `overlap` the weight does not depend on y_t, so a baseline stays
unbiased.

Differs from the paper: no PPO clip, which never binds with one update per batch; `stop="rollout"` is not in the code,
which ends whole batches by the budget.
"""

from typing import Any, Literal

from opd.method import Method
from opd.pieces import drift, normalise, signals, sources, supports
from opd.types import Average


def prune_opd(
    k: int = 16,
    metric: Literal["overlap", "teacher_top_p_accept"] = "overlap",
    threshold: float = 0.7,
    drop: float = 0.01,
    base: float = 0.5,
    loss: Literal["top_k", "sampled"] = "top_k",
    stop: Literal["budget", "rollout", "none"] = "budget",
    budget: int = 2048,
    budget_min: int = 1024,
    budget_max: int = 12288,
    budget_step: int = 100,
    margin: int = 100,
    hit_share: float = 0.1,
    patience: int = 3,
    every: int = 256,
    average: Average = "token",
    temperature: float = 1.0,
) -> Method:
    """A reverse KL on the student's top-k, weighted and cut by drift; `budget`... belong to `stop="budget"`, `every` to
    `stop="rollout"`."""
    judged = drift.Drift(metric=metric, k=k, threshold=threshold, drop=drop)
    ends: dict[str, Any] = {"memory": {"drift": drift.measured(judged)}}
    if stop == "budget":
        allowed = drift.budget(
            judged,
            initial=budget,
            least=budget_min,
            most=budget_max,
            step=budget_step,
            margin=margin,
            hit_share=hit_share,
            patience=patience,
        )
        ends = {"source": sources.on_policy(drift.within_budget(budget_max)), "memory": {"budget": allowed}}
    elif stop == "rollout":
        ends["source"] = sources.on_policy(drift.ends_drifted(judged, every))
    return Method(
        support=supports.top_k(k, by="student") if loss == "top_k" else supports.sampled(),
        weight=drift.trusted(judged, base),
        signal=signals.support_policy_gradient("student") if loss == "top_k" else signals.sampled_reverse_kl(),
        normalise=normalise.per(average),
        temperature=temperature,
        **ends,
    )
