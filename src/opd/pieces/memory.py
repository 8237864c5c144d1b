"""The memory of a method during a run. A Method holds only makers of memory, so two runs share no state."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from opd.errors import ConfigError
from opd.types import Batch, Gather, Memory

if TYPE_CHECKING:
    from torch import Tensor

Kind = TypeVar("Kind", bound=Memory)


class SavedAttributes:
    """A `Memory` of a few numbers: the attributes named in `saved`, each of a JSON type, and no tensors.

    A subclass overrides `observe` to learn from a step. Without `saved` it only measures. A saved state that lacks an
    attribute raises KeyError.
    """

    saved: ClassVar[tuple[str, ...]] = ()

    def observe(self, batch: Batch, gather: Gather) -> Mapping[str, float]:
        """Learn from a step of all processes, before credit and weight read the memory; metrics. Here: no effect."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """The saved attributes by name."""
        return {name: getattr(self, name) for name in self.saved}

    def tensors(self) -> Mapping[str, Tensor]:
        """Empty: no tensors."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Restore the saved attributes."""
        for name in self.saved:
            setattr(self, name, state[name])


def observed(batch: Batch, gather: Gather) -> dict[str, float]:
    """Let each memory of the batch learn from the step, in the order of `Method.memory`; their metrics."""
    return {name: value for one in batch.memory.values() for name, value in one.observe(batch, gather).items()}


def recalled(memory: Mapping[str, Memory], name: str, kind: type[Kind]) -> Kind:
    """The memory that a piece reads. Raises ConfigError if the method has no memory of that name and kind."""
    found = memory.get(name)
    if not isinstance(found, kind):
        raise ConfigError(
            f"A piece of the method reads the memory {name!r}, a {kind.__name__}, but the method has "
            + (f"a {type(found).__name__} of that name" if found is not None else "no memory of that name")
            + ". Give its maker to Method(memory={...}) under that name."
        )
    return found
