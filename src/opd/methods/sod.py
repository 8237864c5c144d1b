"""SOD: step-wise on-policy distillation of agents, with less weight on turns where the teacher is far from the student.

"SOD: Step-wise On-policy Distillation", arXiv 2605.07725; released code YoungZ365/SOD (110c4b8), a fork of verl, which
the formulas follow.

    d_k = mean over turn k of |log q(y_t) - log p(y_t)|           a turn: the student's tokens between tool answers
    w_1 = 1,  w_k = min(prod_{u < k} (d_u + e) / (d_{u+1} + e), 1 + delta) = min((d_1 + e) / (d_k + e), 1 + delta)
    A_t = A_i + kappa w_k(t) (log q(y_t) - log p(y_t)),           A_i = (R_i - mean R) / (std R + 1e-6) over the group
    L   = -(1/N) sum_t min(rho_t A_t, clip(rho_t, 1 - .2, 1 + .28) A_t),   rho_t = p(y_t) / mu(y_t)

| paper | here |
|---|---|
| s_old, t | log p `policy_logp`, recorded during sampling; log q `teacher_logp`: both without gradient |
| step k, a run of response_mask = 1 | `turns.turn_of`: a run of own tokens; an empty answer of a tool ends it too |
| e, delta | `epsilon` 1e-6; `bound` .2 as in paper and script (the code's dataclass has .5) |
| kappa | `strength` 1 |
| A_i, GRPO | `reward` 1 times `credit.group_reward`; 0 leaves the task's reward out |
| N, tokens of the step; clip | `average="token"`; `clip_low`, `clip_high` |

Direction: towards the teacher and up the reward. Tokens of tools have no gradient, no share in d and none in N. The
weight is on the distilled part alone. It reads the sampled tokens, so the expected gradient is not that of a weighted
KL. A response of one turn has w = 1: with `reward=0` that is plain distillation.

All weights are relative to the first turn. Where both models agree on it ("Let me see"), d_1 is near 0 and every later
turn is muted: `sod/first_divergence` and `sod/muted` show it. `reference="batch"` takes the mean of d_1 over the step's
responses instead; that is ours.

Differs from the paper: no penalty of overlong responses, and one update per batch, so that the clip binds under
truncated sampling alone.
"""

import math

from opd.errors import ConfigError
from opd.method import Method
from opd.pieces import credit, normalise, signals, turns
from opd.types import Average


def sod(
    strength: float = 1.0,
    reward: float = 1.0,
    bound: float = 0.2,
    reference: turns.Reference = "first",
    clip_low: float = 0.2,
    clip_high: float = 0.28,
    average: Average = "token",
    temperature: float = 1.0,
    epsilon: float = 1e-6,
) -> Method:
    """Log-ratios weighed by turn, beside `reward` times GRPO's advantage."""
    if not (0.0 < strength < math.inf and 0.0 <= reward < math.inf):
        raise ConfigError(
            f"`strength`, the factor of the log-ratios, must be above 0, and `reward`, that of the task's reward, at "
            f"least 0, both finite; got {strength} and {reward}. Without distillation the method is `grpo`."
        )
    distilled = credit.scale(strength, turns.weighed(credit.discounted(0.0)))
    task = () if reward == 0.0 else (credit.scale(reward, credit.group_reward(epsilon=1e-6)),)
    return Method(
        memory={"turns": turns.weighing(reference, epsilon, bound)},
        credit=credit.add(*task, distilled),
        signal=signals.policy_gradient(signals.credit, clip=(clip_low, clip_high)),
        normalise=normalise.per(average),
        temperature=temperature,
    )
