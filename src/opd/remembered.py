"""What most states of a method are: a few numbers that a step changes and the next one reads."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor


class Remembered:
    """A `State` of the attributes that `remembers` names, each of a type that JSON keeps; nothing of the weights' size.

    A saved state that lacks one of them raises KeyError.
    """

    remembers: ClassVar[tuple[str, ...]]

    def state_dict(self) -> dict[str, Any]:
        """Their values by name."""
        return {name: getattr(self, name) for name in self.remembers}

    def tensors(self) -> Mapping[str, Tensor]:
        """None."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Go on from there."""
        for name in self.remembers:
            setattr(self, name, state[name])
