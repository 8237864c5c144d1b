"""A cache layer whose memory is made for many tokens at once.

transformers' `DynamicLayer` concatenates keys and values at every token, which copies the whole cache: with SmolLM2's
shapes, 8 rows and 2,048 tokens on a CPU, that took as long as attention itself.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

ROOM = 256  # tokens; a copy every 256 tokens costs little, and at most this much memory is unused


class GrowingLayer(DynamicLayer):
    """A `DynamicLayer` whose keys and values [b, heads, L, D] begin a memory with room for more tokens.

    `longest` is the L that the rows are expected to reach: no room is made for more tokens until they pass it.
    """

    def __init__(self, layer: DynamicLayer, longest: int | None = None) -> None:
        super().__init__()
        self.longest = longest
        self.dtype, self.device = layer.dtype, layer.device
        self.keys, self.values = layer.keys, layer.values
        self.is_initialized = True
        self.memory: tuple[Tensor, Tensor] | None = None  # of keys and values; None: `update` makes it

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append the states of new tokens; the keys and values of all tokens."""
        before = self.get_seq_length()
        after = before + key_states.shape[-2]
        if self.memory is None or self.memory[0].shape[-2] < after:
            room = after + ROOM
            if self.longest is not None and after <= self.longest:
                room = min(room, self.longest)
            self.memory = (_with_room(self.keys, key_states, room), _with_room(self.values, value_states, room))
        keys, values = self.memory
        keys[..., before:after, :] = key_states
        values[..., before:after, :] = value_states
        self.keys, self.values = keys[..., :after, :], values[..., :after, :]
        self.is_initialized = True
        return self.keys, self.values

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Keep these rows, in this order."""
        super().reorder_cache(beam_idx)
        self.memory = None

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows, in this order."""
        super().batch_select_indices(indices)
        self.memory = None

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row."""
        super().batch_repeat_interleave(repeats)
        self.memory = None

    def reset(self) -> None:
        """Forget all tokens."""
        super().reset()
        self.memory = None


def grow_in_place(cache: Any, longest: int | None = None) -> None:
    """Replace the plain dynamic layers of a cache, in place; layers of other kinds stay as they are."""
    layers: list[Any] = getattr(cache, "layers", [])
    for place, layer in enumerate(layers):
        if type(layer) is DynamicLayer and layer.is_initialized:
            layers[place] = GrowingLayer(layer, longest)


def _with_room(old: Tensor | None, new: Tensor, length: int) -> Tensor:
    """Memory for `length` tokens, which begins with the `old` ones."""
    memory = new.new_empty((*new.shape[:-2], length, new.shape[-1]))
    if old is not None and old.numel():
        memory[..., : old.shape[-2], :] = old
    return memory
