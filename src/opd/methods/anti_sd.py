"""Anti-self-distillation: towards the reward, and away from the same model reading the solution.

Shen et al., "Anti-Self-Distillation for Reasoning RL via Pointwise Mutual Information", arXiv 2605.11609, eq. 2 and
4-7, Algorithm 1, App. B and C.

    u_t     = log p(y_t | x, c, y_<t) - log p(y_t | x, y_<t)        pointwise mutual information of y_t and c
    phi(u)  = (softplus(u) - log 2) / 2
    A_{i,t} = (R_i - mean R) / std R - lambda sg[phi(u_{i,t})],     lambda = g lambda_max
    g       = 0 if H < 0.93 H_warm, 1 if H >= H_warm, else as it was

| paper | here |
|---|---|
| pi_S, pi_T | p, the student, and q, the student that also reads c (`teacher_rules.self_live`) |
| c: a right response of the group, else the data's solution, and the verdict | `contexts.INFORMATION`, `solution` |
| A^seq | `credit.group_reward` |
| -phi(u), ascent of JSD; -u, ascent of KL(p || q) | `credit.diverge_from_teacher`, `shape` |
| lambda_max, W, 0.93 | `strength`, `warm_up`, `closes_below` |
| g, H, H_warm | `gates.EntropyGate`; with `gate=False`, the paper's "no gate", it is only logged |
| GRPO's loss, clip ratio 0.2 | `signals.policy_gradient`, `clip` |

Self-distillation, A^seq + lambda u, rewards tokens that the solution makes likelier and punishes "wait" and "maybe".
Here the sign is reversed, and phi bounds a token's gain by (log 2) / 2. Sums of u over a response telescope to
log p(c | x, y) - log p(c | x) (Lemma 3).

Differs from the paper: it does not specify how H_warm follows from the five steps' medians (here: their mean), the
gate's first state (here: open), or the line breaks of the context. The solution is never the response itself. A
response without a solution, from a right peer or the data, has only A^seq and is counted (`context/unsolved`). The
released code was not read; it reportedly gates on perplexity, with intermediate lambdas.
"""

from typing import Literal

from opd.method import Method
from opd.pieces import contexts, credit, gates, normalise, signals, solutions, teacher_rules
from opd.types import Average


def anti_sd(
    strength: float = 0.5,
    gate: bool = True,
    closes_below: float = 0.93,
    warm_up: int = 5,
    shape: Literal["jsd", "reverse_kl"] = "jsd",
    solution: Literal["privileged_context", "answer"] | None = "privileged_context",
    template: str | None = None,
    clip: float = 0.2,
    average: Average = "sequence",
    temperature: float = 1.0,
    allow_sign_conflict: bool = False,
) -> Method:
    """GRPO with a bounded move away from the solution-reading self; `solution` names the fallback column."""
    words = contexts.INFORMATION["verified"]["template"] if template is None else template
    found = solutions.from_peers(solution)
    ascent = credit.diverge_from_teacher(strength, found, shape=shape, allow_sign_conflict=allow_sign_conflict)
    return Method(
        context=contexts.privileged(template=words, solutions=found),
        teacher=teacher_rules.self_live(),
        memory={
            "unsolved": solutions.counted(found),
            "gate": gates.entropy_gate(found, closes_below=closes_below, warm_up=warm_up),
        },
        credit=credit.add(credit.group_reward(), credit.scale(gates.factor, ascent) if gate else ascent),
        signal=signals.policy_gradient(signals.credit, clip=(clip, clip)),
        normalise=normalise.per(average),
        temperature=temperature,
    )
