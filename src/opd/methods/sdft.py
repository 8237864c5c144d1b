"""SDFT: on-policy fine-tuning on demonstrations, which the student's moving average reads.

Shenfeld et al., "Self-Distillation Enables Continual Learning", arXiv 2601.19897, eq. 1 and Algorithm 1; the released
code idanshen/Self-Distillation, also in TRL (`trl.experimental.sdft`).

    q = p_ema(. | x, c, y_<t),   phi <- alpha theta + (1 - alpha) phi        after each step
    L = (1/B) sum_i (1/T_i) sum_t KL(q || p),        y ~ p(. | x)

| paper | here |
|---|---|
| c, a demonstration: a response of an expert | the data's `privileged_context` |
| phi, alpha = 0.01 | `teacher_rules.self_ema`, 1 - `decay` |
| KL(p || q), eq. 1 | `beta=1` |
| KL(q || p), which produced the paper's results | `beta=0`, the default of the released code |
| analytic per-token estimator | the whole vocabulary; `k`: the teacher's k most likely tokens and the rest as one |

Direction: towards the self-teacher, without gradient through q. Unlike supervised fine-tuning on c, the student's own
responses are trained, and tokens that it would not write are not forced. What it learns is bounded by what the model
does with c in its prompt. Nothing is renormalised: the whole vocabulary, or `tail`.

The paper states KL(p || q). Its authors found that the released code, and all results, have KL(q || p) per token on the
student's responses (issue 5 of the repository); so it is the default here. Values of `beta` between are the
generalised JSD.

Differs from the paper: all tokens are trained; the released code leaves the first three of a response out, and weighs
by a truncated importance ratio between its sampler and its trainer, which are one model here. TRL's teacher is frozen
by default: `decay=1`.
"""

from opd.method import Method
from opd.pieces import contexts, normalise, signals, supports, teacher_rules
from opd.types import Average


def sdft(
    beta: float = 0.0,
    k: int | None = None,
    decay: float = 0.99,
    template: str | None = None,
    average: Average = "sequence",
    temperature: float = 1.0,
) -> Method:
    """Distillation from a moving average that reads a demonstration; `template` shows it as {privileged_context}."""
    return Method(
        context=contexts.privileged(template=template or contexts.SELF_TAUGHT["sdft"]),
        teacher=teacher_rules.self_ema(decay),
        support=supports.full() if k is None else supports.top_k(k, by="teacher"),
        signal=signals.jsd_and_limits(beta),
        normalise=normalise.per(average),
        temperature=temperature,
    )
