"""Units: pieces of a response that student and teacher, with a tokenizer each, both cut out (`opd.alignment`).

A response has a row of the record for each student token, so that weights and diagnostics need not know of units. A
unit lives at its first student token; the record says how many it has.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Units:
    """By the student's token, [T], [B, T] or [N] like the record that holds it.

    The teacher's numbers are of the unit that the token belongs to, and NaN for a token that is in none.
    """

    size: Tensor  # int64: how many student tokens the unit has that begins here and is compared; 0: none does
    teacher_size: Tensor  # int64: teacher tokens of the unit
    first_logp: Tensor  # log q of the unit's first teacher token
    rest_logp: Tensor  # log q of its others, summed
    shared: Tensor  # bool: the unit is one token on either side, and the same one
    inside: Tensor  # bool: the token is in a unit that is compared
    bytes: Tensor  # int64: bytes of text in the student's token

    def each(self, change: Callable[[Tensor], Tensor]) -> Units:
        """`change` of every field."""
        return Units(**{field.name: change(getattr(self, field.name)) for field in fields(self)})

    @staticmethod
    def joined(rows: Sequence[Units], join: Callable[[list[Tensor]], Tensor]) -> Units:
        """`join` of every field of several."""
        return Units(**{field.name: join([getattr(row, field.name) for row in rows]) for field in fields(Units)})


@dataclass(frozen=True, slots=True, kw_only=True)
class Shared:
    """The tokens that are in both vocabularies: entry k of `student` is entry k of `teacher`."""

    student: Tensor  # [K] int64
    teacher: Tensor  # [K] int64

    def first(self, ids: Tensor, vocabulary: int) -> Tensor:
        """All ids of a vocabulary, [V]: the shared ones (`ids`) and then the others in order."""
        alone = torch.ones(vocabulary, dtype=torch.bool, device=ids.device)
        alone[ids] = False
        return torch.cat([ids, alone.nonzero()[:, 0]])


@dataclass(frozen=True, slots=True)
class Cut:
    """The units of a chunk of n tokens that cuts none of them: m of the tokens are in u units."""

    start: Tensor  # [u] where each begins
    size: Tensor  # [u]
    token: Tensor  # [m] the tokens of units
    of: Tensor  # [m] whose

    @classmethod
    def at(cls, size: Tensor) -> Cut:
        """From the sizes [n] at the units' first tokens."""
        start = size.nonzero()[:, 0]
        sizes = size[start]
        of = torch.repeat_interleave(torch.arange(len(start), device=size.device), sizes)
        place = torch.arange(len(of), device=size.device) - (sizes.cumsum(0) - sizes)[of]
        return cls(start, sizes, start[of] + place, of)

    def sum(self, values: Tensor) -> Tensor:
        """[n] -> [u]: summed over each unit's tokens."""
        return values.new_zeros(len(self.start)).index_add(0, self.of, values[self.token])

    def mean(self, values: Tensor) -> Tensor:
        """[n] -> [u]: the mean over each unit's tokens."""
        return self.sum(values) / self.size


def whole_chunks(size: Tensor, most: int) -> list[slice]:
    """Slices of N tokens, each of at most `most`, that cut no unit; one that is longer has a slice of its own.

    `size` [N] is that of the unit that begins at each token, 0 where none does.
    """
    out: list[slice] = []
    begin = end = reach = 0  # the slice so far is begin..end, and no cut is allowed before `reach`
    for token, length in enumerate([*size.tolist(), 0]):
        if token >= reach:  # a cut is allowed before this token
            if token - begin > most and end > begin:
                out.append(slice(begin, end))
                begin = end
            end = token
        reach = max(reach, token + length)
    if end > begin:
        out.append(slice(begin, end))
    return out
