"""GKD: generalised knowledge distillation.

Agarwal et al., "On-Policy Distillation of Language Models", arXiv 2306.13649, eq. 2-4 and algorithm 1.

    m = beta q + (1 - beta) p
    L = (1/B) sum_i (1/T_i) sum_t [ beta KL(q || m) + (1 - beta) KL(p || m) ]
    in each step y ~ p with probability lambda, otherwise y from the data

| paper | here |
|---|---|
| P (teacher), Q (student) | q `teacher_support_logp`, p `student_support_logp` |
| beta; its limits | `beta`; 0 is forward KL(q||p), 1 is reverse KL(p||q) |
| lambda | `on_policy_share` |
| softmax temperature | `temperature`, of both |

Differs from the paper: at beta = 0 and 1 the divergence is the limit divided by beta or 1 - beta, as in the paper's
own use of the two KLs. Default `on_policy_share` 1, the paper's on-policy GKD; TRL's default is 0.5.
"""

from opd.method import Method
from opd.pieces import signals, sources, supports


def gkd(beta: float = 0.5, on_policy_share: float = 1.0, temperature: float = 1.0) -> Method:
    """The generalised Jensen-Shannon divergence on the full vocabulary, on student responses or a mixture."""
    return Method(
        source=sources.mixture(on_policy_share, sources.dataset()),
        support=supports.full(),
        signal=signals.jsd_and_limits(beta),
        temperature=temperature,
    )
