"""Methods for studies only, as `opd_studies.worlds.methods:NAME` in their recipes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from opd.method import Method
from opd.methods.anti_sd import anti_sd
from opd.methods.mad_opd import mad_opd
from opd.pieces import credit, debate, normalise, signals
from opd.pieces.needs import Piece, needs_of
from opd.types import Context, Prompt, Rollout, Tokens


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


def shuffled_debate(
    beta: float = 1.0, opening: str = "", reply: str = "", reads: str = "", turn: str = "", tag: str = ""
) -> Method:
    """`mad_opd`, but the teachers read the debate of the step's next prompt: as many tokens, and nothing about x."""
    method = mad_opd(beta=beta, opening=opening, reply=reply, reads=reads, turn=turn, tag=tag)

    def context(rollouts: Sequence[Rollout]) -> list[Prompt]:
        debates = [
            rollout.prompt.metadata[debate.NAME] for rollout in rollouts if debate.NAME in rollout.prompt.metadata
        ]
        if not debates:  # held-out prompts
            return method.context(rollouts)
        others = [*debates[1:], debates[0]]
        return method.context([_with_debate(rollout, other) for rollout, other in zip(rollouts, others, strict=True)])

    return replace(method, context=_like(method.context, context))


def one_reader(
    reader: str = "l",
    beta: float = 1.0,
    opening: str = "",
    reply: str = "",
    reads: str = "",
    turn: str = "",
    tag: str = "",
) -> Method:
    """`mad_opd`, but after the debate only one of the teachers scores the responses."""
    method = mad_opd(beta=beta, opening=opening, reply=reply, reads=reads, turn=turn, tag=tag)

    def context(rollouts: Sequence[Rollout]) -> list[Prompt]:
        return [replace(prompt, teacher_weights={reader: 1.0}) for prompt in method.context(rollouts)]

    return replace(method, context=_like(method.context, context))


def _with_debate(rollout: Rollout, other: Any) -> Rollout:
    return replace(rollout, prompt=replace(rollout.prompt, metadata={**rollout.prompt.metadata, debate.NAME: other}))


def _like(piece: Context, changed: Context) -> Context:
    return Piece(changed, needs_of(piece))
