"""VISD: a reward gives the direction of each token's advantage, a self that reads feedback gives its size.

"VISD", arXiv 2605.06094; released code Koreyoshi01/VISD (91bb992), which the formulas follow.

    A_i = (R_i - mean R) / (std R + 1e-4)                     over the group of responses to one prompt
    D_t = sg[log q~(y_t) - log p~(y_t)]                       q~, p~ renormalised on TopK(q) and y_t
    m_t = clip(exp(sign(A_i) D_t), 1 - b, 1 + b)
    A_t = A_i ((1 - l) + l m_t),   l_s = l (S - (s - 1)) / S in steps s = 1 ... S, then 0
    L   = -(1/B) sum_i (1/|y_i|) sum_t min(rho_t A_t, clip(rho_t, 1 - e, 1 + e) A_t),   rho_t = p(y_t) / mu(y_t)

| paper | here |
|---|---|
| pi_T, moving average of the student, .99 per step | q, `teacher_rules.self_ema`, `decay` |
| hint: the verified answer, a judge's feedback on this response | `hint="feedback"`; reward `feedback`, its `judge` |
| TopK_16(teacher) and y_t | `k`, `supports.top_k(with_sampled=True)` |
| l, S; b | `share`, `fades`; `bound` |
| GRPO's loss, PPO clip | `credit.group_reward`, `clip` |

A group of equal rewards has no signal at all: this is reinforcement learning, not distillation. With the paper's bounds
A_t is within 10 % of A_i. After S steps it equals `grpo`: a stage of that method then saves the teacher and the judge.
`hint="privileged_context"` shows the data's column instead of feedback and needs no judge.

Differs from the paper: a video is the few frames that a prompt holds as images. The wording of the hint is ours. A
response whose judge failed keeps A_i for all its tokens and is counted (`context/unsolved`). The code can mix D with
the log-ratio of the sampled token (weight 0 in its script); here it cannot. `bound` of 1 and more leaves only the upper
bound.
"""

from typing import Literal

from opd.method import Method
from opd.pieces import contexts, credit, normalise, sized, solutions, supports, teacher_rules
from opd.types import Average


def visd(
    share: float = 0.5,
    fades: int = 600,
    bound: float = 0.2,
    k: int = 16,
    decay: float = 0.99,
    hint: Literal["feedback", "privileged_context"] = "feedback",
    template: str | None = None,
    clip: float = 0.2,
    average: Average = "sequence",
    temperature: float = 1.0,
    epsilon: float = 1e-4,
) -> Method:
    """GRPO whose advantage is larger on tokens where the hint-reading self agrees with its sign.

    `template` shows the hint as {privileged_context}.
    """
    found = solutions.from_feedback() if hint == "feedback" else solutions.from_column(hint)
    words = contexts.ADVISED if hint == "feedback" else contexts.INFORMATION["solution"]["template"]
    return Method(
        context=contexts.privileged(template=template or words, solutions=found if hint == "feedback" else None),
        teacher=teacher_rules.self_ema(decay),
        support=supports.top_k(k, by="teacher", with_sampled=True),
        memory={"unsolved": solutions.counted(found), "size": sized.fading(share, fades)},
        credit=sized.with_share(credit.group_reward(epsilon=epsilon), found),
        signal=sized.sized_by_teacher(bound, (clip, clip)),
        normalise=normalise.per(average),
        temperature=temperature,
    )
