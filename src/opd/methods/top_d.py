"""TOP-D: the log-ratio to a mixture of teacher and student, with the mean of later tokens, standardised by group.

Xie et al., "Trust Region Policy Distillation", arXiv 2607.04751, eq. 6 and 8, Algorithm 1; PrimeIntellect-ai/prime-rl
pull request 2966 (`topd`), from which the details come; the paper was read in notes.

    r_t = log(alpha q(y_t) / p(y_t) + 1 - alpha)                at least log(1 - alpha)
    R_t = r_t + (1 / (|y| - t)) sum_{j > t} r_j                 R = r at the last token
    A_t = (R_t - mean R) / std R                                over all tokens of the group of a prompt's responses
    L   = -(1/N) sum_t min(rho_t A_t, clip(rho_t, 1 - e, 1 + e) A_t),   rho_t = p(y_t) / mu(y_t)

| paper | here |
|---|---|
| pi*, pi_old | q `teacher_logp`; p `policy_logp`, recorded during sampling |
| proximal teacher | alpha q + (1 - alpha) p, never made: r_t follows from q/p |
| alpha, 0.1 or 0.2 | `alpha`; 1 is plain distillation's log-ratio, without a lower bound |
| G = 8 responses to a prompt | `sampling.n` of the recipe |
| epsilon, 0.2 | `clip` |

Direction: towards the teacher, no gradient through A. Alone, r_t has the mean gradient of -KL(p || sg[alpha q +
(1 - alpha) p]), which is 0 where p = q. R_t adds credit for later tokens. The standardisation takes away the scale: a
group in which student and teacher nearly agree moves the student as far as one in which they do not. It also subtracts
a mean that depends on the tokens themselves, so the mean gradient is that of no divergence. All tokens count alike,
whatever their response's length. No reward is read.

Differs from the paper: one update per batch. The paper makes 16 from the responses of one sampling, so that its clip
binds; here rho differs from 1 only under truncated sampling. std has the divisor n - 1, as in prime-rl. A group whose R
differ by no more than rounding has A = 0; prime-rl divides by at least 1e-6, so that A would be noise. The mean is over
the step's tokens, not over each group's.
"""

from opd.method import Method
from opd.pieces import credit, normalise, signals
from opd.types import Average


def top_d(alpha: float = 0.2, clip: float = 0.2, average: Average = "token", temperature: float = 1.0) -> Method:
    """A bounded log-ratio with the mean of later ones, as z-scores within a prompt's group."""
    return Method(
        credit=credit.proximal(alpha),
        signal=signals.policy_gradient(signals.credit, clip=(clip, clip)),
        normalise=normalise.per(average),
        temperature=temperature,
    )
