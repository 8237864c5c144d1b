"""What most states of a method are: a few numbers that a step changes and the next one reads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from torch import Tensor

from opd.pieces.needs import needing, needs_of, numbers_of
from opd.types import Batch, Gather, Observe


@dataclass(frozen=True, slots=True)
class Remembered:
    """A `State`: the attributes `names` of `of`, each of a type that JSON keeps; nothing of the weights' size.

    A saved state that lacks one of them raises KeyError.
    """

    of: object
    names: tuple[str, ...]

    def state_dict(self) -> dict[str, Any]:
        """Their values by name."""
        return {name: getattr(self.of, name) for name in self.names}

    def tensors(self) -> Mapping[str, Tensor]:
        """None."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Go on from there."""
        for name in self.names:
            setattr(self.of, name, state[name])


@cache
def nothing() -> Observe:
    """No state that learns from the batch."""

    def observe(batch: Batch, gather: Gather) -> Mapping[str, float]:
        return {}

    return needing(observe)


def all_of(*observers: Observe) -> Observe:
    """One after the other, in the order given."""

    def observe(batch: Batch, gather: Gather) -> Mapping[str, float]:
        return {name: value for one in observers for name, value in one(batch, gather).items()}

    return needing(observe, *needs_of(*observers), **numbers_of(*observers))
