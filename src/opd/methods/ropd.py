"""ROPD: a teacher that only gives texts. A rubric that contrasts its answers with the student's is the reward.

arXiv 2605.07396, eq. 4 and 6; released code Peregrine123/ROPD_official.

    C_x = Rubricator(x, Y_T, Y_S) = {(c_k, w_k)}                one for the whole group
    R_i = sum_k w_k v_ik / sum_k w_k,   v_ik = Verifier(x, y_i, c_k) in {0, 1}
    A_i = (R_i - mean R) / (std R + e)                          over the group of responses to one prompt
    L   = -(1/N) sum_i sum_t min(rho_t A_i, clip(rho_t, 1 - e_low, 1 + e_high) A_i),   rho_t = p(y_t) / mu(y_t)

| paper | here |
|---|---|
| Y_T, m answers of the teacher | reward `rubric`: `answers`, from its `author` or a column of the data |
| Y_S, n responses | `sampling.n` of the recipe |
| Rubricator, Verifier, blind order | reward `rubric`: its `judge` and `verifier`, `blind`, `shared` |
| a judge that fails: A = 0 for the group; its largest rate | `credit.group_reward`; reward `rubric`: `max_failed` |
| A_i of the released code: no std | `advantage="centred"` |
| e_low, e_high | `clip_low`, `clip_high` |
| std + e of the released code, 1e-6 | `epsilon` |
| dual clip of the released code, c = 3 | `dual_clip`: where A < 0, min(rho, c) |

Subtracting a constant from the group's rewards, such as the teacher's own reward, does not change A. No KL term.

Differs from the paper: no epsilon in the denominator of R, since points are at least 1; one update per batch, so that
clipping binds only if truncated sampling makes rho differ from 1, and rho needs no further cap.
"""

from typing import Literal

from opd.method import Method
from opd.pieces import credit, normalise, signals, supports, teacher_rules
from opd.pieces.needs import Input, Needs, Piece, needs_of
from opd.types import Average


def ropd(
    advantage: Literal["standardised", "centred"] = "standardised",
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    average: Average = "token",
    temperature: float = 1.0,
    dual_clip: float | None = None,
    epsilon: float = 1e-4,
) -> Method:
    """Reinforcement learning from a rubric built on a teacher's texts, each response relative to its group."""
    against_group = credit.group_reward(divide_by_std=advantage == "standardised", epsilon=epsilon)
    return Method(
        teacher=teacher_rules.no_teacher(),
        support=supports.no_support(),
        credit=Piece(against_group, needs_of(against_group) | Needs(inputs=frozenset({Input.JUDGE}))),
        signal=signals.policy_gradient(signals.credit, clip=(clip_low, clip_high), dual_clip=dual_clip),
        normalise=normalise.per(average),
        temperature=temperature,
    )
