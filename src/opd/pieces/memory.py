"""What a method remembers in a run. A Method holds makers of it, so that it is a value: two runs share nothing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, TypeVar

from torch import Tensor

from opd.errors import ConfigError
from opd.types import Batch, Gather, Memory

Kind = TypeVar("Kind", bound=Memory)


class SavedAttributes:
    """A `Memory` of a few numbers: the attributes `saved`, each of a type that JSON keeps; none of the weights' size.

    A class that derives from it says in `observe` what it learns from a step; one without `saved` only measures.
    A saved state that lacks an attribute raises KeyError.
    """

    saved: ClassVar[tuple[str, ...]] = ()

    def observe(self, batch: Batch, gather: Gather) -> Mapping[str, float]:
        """Learn from a step, of all processes, before credit and weight read it; metrics. Here: nothing."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """The saved attributes by name."""
        return {name: getattr(self, name) for name in self.saved}

    def tensors(self) -> Mapping[str, Tensor]:
        """None."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Go on from there."""
        for name in self.saved:
            setattr(self, name, state[name])


def observed(batch: Batch, gather: Gather) -> dict[str, float]:
    """The metrics of a step, from which each memory of the batch has learned, in the order of `Method.memory`."""
    return {name: value for one in batch.memory.values() for name, value in one.observe(batch, gather).items()}


def recalled(memory: Mapping[str, Memory], name: str, kind: type[Kind]) -> Kind:
    """The memory that a piece reads. Raises ConfigError where the method has none of that name and kind."""
    found = memory.get(name)
    if not isinstance(found, kind):
        raise ConfigError(
            f"A piece of the method reads the memory {name!r}, a {kind.__name__}, and the method has "
            + (f"a {type(found).__name__} of that name" if found is not None else "no memory of that name")
            + ". Give its maker to Method(memory={...}) under that name."
        )
    return found
