"""Losses that only studies use, named in their recipes as `opd.studies.methods:NAME`."""

from __future__ import annotations

from torch import Tensor

from opd.method import Method
from opd.types import Tokens


def differentiated_log_ratio() -> Method:
    """log p(y_t) - log q(y_t), differentiated: its expected gradient is zero (arXiv 2605.11182 Fig. 12)."""

    def signal(tokens: Tokens) -> Tensor:
        return tokens.student_logp - tokens.teacher_logp

    return Method(signal=signal)
