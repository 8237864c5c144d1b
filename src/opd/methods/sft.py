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

from opd import normalise, signals, sources, supports, teachers
from opd.method import Method


def sft(source: Literal["dataset", "teacher"] = "dataset") -> Method:
    """Learn given responses token by token: `source` is the data's `response` column, or the stage's teacher."""
    return Method(
        source=sources.dataset() if source == "dataset" else sources.teacher_writes(),
        teacher=teachers.no_teacher(),
        support=supports.no_support(),
        signal=signals.nll(),
        normalise=normalise.per_token(),
    )
