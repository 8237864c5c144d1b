"""OPSD: the student learns from its own first weights, which read the reference solution.

Zhao et al., "Self-Distilled Reasoner: On-Policy Self-Distillation for Large Language Models", arXiv 2601.18734; the
released code siyan-zhao/OPSD.

    q = p_0(. | x, y*, y_<t),   p_0: the student before training,   m = beta q + (1 - beta) p
    L = (1/N) sum_t sum_v min(tau, beta q_v log(q_v / m_v) + (1 - beta) p_v log(p_v / m_v)),        y ~ p(. | x)

| paper | here |
|---|---|
| y*, the verified solution with its reasoning | the data's `privileged_context` |
| p_T, fixed to the initial policy | `teacher="frozen"`; with LoRA the model without its adapter |
| p_T, live (Algorithm 1) or a moving average (run_opsd_ema.sh, .999) | `teacher="live"`; `"ema"`, `decay` |
| beta, 0.5 in run_opsd.sh | `beta`; 0 is KL(q||p), 1 is KL(p||q) |
| tau, `jsd_token_clip`, 0.05 with beta = 0 in later scripts | `clip`; None: no bound |
| top_k_loss (run_opsd_topkloss.sh) | `k`: the teacher's k most likely tokens, and the rest as one |

Direction: towards the self-teacher, without gradient through q. The bound is on the contribution of one entry v of the
vocabulary: an entry above it has no gradient, so that a few tokens of style do not rule the sum. With a bound the value
may be negative where beta is 0 or 1. Nothing is renormalised: the whole vocabulary, or `tail`. The mean is over all
tokens of the step.

A different y* for every prompt cannot be internalised as a rule can (`context_distillation`, study `privileged`).

Differs from the paper: the template's wording is ours; the teacher reads y* in the student's chat template, while the
released code renders the two prompts differently. Its sampling is temperature 1.1 or 1.2, top-p 0.95 and top-k 20:
set `sampling`. Its option to let the teacher first explain the solution is not here.
"""

from typing import Literal

from opd.method import Method
from opd.pieces import contexts, normalise, signals, supports, teacher_rules
from opd.types import Average


def opsd(
    beta: float = 0.5,
    clip: float | None = None,
    k: int | None = None,
    teacher: Literal["frozen", "live", "ema"] = "frozen",
    decay: float = 0.999,
    template: str | None = None,
    average: Average = "token",
    temperature: float = 1.0,
) -> Method:
    """Distillation from the initial self that reads a solution; `template` shows it as {privileged_context}."""
    return Method(
        context=contexts.privileged(template=template or contexts.SELF_TAUGHT["opsd"]),
        teacher=teacher_rules.self_taught(teacher, decay),
        support=supports.full() if k is None else supports.top_k(k, by="teacher"),
        signal=signals.jsd_and_limits(beta, most=clip),
        normalise=normalise.per(average),
        temperature=temperature,
    )
