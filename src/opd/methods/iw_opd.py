"""The sampled token's log-ratio, with more weight where student and teacher have disagreed little so far.

"On the Position Bias of On-Policy Distillation", arXiv 2606.22600, Algorithm 1; released code in TRL
(`trl.experimental.iw_opd`) and as a fork of verl.

    a_t = sg[log q(y_t) - log p(y_t)]
    w_t = 1 + gamma (1 - sum_{j < t} |a_j| / sum_j |a_j|)
    L   = -(1/N) sum_t w_t a_t log p(y_t)

| paper | here |
|---|---|
| pi_T, pi_theta | q `teacher_logp`, p `policy_logp`: recorded during sampling, before truncation |
| gamma | `gamma`, 0.5: w falls from 1.5 at the first token to 1 |
| the sum of \\|a\\| over a response, at least epsilon | `epsilon`, 1e-8; `credit.early` |
| 1/N over all tokens of the step | `average="token"` |

Direction: towards the teacher, as plain distillation, which gamma = 0 is. The weights have no scale: a response with
small differences has the same weights as one with large ones. Where nothing differs, a_t = 0 and they have no effect.
The sum over the response reads y_t and the tokens after it, so the expected gradient is not that of a weighted KL.

Differs from the paper: TRL takes log mu, the sampler's record; with top-p below 1 that is the truncated distribution,
and a_t would not be 0 where both models agree. Here it is p before truncation; without truncation both are the same.
"""

from opd.method import Method
from opd.pieces import credit, normalise, signals
from opd.types import Average


def iw_opd(gamma: float = 0.5, epsilon: float = 1e-8, average: Average = "token", temperature: float = 1.0) -> Method:
    """The log-ratio of each sampled token, times a weight that falls with the differences before it."""
    return Method(
        credit=credit.early(gamma, epsilon),
        signal=signals.policy_gradient(signals.credit),
        normalise=normalise.per(average),
        temperature=temperature,
    )
