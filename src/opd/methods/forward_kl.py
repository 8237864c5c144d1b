"""The exact forward KL on the teacher's responses: a bridge before on-policy distillation.

"Sparse-to-Dense", arXiv 2605.12483, stage 2a; the losses are those of HJSang/OPSD_OnPolicyDistillation.

    stage 1    GRPO on the teacher with labels L1
    stage 2a   L = (1/N) sum_t KL(q(. | x, y_<t) || p(. | x, y_<t)),   y ~ q        this method
    stage 2b   L = (1/N) sum_t KL(p(. | x, y_<t) || q(. | x, y_<t)),   y ~ p        `reverse_kl`
    stage 3    GRPO on the student with held-out labels L2
    J_0 = E_{y ~ p} sum_t beta log q(y_t) + beta H(p) = -beta KL(p || q): stage 2b is the dense end of the reward

| paper | here |
|---|---|
| pi_T, pi_theta | q, the teacher; p, the student |
| teacher rollouts | `source="teacher"`, sampled by `teacher_sampling` of the recipe |
| the four stages | `recipes/sparse_to_dense.yaml` |
| L1 and L2 | two stages' `data`; `apart_from` refuses rows that they share |
| token mean | `average` |

The gradient with respect to the logits is p - q at every prefix of the teacher's responses. A student with no mass on
the teacher's tokens gets a signal there, which sampled on-policy losses do not give. `source="student"` compares on
the student's own responses, as `gkd(beta=0)` does; `source="dataset"` on the data's, for responses that are cached.

Differs from the paper: the teacher writes its responses in the step that trains on them, each prompt's once.
"""

from typing import Literal

from opd.method import Method
from opd.pieces import normalise, signals, sources, supports
from opd.types import Average


def forward_kl(
    source: Literal["teacher", "student", "dataset"] = "teacher",
    average: Average = "token",
    temperature: float = 1.0,
) -> Method:
    """KL(teacher || student) on the whole vocabulary; `source` writes the responses."""
    writers = {"teacher": sources.teacher_writes, "student": sources.on_policy, "dataset": sources.dataset}
    return Method(
        source=writers[source](),
        support=supports.full(),
        signal=signals.divergence("forward_kl"),
        normalise=normalise.per(average),
        temperature=temperature,
    )
