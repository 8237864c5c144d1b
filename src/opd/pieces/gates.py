"""Gates: switch a term of the credit on or off in a step, from measurements of the steps so far.

Method(memory={"gate": entropy_gate(solutions, closes_below=0.93, warm_up=5)}, credit=credit.scale(factor, term))
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING

from opd.errors import ConfigError
from opd.pieces import credit
from opd.pieces.memory import SavedAttributes, recalled
from opd.pieces.needs import Input, Reads, needing
from opd.pieces.packed import valid
from opd.pieces.solutions import Solutions, solved
from opd.plugins import torch
from opd.types import Batch, Credit, Gather, MakeMemory

if TYPE_CHECKING:
    from torch import Tensor


class EntropyGate(SavedAttributes):
    """g: 1 while the teacher's entropy is as high as at the beginning, else 0 (arXiv 2605.11609 eq. 7).

    H is the median of the teacher's entropy, in nats, over the step's trained tokens in all processes (of an even
    number, the lower of the two middle values), without responses that have no solution. In the first `warm_up` steps g
    is 0, and H_warm is the mean of their H. Afterwards the gate closes at H < closes_below H_warm, opens at H >=
    H_warm, and otherwise keeps its state; it begins open. A step without a solution has no H and is not counted.
    """

    saved = ("total", "measured", "open")

    def __init__(self, solutions: Solutions, *, closes_below: float, warm_up: int) -> None:
        self.solutions, self.closes_below, self.warm_up = solutions, closes_below, warm_up
        self.total, self.measured = 0.0, 0  # sum of H in the warm-up; steps with an H
        self.open = True

    def factor(self) -> float:
        """g of the last observed step."""
        return float(self.open and self.measured > self.warm_up)

    def observe(self, batch: Batch, gather: Gather) -> Mapping[str, float]:
        """Update the gate with this step's H; metrics."""
        assert batch.teacher_entropy is not None
        rows = solved(self.solutions, batch)[:, None]
        parts: list[Tensor] = gather(valid(batch.teacher_entropy, batch.mask & rows).cpu())
        metrics: dict[str, float] = {}
        if len(entropies := torch.cat(parts)):  # [N]
            metrics["gate/teacher_entropy"] = median = entropies.median().item()
            metrics["gate/warm_entropy"] = self._learn(median)
        return metrics | {"gate/open": self.factor()}

    def _learn(self, median: float) -> float:
        """Update from H = `median`; returns H_warm, in the warm-up the mean so far."""
        self.measured += 1
        if self.measured <= self.warm_up:
            self.total += median
            return self.total / self.measured
        warm = self.total / self.warm_up
        self.open = median >= warm or (self.open and median >= self.closes_below * warm)
        return warm


def entropy_gate(solutions: Solutions, *, closes_below: float, warm_up: int) -> MakeMemory:
    """A maker of `EntropyGate`.

    Raises ConfigError unless 0 < closes_below <= 1 and warm_up >= 1.
    """
    if not 0 < closes_below <= 1 or warm_up < 1:
        raise ConfigError(
            "A gate needs closes_below above 0 and at most 1, and warm_up of at least 1 step; "
            f"got closes_below {closes_below} and warm_up {warm_up}."
        )
    made = partial(EntropyGate, solutions, closes_below=closes_below, warm_up=warm_up)
    return needing(made, Reads.TEACHER_ENTROPY, Input.REWARD, Input.GROUP)


def factor(batch: Batch) -> float:
    """g of the batch's step, from the memory `gate`. Raises ConfigError if the method has no such memory."""
    return recalled(batch.memory, "gate", EntropyGate).factor()


def gated_ascent(
    found: Solutions, ascent: Callable[..., Credit], strength: float, *, closes_below: float, warm_up: int, closes: bool
) -> tuple[MakeMemory, Credit]:
    """The maker of the memory `gate`, and g ascent(strength); without `closes` g is only logged.

    `ascent` is `credit.diverge_from_teacher` with its other arguments. Raises ConfigError as `entropy_gate` and it.
    """
    memory = entropy_gate(found, closes_below=closes_below, warm_up=warm_up)
    return memory, credit.scale(factor, ascent(strength)) if closes else ascent(strength)
