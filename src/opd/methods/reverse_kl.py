"""On-policy distillation with the exact reverse KL at every position.

Zhu et al., "The Many Faces of On-Policy Distillation", arXiv 2605.11182, eq. 1 and 3; Li et al., "Rethinking
On-Policy Distillation", arXiv 2604.13016, eq. 4.

    L = (1/B) sum_i (1/T_i) sum_t KL( p(. | x, y_<t) || q(. | x, y_<t) ),        y ~ p, no gradient through y

| paper | here |
|---|---|
| pi_theta, p | `student_support_logp`, all of the vocabulary |
| pi_T, q | `teacher_support_logp` |
| d/dz_j = p_j (log p_j - log q_j - KL) | `closed_forms.reverse_kl`, chunk by chunk in the forward |

Differs from the paper: nothing.
"""

from opd.method import Method
from opd.pieces import normalise, signals, supports
from opd.types import Average


def reverse_kl(average: Average = "sequence", temperature: float = 1.0) -> Method:
    """The exact divergence, with the lowest variance: the teacher's whole distribution at every position."""
    return Method(
        support=supports.full(),
        signal=signals.divergence("reverse_kl"),
        normalise=normalise.per(average),
        temperature=temperature,
    )
