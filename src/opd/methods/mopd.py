"""MOPD: one student of several domains' teachers, with a task's reward beside the log-ratio.

"MiMo-V2-Flash Technical Report", arXiv 2601.02780, eq. 7-9; Ma et al., "MOPD: Multi-Teacher On-Policy Distillation for
Capability Integration in LLM Post-Training", arXiv 2606.30406.

    A_t = sg[log q_d(y_t) - log p(y_t)] + alpha A_i,   A_i = (R_i - mean R) / (std R + 1e-4) over a prompt's group
    w_t = sg[p(y_t) / mu(y_t)] where e_low <= p/mu <= e_high, else 0
    L   = -(1/B) sum_i (1/|y_i|) sum_t w_t A_t log p(y_t),        y ~ mu

| paper | here |
|---|---|
| pi_domain of the prompt | q_d: each task of the recipe names its `teacher` |
| pi_theta, mu | p `student_logp`; `sampler_logp`, after temperature and truncation |
| alpha | `reward`; 0 is distillation alone, and needs no reward |
| A_ORM, an outcome reward's advantage | `credit.group_reward` of the task's `reward` |
| e_low, e_high | `least_ratio`, `most_ratio`; `importance.within_bounds` |
| 1/abs(y) | `average="sequence"` |

Direction: towards the teacher of the prompt's domain, and up the reward. Without reward the mean gradient over y ~ mu
is that of KL(p||q_d) on the tokens that truncation kept. Nothing is renormalised. One prompt has one teacher: the
teachers are not averaged. The reward makes the fixed point another than the teacher. Its part is the same for all
tokens of a response, the log-ratio is not. A group of equal rewards has the log-ratio alone.

The formulas were read in summaries of the two papers and in THUDM/slime pull request 2051. The summaries name no number
for alpha and the bounds: 1 is ours, 0.2 and 5 are those of slime, whose alpha is 0. The losses of 2606.30406 are there
the reverse KL on the whole vocabulary and, on k tokens, sum p log(p/q) - p + q: `reverse_kl`, and `topk_reverse_kl`
with `form="stop_gradient"`, with tasks.

Differs from the paper: sampler and trainer are one model, so w differs from 1 only under truncated sampling, where it
is the mass that was kept. The reward is the recipe's, not an outcome reward model.
"""

import math

from opd.errors import ConfigError
from opd.method import Method
from opd.pieces import credit, importance, normalise, signals
from opd.types import Average


def mopd(
    reward: float = 1.0,
    least_ratio: float = 0.2,
    most_ratio: float = 5.0,
    average: Average = "sequence",
    temperature: float = 1.0,
) -> Method:
    """The log-ratio to the task's teacher plus `reward` times GRPO's advantage, with a bounded importance weight."""
    if not 0.0 <= reward < math.inf:
        raise ConfigError(
            f"`reward` is the factor of the task's reward beside the log-ratio, at least 0 and finite, got {reward}. "
            "0 leaves the reward out."
        )
    advantage = signals.log_ratio if reward == 0.0 else signals.add(signals.log_ratio, signals.credit)
    return Method(
        credit=credit.no_credit() if reward == 0.0 else credit.scale(reward, credit.group_reward()),
        signal=importance.within_bounds(advantage, least_ratio, most_ratio),
        normalise=normalise.per(average),
        temperature=temperature,
    )
