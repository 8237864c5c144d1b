"""Gates: whether a term of the credit takes part in this step, decided by what was seen so far.

Method(memory={"gate": entropy_gate(solutions, closes_below=0.93, warm_up=5)}, credit=credit.scale(factor, term))
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor

from opd.errors import ConfigError
from opd.pieces.memory import SavedAttributes, recalled
from opd.pieces.needs import Input, Reads, needing
from opd.pieces.packed import valid
from opd.pieces.solutions import Solutions, solved
from opd.types import Batch, Gather, MakeMemory


class EntropyGate(SavedAttributes):
    """g: 1 while the teacher is as unsure as it was at the beginning, else 0 (arXiv 2605.11609 eq. 7).

    H is the median of the teacher's entropy, in nats, over the step's trained tokens in all processes (of an even
    number the lower of the two in the middle), responses without a solution left out. In the first `warm_up` steps g is
    0, and the mean of their H is H_warm. Afterwards the gate closes at H < closes_below H_warm, opens at H >= H_warm,
    and else stays as it is; it begins open. A step without a solution has no H and does not count.
    """

    saved = ("total", "measured", "open")

    def __init__(self, solutions: Solutions, *, closes_below: float, warm_up: int) -> None:
        self.solutions, self.closes_below, self.warm_up = solutions, closes_below, warm_up
        self.total, self.measured = 0.0, 0  # H in the warm-up, all in all; steps that had one
        self.open = True

    def factor(self) -> float:
        """g of the step that was observed last."""
        return float(self.open and self.measured > self.warm_up)

    def observe(self, batch: Batch, gather: Gather) -> Mapping[str, float]:
        """Learn this step's H; metrics."""
        assert batch.teacher_entropy is not None
        rows = solved(self.solutions, batch)[:, None]
        parts: list[Tensor] = gather(valid(batch.teacher_entropy, batch.mask & rows).cpu())
        metrics: dict[str, float] = {}
        if len(entropies := torch.cat(parts)):  # [N]
            metrics["gate/teacher_entropy"] = median = entropies.median().item()
            metrics["gate/warm_entropy"] = self._learn(median)
        return metrics | {"gate/open": self.factor()}

    def _learn(self, median: float) -> float:
        """H_warm, as far as it is known."""
        self.measured += 1
        if self.measured <= self.warm_up:
            self.total += median
            return self.total / self.measured
        warm = self.total / self.warm_up
        self.open = median >= warm or (self.open and median >= self.closes_below * warm)
        return warm


def entropy_gate(solutions: Solutions, *, closes_below: float, warm_up: int) -> MakeMemory:
    """A maker of `EntropyGate`.

    Raises ConfigError for a `closes_below` that is not above 0 and at most 1, and for a warm-up of less than a step.
    """
    if not 0 < closes_below <= 1 or warm_up < 1:
        raise ConfigError(
            "A gate closes below a share of the first entropy that is above 0 and at most 1, and warms up for at "
            f"least one step; got closes_below {closes_below} and warm_up {warm_up}."
        )
    made = partial(EntropyGate, solutions, closes_below=closes_below, warm_up=warm_up)
    return needing(made, Reads.TEACHER_ENTROPY, Input.REWARD, Input.GROUP)


def factor(batch: Batch) -> float:
    """g of the batch's step, of the memory `gate`. Raises ConfigError where the method has none."""
    return recalled(batch.memory, "gate", EntropyGate).factor()
