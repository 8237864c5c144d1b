"""The module whose forward runs a step: a file of its own, because its base class needs torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from torch import nn

Result = TypeVar("Result")


class Root(nn.Module):
    """A wrapper of a model: its forward runs any function over the weights.

    The losses call the backbone and read the head's weight, but not the model itself. FSDP gathers sharded weights in
    the forward of the module that holds them all, and reduces their gradients after its backward. This is that module.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, function: Callable[..., Result], *arguments: Any) -> Result:
        return function(*arguments)
