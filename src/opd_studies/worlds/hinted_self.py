"""The tables of `wrong_habits` with another teacher: the student's moving average, which reads a hint.

In a table a moving average of the weights is one of the logits. The hint names a token for each prefix of the right
response, and adds `BONUS` to its logit: the right token, or at some prefixes the next one of the alphabet, which is
wrong. At all other prefixes the hint says nothing, and the teacher differs from the student only by its lag.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from opd_studies.worlds.wrong_habits import LETTERS, PROMPTS, World

BONUS = 2.0  # of the hinted token's logit, in nats


@dataclass(frozen=True, slots=True, kw_only=True)
class HintedSelf:
    """A `wrong_habits.Tutor`: the share of hinted tokens that are wrong, and the decay of the moving average."""

    wrong: float
    decay: float

    def __call__(self, given: World, z: Tensor, generator: torch.Generator) -> Callable[[Tensor], Tensor]:
        """The teacher of a student that begins with the logits z, [X, prefixes, LETTERS]."""
        bonus, mean = self.bonus(given, generator), z

        def scores(z: Tensor) -> Tensor:
            nonlocal mean
            mean = mean.lerp(z, 1.0 - self.decay)
            return (mean + bonus).log_softmax(-1)

        return scores

    def bonus(self, given: World, generator: torch.Generator) -> Tensor:
        """What the hint adds to the logits, [X, prefixes, LETTERS]."""
        misled = torch.rand(given.right.shape, generator=generator) < self.wrong
        named = (given.right + misled) % LETTERS
        bonus = torch.zeros_like(given.teacher)
        bonus[torch.arange(PROMPTS)[:, None], given.prefixes, named] = BONUS
        return bonus
