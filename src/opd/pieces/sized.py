"""An advantage whose direction a reward gives and whose size a teacher gives (arXiv 2605.06094).

    D_t = log q~(y_t) - log p~(y_t),   q~ and p~ renormalised on the teacher's top k and y_t
    m_t = clip(exp(sign(A) D_t), 1 - bound, 1 + bound)
    A_t = A ((1 - l) + l m_t)

m_t > 0, so A_t has the sign of A. Where A > 0, m_t is larger on tokens that the teacher prefers; where A < 0, on tokens
that it disfavours. D is not the log-ratio on the whole vocabulary: renormalising moves it by log P_S - log Q_S, and can
turn its sign.

The credit has two numbers per token, A and l, [B, T, 2]; the signal reads both.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING

from opd.errors import ConfigError
from opd.pieces.memory import SavedAttributes, recalled
from opd.pieces.needs import Piece, Trait, needing, needs_of
from opd.pieces.packed import support_of
from opd.pieces.signals import MeasuredPiece, policy_gradient
from opd.pieces.solutions import Solutions, solved
from opd.plugins import torch
from opd.types import Batch, Credit, Gather, MakeMemory, Tokens

if TYPE_CHECKING:
    from torch import Tensor


class Fading(SavedAttributes):
    """l: `share` in the first step, falling in a line to 0 after `steps` steps. Logs size/share.

    l_s = share (steps - (s - 1)) / steps in step s = 1, 2, ...
    """

    saved = ("step",)

    def __init__(self, share: float, steps: int) -> None:
        self.share, self.steps = share, steps
        self.step = 0  # steps so far, with the observed one

    def now(self) -> float:
        """l of the last observed step; before any, that of the first."""
        return self.share * max(0, self.steps - max(0, self.step - 1)) / self.steps

    def observe(self, batch: Batch, gather: Gather) -> Mapping[str, float]:
        """Count the step; the metric."""
        self.step += 1
        return {"size/share": self.now()}


def fading(share: float, steps: int) -> MakeMemory:
    """A maker of `Fading`. Raises ConfigError unless 0 <= share <= 1 and steps >= 1."""
    if not 0.0 <= share <= 1.0 or steps < 1:
        raise ConfigError(
            "The share of the advantage that the teacher sizes lies between 0 and 1, and fades in at least 1 step; got "
            f"share {share} and {steps} steps."
        )
    return needing(partial(Fading, share, steps))


def with_share(direction: Credit, found: Solutions) -> Credit:
    """A of `direction` and l of the memory `size`, [B, T, 2].

    l is 0 in a response without a solution (`found`): its teacher read only the student's prompt, so A stays as it is.
    """

    def credit(batch: Batch) -> Tensor:
        advantage = direction(batch)
        share = recalled(batch.memory, "size", Fading).now() * solved(found, batch).to(advantage.dtype)
        return torch.stack([advantage, share[:, None].expand(advantage.shape)], -1)

    return Piece(credit, needs_of(direction))


def log_ratio_on_support(tokens: Tokens) -> Tensor:
    """D = log q~(y) - log p~(y), [N], detached: both models renormalised on the support, which holds y."""
    student, teacher = (part.detach() for part in support_of(tokens))
    exists = tokens.support_mask
    if exists is not None:
        student, teacher = (part.masked_fill(~exists, -torch.inf) for part in (student, teacher))
    of_student = tokens.student_logp.detach() - student.logsumexp(-1)
    return tokens.teacher_logp - teacher.logsumexp(-1) - of_student


def sized_by_teacher(bound: float, clip: tuple[float, float]) -> MeasuredPiece:
    """The clipped policy gradient of A ((1 - l) + l m), with A and l from `with_share`.

    A `bound` from 1 on leaves only the upper one, because exp is positive. Logs size/active_share, the share of tokens
    with l > 0 and A != 0, and of these size/clipped_share, the share with m at a bound: near 1 the teacher gives a
    sign, not a size. Raises ConfigError for a bound that is not positive and finite.
    """
    if not 0.0 < bound < math.inf:
        raise ConfigError(f"`bound`, the largest distance of a size from 1, must be above 0 and finite, got {bound}.")

    def unbounded(tokens: Tokens) -> Tensor:
        return (tokens.advantage[:, 0].sign() * log_ratio_on_support(tokens)).exp()

    def advantage(tokens: Tokens) -> Tensor:
        direction, share = tokens.advantage.unbind(-1)
        return direction * (1.0 + share * (unbounded(tokens).clamp(1.0 - bound, 1.0 + bound) - 1.0))

    def measure(tokens: Tokens) -> dict[str, Tensor]:
        active = (tokens.advantage != 0.0).all(-1)
        outside = (unbounded(tokens) - 1.0).abs() >= bound if bound < 1.0 else unbounded(tokens) >= 1.0 + bound
        return {"size/active_share": active.float(), "size/clipped_share": outside[active].float()}

    signal = policy_gradient(needing(advantage, Trait.SAMPLED_TOKEN_LAST), clip=clip)
    return MeasuredPiece(signal, needs_of(signal), measure=measure)
