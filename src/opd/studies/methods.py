"""Losses that only studies use, named in their recipes as `opd.studies.methods:NAME`."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from opd import signals, supports
from opd.method import Method
from opd.types import Tokens


def differentiated_log_ratio() -> Method:
    """log p(y_t) - log q(y_t), differentiated: its expected gradient is zero (arXiv 2605.11182 Fig. 12)."""

    def signal(tokens: Tokens) -> Tensor:
        return tokens.student_logp - tokens.teacher_logp

    return Method(signal=signal)


def released_code(
    k: int = 16,
    by: Literal["teacher", "student", "intersection", "union", "symmetric_difference"] = "teacher",
) -> Method:
    """The released code of arXiv 2604.13016 (`signals.support_policy_gradient`) on any support.

    Its own default is the student's; the teacher's makes it comparable with other forms on the teacher's.
    """
    return Method(support=supports.top_k(k, by=by), signal=signals.support_policy_gradient())
