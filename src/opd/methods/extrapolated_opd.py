"""Distillation beyond the teacher: along its log-ratio to a base model, up to a limit that the doctor measures.

"The Extrapolation Cliff", arXiv 2605.08737; without its limit G-OPD, and with lambda > 1 ExOPD, arXiv 2602.12125,
released code RUCBM/G-OPD.

    A_t     = sg[lambda log q - log p - (lambda - 1) log b]  =  sg[lambda log(q/b) - log(p/b)]  at y_t
    L       = -(1/N) sum_t w_t A_t log p(y_t),        w_t = min(c, q/p) (paper) or min(c, p/mu) (G-OPD's code), sg
    pi      = q^lambda b^(1 - lambda) / Z             the fixed point without w
    lambda* = [log((1-p)/(c-1+p)) - log((1-b)/b)] / [log((1-p)/p) - log((1-b)/b)]

| paper | here |
|---|---|
| pi_T, pi_S, pi_B | q `teacher_logp`, p `student_logp`, b `base_logp`: the stage's `base` |
| lambda | `strength`; 1 is plain distillation with w, below 1 pi is between base and teacher |
| c, its ratio | `bound`, `clip` |
| p, b in lambda* | masses of a class of equal tokens (", " and ","), which `opd doctor` measures |

Direction: A > 0, and the token gains probability, where p < q^lambda b^(1 - lambda). Without w the expected gradient
over y_t is exactly that of KL(p||pi) at the prefix. With w = min(c, q/p) it is not: at p = pi the advantage of every
token is log Z, at least 0 for lambda > 1, which w weighs unevenly, so the student rests slightly nearer to the teacher.
A token that the teacher finds unlikely then weighs almost nothing, q/p log(q/p) -> 0: a student that is far from its
teacher learns slowly. The paper starts from a student that was tuned on the same task.
Beyond lambda* the tail of a class has q/pi > c, and w no longer restores it in full: strict formats break first.
`opd doctor` refuses such a lambda unless `allow_cliff` is set.

Differs from the paper: the clips "student/sampler" (G-OPD's code) and "none"; b may be any fixed model, as in G-OPD,
such as the model that the teacher was trained from. The defaults are those of 2605.08737, not of G-OPD.
"""

from opd.method import Method
from opd.pieces import extrapolation, normalise
from opd.pieces.extrapolation import Clip
from opd.types import Average


def extrapolated_opd(
    strength: float = 1.15,
    clip: Clip = "teacher/student",
    bound: float = 5.0,
    average: Average = "token",
    temperature: float = 1.0,
    allow_cliff: bool = False,
) -> Method:
    """The log-ratio of each sampled token plus lambda - 1 times that of teacher to base; `bound` belongs to `clip`."""
    return Method(
        memory={"three models": extrapolation.measured(clip, bound)},
        signal=extrapolation.extrapolated(strength, clip=clip, bound=bound, allow_cliff=allow_cliff),
        normalise=normalise.per(average),
        temperature=temperature,
    )
