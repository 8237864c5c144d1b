"""Methods for studies only, as `opd_studies.worlds.methods:NAME` in their recipes."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from opd.method import Method
from opd.methods.anti_sd import anti_sd
from opd.pieces import credit, normalise, signals
from opd.types import Tokens


def differentiated_log_ratio() -> Method:
    """log p(y_t) - log q(y_t), differentiated: its expected gradient is zero (arXiv 2605.11182 Fig. 12)."""

    def signal(tokens: Tokens) -> Tensor:
        return tokens.student_logp - tokens.teacher_logp

    return Method(signal=signal)


def self_distillation(strength: float = 0.5, template: str | None = None) -> Method:
    """The reward plus `strength` times the log-ratio to the self that reads the solution: arXiv 2605.11609 eq. 2.

    delta = +u, the opposite sign of `anti_sd`; the gate only observes.
    """
    turned = anti_sd(strength, gate=False, template=template)
    towards = credit.scale(strength, credit.discounted(0.0))
    return replace(turned, credit=credit.add(credit.group_reward(), towards))


def opd_with_reward(weight: float = 1.0) -> Method:
    """The teacher's log-ratio plus `weight` times GRPO's advantage, in the loss of `uni_opd`: its shift's control."""
    return Method(
        credit=credit.add(credit.discounted(0.0), credit.scale(weight, credit.group_reward())),
        signal=signals.policy_gradient(signals.credit, clip=(0.2, 0.28)),
        normalise=normalise.per("sequence"),
    )
