"""Verified solutions that a teacher may read: from other responses to the same prompt, else from the data. Pure.

The context that shows a solution, the gate on the teacher's entropy and the credit from the teacher's scores use the
same function of the rollouts, so that they agree on which responses have a solution.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, TypeAlias

from opd.pieces.filters import PASS
from opd.pieces.memory import SavedAttributes
from opd.pieces.needs import Input, Trait, needing, needs_of
from opd.plugins import torch
from opd.types import Batch, Filter, Gather, MakeMemory, Rollout

if TYPE_CHECKING:
    from torch import Tensor

Solutions: TypeAlias = Callable[[Sequence[Rollout]], list[str | None]]  # one per rollout, None without a solution


def from_peers(column: str | None = "privileged_context") -> Solutions:
    """Another right response to the same prompt; without one, the value of the data's `column`, if any.

    Right: a reward of at least `filters.PASS`. Of several, the next right sample in order, cyclically; samples are
    exchangeable, so this is as good as a random choice. Never the response itself, nor its copy if a step takes a
    prompt twice: a teacher that reads the response that it scores would copy it (the paper does not say). A response
    without a reward, because its judge failed, has no solution: there is no verdict to show.
    """

    def solutions(rollouts: Sequence[Rollout]) -> list[str | None]:
        groups: dict[int, list[Rollout]] = {}
        for rollout in sorted(rollouts, key=lambda one: one.sample):
            groups.setdefault(rollout.prompt.id, []).append(rollout)
        found = [_peer(rollout, groups[rollout.prompt.id]) for rollout in rollouts]
        return [_given(r, column) if peer is None else peer for r, peer in zip(rollouts, found, strict=True)]

    return solutions


def from_column(column: str) -> Solutions:
    """The data's `column`; None in a row without a value."""

    def solutions(rollouts: Sequence[Rollout]) -> list[str | None]:
        return [_given(rollout, column) for rollout in rollouts]

    return solutions


def from_feedback() -> Solutions:
    """A judge's text about the response, `Rollout.feedback` of the reward `feedback`; None where the judge failed."""

    def solutions(rollouts: Sequence[Rollout]) -> list[str | None]:
        return [rollout.feedback for rollout in rollouts]

    return needing(solutions, Input.FEEDBACK)


def first_of(*found: Solutions) -> Solutions:
    """For each response the first text that one of several gives, in their order; None if none gives any."""

    def solutions(rollouts: Sequence[Rollout]) -> list[str | None]:
        rows = zip(*(one(rollouts) for one in found), strict=True)
        return [next((text for text in row if text is not None), None) for row in rows]

    return needing(solutions, *needs_of(*found).inputs)


def solved_alone(found: Solutions) -> Filter:
    """Responses without a solution are not trained, and not counted in the denominator.

    A step without any solution makes no update and is counted (`train/update_skipped`).
    """

    def keep(rollouts: Sequence[Rollout]) -> list[Rollout]:
        return [
            rollout if text is not None else replace(rollout, trained=torch.zeros_like(rollout.trained))
            for rollout, text in zip(rollouts, found(rollouts), strict=True)
        ]

    return needing(keep, Input.REWARD, Input.GROUP, Trait.FILTERS, *needs_of(found).inputs)


def showing(rollouts: Sequence[Rollout], found: Sequence[str | None]) -> list[Rollout | None]:
    """The rollouts with their solution as the prompt's `privileged_context`; None without a solution."""
    return [
        None if text is None else replace(rollout, prompt=replace(rollout.prompt, privileged_context=text))
        for rollout, text in zip(rollouts, found, strict=True)
    ]


def solved(solutions: Solutions, batch: Batch) -> Tensor:
    """Whether the teacher reads a solution for each response, [B] bool."""
    return torch.tensor([text is not None for text in solutions(batch.rollouts)], device=batch.mask.device)


class Unsolved(SavedAttributes):
    """context/unsolved: the number of responses of the step, in all processes, without a solution."""

    def __init__(self, solutions: Solutions) -> None:
        self.solutions = solutions

    def observe(self, batch: Batch, gather: Gather) -> Mapping[str, float]:
        """The metric of a step. Saves nothing."""
        return {"context/unsolved": float(sum(gather(int((~solved(self.solutions, batch)).sum()))))}


def counted(solutions: Solutions) -> MakeMemory:
    """A maker of `Unsolved`."""
    return needing(lambda: Unsolved(solutions))


def _peer(rollout: Rollout, group: Sequence[Rollout]) -> str | None:
    """The text of the next right response; `group` is in the order of samples."""
    after = [other for other in group if other.sample > rollout.sample]
    before = [other for other in group if other.sample < rollout.sample]
    right = (other.text for other in (*after, *before) if other.reward is not None and other.reward >= PASS)
    return next(right, None)


def _given(rollout: Rollout, column: str | None) -> str | None:
    value = None if column is None or rollout.unjudged is not None else getattr(rollout.prompt, column)
    return None if value is None else str(value)
