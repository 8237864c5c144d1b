"""SDPO: the student learns from itself reading a right response of the group, or feedback on its own.

Hübotter et al., "Reinforcement Learning via Self-Distillation", arXiv 2601.20802; the released code lasgroup/SDPO,
which the formulas follow, and TRL (`trl.experimental.sdpo`).

    c_i = the text of another right response to the prompt, else feedback on response i, else nothing
    q   = p_ema(. | x, c_i, y_<t),   theta_ema <- (1 - rho) theta_ema + rho theta       after each step
    m   = alpha q + (1 - alpha) p
    L_t = alpha KL(q || m) + (1 - alpha) KL(p || m)        on TopK(p) and one entry for the other tokens
    L   = (1/N) sum_t L_t over the N tokens of the responses with some c_i,        y ~ p(. | x)

| paper | here |
|---|---|
| alpha: 0 is KL(q||p), 1 is KL(p||q), else the generalised JSD | `beta`; 0.5, and 1 for code with feedback |
| K, tail bucket | `k`; 100, and 20 for code; None: the whole vocabulary |
| rho, 0.05 and 0.01 for code | 1 - `decay` |
| solution of a successful attempt, never the response itself | `solutions.from_peers` |
| environment feedback, where there is no solution | `otherwise`: that of the reward `feedback`, or a column |
| self-distillation mask | `solutions.solved_alone`, counted as `context/unsolved` |

Direction: towards the self-teacher, without gradient through q. The reward acts only through the choice of c: a prompt
without a right response and without feedback trains nothing, and `train/update_skipped` counts the steps without any.
The form on the truncated support is `tail`; neither model is renormalised. With the mean per token, long responses
weigh more.

Differs from the paper: right is a reward of at least 1. Of several right responses the next sample in order is shown;
TRL shows the first. The thought of a shown response stays in it. There is no importance weight: with one update per
batch it is 1. By default TRL compares the sampled token alone; it can add GRPO's loss, which no option does here.
"""

from typing import Literal

from opd.method import Method
from opd.pieces import contexts, normalise, signals, solutions, supports, teacher_rules
from opd.types import Average


def sdpo(
    beta: float = 0.5,
    k: int | None = 100,
    decay: float = 0.95,
    otherwise: Literal["feedback", "privileged_context"] | None = None,
    template: str | None = None,
    average: Average = "token",
    temperature: float = 1.0,
) -> Method:
    """Distillation from a moving average that reads a right peer; `otherwise` is for responses without one.

    `template` shows the text as {privileged_context}.
    """
    found = solutions.from_peers(None if otherwise == "feedback" else otherwise)
    if otherwise == "feedback":
        found = solutions.first_of(found, solutions.from_feedback())
    return Method(
        filter=solutions.solved_alone(found),
        context=contexts.privileged(template=template or contexts.SELF_TAUGHT["sdpo"], solutions=found),
        memory={"unsolved": solutions.counted(found)},
        teacher=teacher_rules.self_ema(decay),
        support=supports.full() if k is None else supports.top_k(k, by="student"),
        signal=signals.jsd_and_limits(beta),
        normalise=normalise.per(average),
        temperature=temperature,
    )
