"""Supervised fine-tuning, and sequence-level distillation when the teacher writes the responses.

Kim and Rush, "Sequence-Level Knowledge Distillation", arXiv 1606.07947, eq. 7 (teacher's responses).

    L = -(1/N) sum_t log p(y_t | x, y_<t)          y from the data, or y ~ q(. | x)

| paper | here |
|---|---|
| y in the corpus; y-hat from the teacher | `source`: dataset, teacher |
| p(y_t \\| x, y_<t) | `student_logp` |

Differs from the paper: the teacher's responses are sampled by `teacher_sampling`, where the paper uses beam search.
"""

from typing import Literal

from opd import contexts, credit, normalise, signals, sources, supports, teachers, updates, weights
from opd.types import Method


def sft(source: Literal["dataset", "teacher"] = "dataset") -> Method:
    """Learn given responses token by token: `source` is the data's `response` column, or the stage's teacher."""
    return Method(
        source=sources.dataset() if source == "dataset" else sources.teacher_writes(),
        context=contexts.same_prompt(),
        teacher=teachers.no_teacher(),
        support=supports.no_support(),
        credit=credit.no_credit(),
        weight=weights.every_token(),
        signal=signals.nll(),
        normalise=normalise.per_token(),
        update=updates.optimizer_step(),
    )
