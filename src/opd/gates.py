"""Gates: how strong a term of the credit is in this step, decided by what was seen so far."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from opd.errors import ConfigError
from opd.packed import valid
from opd.remembered import Remembered
from opd.solutions import Solutions
from opd.types import Batch, Gather


class EntropyGate:
    """`most` while the teacher is as unsure as it was at the beginning, else 0 (arXiv 2605.11609 eq. 7).

    H is the median of the teacher's entropy, in nats, over the step's trained tokens in all processes (of an even
    number the lower of the two in the middle), responses without a solution left out. The first `warm_up` steps have
    strength 0, and the mean of their H is H_warm. Afterwards the gate closes at H < closes_below H_warm, opens at H >=
    H_warm, and else stays as it is; it begins open. A step without a solution has no H: the gate stays, and no warm-up
    step is counted. With `closes_below` None it is open from the first step on.

    It is an `Observe`, and has a memory. Raises ConfigError for a negative strength, a `closes_below` that is not
    above 0 and at most 1, and a warm-up of less than a step.
    """

    def __init__(self, most: float, solutions: Solutions, *, closes_below: float | None, warm_up: int) -> None:
        if not 0 <= most < float("inf") or not (closes_below is None or 0 < closes_below <= 1) or warm_up < 1:
            raise ConfigError(
                "A gate has a strength that is not negative, closes below a share of the first entropy that is above 0 "
                f"and at most 1, and warms up for at least one step; got strength {most}, closes_below {closes_below} "
                f"and warm_up {warm_up}."
            )
        self.most, self.solutions, self.closes_below, self.warm_up = most, solutions, closes_below, warm_up
        self.needs = frozenset({"teacher_entropy", "reward", "group"})  # see `needs.needing`
        self.total, self.measured = 0.0, 0  # of the H of the warm-up
        self.open = True
        self._now = most if closes_below is None else 0.0

    def memory(self) -> Remembered:
        """Its `State`."""
        return Remembered(self, ("total", "measured", "open"))

    def strength(self) -> float:
        """Of the term in the step that was observed last."""
        return self._now

    def __call__(self, batch: Batch, gather: Gather) -> Mapping[str, float]:
        """Learn this step's H; metrics."""
        assert batch.teacher_entropy is not None
        solved = [solution is not None for solution in self.solutions(batch.rollouts)]
        rows = torch.tensor(solved, device=batch.mask.device)
        mine = valid(batch.teacher_entropy, batch.mask & rows[:, None]).cpu()
        parts: list[tuple[Tensor, int]] = gather((mine, solved.count(False)))
        entropies = torch.cat([part for part, _ in parts])  # [N]
        warming = self.closes_below is not None and self.measured < self.warm_up
        metrics: dict[str, float] = {"gate/unsolved": float(sum(count for _, count in parts))}
        if len(entropies):
            metrics["gate/teacher_entropy"] = median = entropies.median().item()
            self._learn(median)
        self._now = 0.0 if warming or not self.open else self.most
        if self.measured:
            metrics["gate/warm_entropy"] = self.total / self.measured
        return metrics | {"gate/open": float(self.open), "gate/strength": self._now}

    def _learn(self, median: float) -> None:
        if self.measured < self.warm_up:
            self.total, self.measured = self.total + median, self.measured + 1
        elif self.closes_below is not None:
            warm = self.total / self.measured
            self.open = median >= warm or (self.open and median >= self.closes_below * warm)
