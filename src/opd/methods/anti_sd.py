"""Anti-self-distillation: towards the reward, and away from the same model reading the solution.

Shen et al., "Anti-Self-Distillation for Reasoning RL via Pointwise Mutual Information", arXiv 2605.11609, eq. 2 and
4-7, Algorithm 1, App. B and C.

    u_t     = log p(y_t | x, c, y_<t) - log p(y_t | x, y_<t)        pointwise mutual information of y_t and c
    phi(u)  = (softplus(u) - log 2) / 2
    A_{i,t} = (R_i - mean R) / std R - lambda sg[phi(u_{i,t})],     lambda = g lambda_max
    g       = 0 if H < 0.93 H_warm, 1 if H >= H_warm, else as it was

    released  A_{i,t} = (R_i - mean R) / std R - lambda_i clip((phi(u'_t) - mean_t phi) / std_t phi, -5, 5)
              u' = clip(u 1[|u| <= 2 sigma], -5, 5),   lambda_i = g clip(0.2 log(X_i / P), 0, lambda_max)

| paper | here |
|---|---|
| pi_S, pi_T | p, the student, and q, the student that also reads c (`teacher_rules.self_live`) |
| c: a right response of the group, else the data's solution, and the verdict | `contexts.INFORMATION`, `solution` |
| A^seq | `credit.group_reward` |
| -phi(u), ascent of JSD; -u, ascent of KL(p || q) | `credit.diverge_from_teacher`, `shape` |
| lambda_max, W, 0.93 | `strength`, `warm_up`, `closes_below` |
| g, H, H_warm | `gates.gated_ascent`; with `gate=False`, the paper's "no gate", it is only logged |
| GRPO's loss, clip ratio 0.2 | `signals.policy_gradient`, `clip` |
| the launcher of the released code | `form="released"`: `perplexity_gate.gated_ascent` |

Self-distillation, A^seq + lambda u, rewards tokens that the solution makes likelier and punishes "wait" and "maybe".
Here the sign is reversed, and phi bounds a token's gain by (log 2) / 2. Sums of u over a response telescope to
log p(c | x, y) - log p(c | x) (Lemma 3).

The released form is another method in some respects (`pieces/perplexity_gate.py`). It standardises the term within each
response, which undoes the bound and leaves only differences between a response's tokens. The gate follows the teacher's
perplexity X, and opens again at 1.07 of its median in the warm-up; with `gate=False` it never closes after that. c is a
right peer's response alone (`solution="by_form"`).

Differs from the paper: it does not specify how H_warm follows from the five steps' medians (here: their mean), the
gate's first state (here: open), or the line breaks of the context. The solution is never the response itself. A
response without a solution, from a right peer or the data, has only A^seq and is counted (`context/unsolved`). The
solution is not cut behind its last box, as the released code does; the order of peers is cyclic, not random.
"""

from functools import partial
from typing import Literal

from opd.method import Method
from opd.pieces import contexts, credit, gates, normalise, perplexity_gate, signals, solutions, teacher_rules
from opd.types import Average


def anti_sd(
    strength: float = 0.5,
    gate: bool = True,
    closes_below: float = 0.93,
    warm_up: int = 5,
    shape: Literal["jsd", "reverse_kl"] = "jsd",
    solution: Literal["by_form", "privileged_context", "answer"] | None = "by_form",
    template: str | None = None,
    clip: float = 0.2,
    average: Average = "sequence",
    temperature: float = 1.0,
    allow_sign_conflict: bool = False,
    form: Literal["paper", "released"] = "paper",
) -> Method:
    """GRPO with a bounded move away from the solution-reading self.

    `solution` names the column of the data for responses without a right peer: by_form is `privileged_context` in the
    paper's form and none in the released one.
    """
    by_form = "privileged_context" if form == "paper" else None
    found = solutions.from_peers(by_form if solution == "by_form" else solution)
    gated_ascent = gates.gated_ascent if form == "paper" else perplexity_gate.gated_ascent
    ascent = partial(credit.diverge_from_teacher, found=found, shape=shape, allow_sign_conflict=allow_sign_conflict)
    memory, away = gated_ascent(found, ascent, strength, closes_below=closes_below, warm_up=warm_up, closes=gate)
    return Method(
        context=contexts.informed("verified" if template is None else None, template=template, solutions=found),
        teacher=teacher_rules.self_live(),
        memory={"unsolved": solutions.counted(found), "gate": memory},
        credit=credit.add(credit.group_reward(), away),
        signal=signals.policy_gradient(signals.credit, clip=(clip, clip)),
        normalise=normalise.per(average),
        temperature=temperature,
    )
