"""Hidden states -> log-probs: the output layer, chunk by chunk. The logits of at most one chunk are in memory.

A chunk is the output of one matmul. It is large, so that the output layer is read few times. On a CPU the arithmetic on
a chunk runs tile by tile, so that the dozen passes of a softmax and a divergence stay in the cache.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from opd.maths import kernels
from opd.models.products import linear, prefers_onednn, to_float32
from opd.types import Shared

# Entries of one chunk's logits on a CPU: 2^22 float32 are 16 MiB. With fewer rows a product is bound by reading the
# output layer; with more, the memory of a loss is that of its chunks. A loss on the whole vocabulary against one with
# 2^25 entries, H = 576, one thread, N = 128 to 512 (memory: the same for every N; without the layer's gradient):
#     V                 32,000    49,152    151,936    262,144
#     CPU seconds        1.13      1.08       1.07       1.14
#     peak memory        0.38      0.22       0.30       0.55
CHUNK_ENTRIES = 2**22


# A wider vocabulary gets chunks of more entries, so that a chunk on a CPU has at least 2^22 / 2^16 = 64 rows: with 16
# rows of 262,144 tokens the same loss takes 1.9 times as long.
WIDE = 2**16


GPU_FACTOR = 32  # a GPU's products are bound by reading the output layer below about 800 rows


# Entries of one tile, 1 MiB: the tiles of both models and a temporary stay in the cache of a core. With one thread a
# loss takes 0.72 to 0.90 of the time with 2^19; with two threads no size was clearly faster.
TILE_ENTRIES = 2**18


# The logit of a token that is never written: its probability is exactly 0, and 0 times its log-prob is 0, not NaN.
UNWRITTEN = -1e9


COLUMNS = 2**13  # of a product that is copied: the memory of a step is then that of a product in place


class TeacherHead(Protocol):
    """What turns a teacher's hidden states into logits: a `Head`, or several (`mixed_head.MixedHead`)."""

    @property
    def vocabulary(self) -> int: ...

    def logits_at(self, hidden: Tensor, temperature: float) -> Tensor:
        """[n, H] -> [n, V] in float32, divided by the temperature."""
        ...

    def project_into(self, out: Tensor, hidden: Tensor, temperature: float) -> Tensor:
        """[n, H] into the first n rows of `out` [>= n, V]; returns these rows, for `finish_`."""
        ...

    def finish_(self, logits: Tensor, temperature: float) -> Any:
        """The rest of the way to logits divided by the temperature, in place."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Head:
    """The output layer: last hidden state -> logits.

    `vocabulary` is V, the number of real tokens. Rows of `weight` beyond it are padding: they are never sampled and
    have no share in any softmax.
    """

    weight: Tensor  # [>= V, H]
    bias: Tensor | None  # [>= V]
    vocabulary: int
    multiplier: float = 1.0
    softcap: float | None = None
    shared: Shared | None = None  # for a teacher with another tokenizer: the tokens that the student has too
    unwritten: Tensor | None = None  # int64: tokens of images, below V. Their logit is UNWRITTEN at any temperature

    def logits(self, hidden: Tensor) -> Tensor:
        """[..., H] -> [..., V] in float32."""
        logits = self.project(hidden)
        if self.multiplier != 1.0:
            logits = logits * self.multiplier
        if self.softcap is not None:
            logits = torch.tanh(logits / self.softcap) * self.softcap
        # After the soft cap, which would bring it back. A filled logit has no gradient.
        return logits if self.unwritten is None else logits.index_fill(-1, self.unwritten, UNWRITTEN)

    def project(self, hidden: Tensor) -> Tensor:
        """[..., H] -> [..., V] in float32: only the matrix and the bias."""
        weight, bias = self._real
        return to_float32(hidden.to(weight.dtype), weight, bias)

    @property
    def _real(self) -> tuple[Tensor, Tensor | None]:
        """Weight and bias without the padding."""
        return self.weight[: self.vocabulary], None if self.bias is None else self.bias[: self.vocabulary]

    def into(self, out: Tensor, hidden: Tensor) -> Tensor:
        """`project` for memory of this type: float64 from a float64 head is not rounded to float32."""
        if out.dtype != torch.float64:
            return self.project(hidden)
        return linear(hidden.to(self.weight.dtype), *self._real)

    def logits_at(self, hidden: Tensor, temperature: float) -> Tensor:
        """`logits` divided by the temperature."""
        return tempered(self.logits(hidden), temperature)

    def project_into(self, out: Tensor, hidden: Tensor, temperature: float = 1.0) -> Tensor:
        """`project` of [n, H] into the first n rows of `out` [>= n, V] float32; returns these rows.

        For a constant head. Reused memory costs no page faults. The temperature is left to `finish_`.
        """
        rows = out[: len(hidden)]
        if self.weight.dtype != torch.float32 or self.bias is not None:
            return rows.copy_(self.into(rows, hidden))
        weight = self.weight[: self.vocabulary]
        if not prefers_onednn():
            return torch.mm(hidden.float(), weight.t(), out=rows)
        for start in range(0, len(weight), COLUMNS):  # oneDNN has no product into given memory: copy small ones
            part = slice(start, start + COLUMNS)
            rows[:, part] = linear(hidden.float(), weight[part])
        return rows

    def finish_(self, logits: Tensor, temperature: float, ids: Tensor | None = None) -> Tensor | None:
        """Apply multiplier, soft cap and temperature to logits in place; returns the soft cap's derivative, if any.

        `ids` are the tokens of the logits where they are not the whole vocabulary. The logits of tokens that are never
        written become UNWRITTEN.
        """
        slope = None
        if self.softcap is not None:
            capped = logits.mul_(self.multiplier / self.softcap).tanh_()
            slope = 1.0 - capped.square()
            logits.mul_(self.softcap / temperature)
        elif self.multiplier != temperature:
            logits.mul_(self.multiplier / temperature)
        if self.unwritten is not None and ids is not None:
            logits.masked_fill_(torch.isin(ids, self.unwritten), UNWRITTEN)
        elif self.unwritten is not None:
            logits.index_fill_(-1, self.unwritten, UNWRITTEN)
        return slope

    def detached(self) -> Head:
        """The same head as a constant."""
        return replace(self, weight=self.weight.detach(), bias=None if self.bias is None else self.bias.detach())


def chunk_rows(width: int, device: torch.device) -> int:
    """The number of rows of `width` logits in a chunk on this device, at least one."""
    if device.type == "cpu":
        return max(1, CHUNK_ENTRIES // min(width, WIDE))
    return max(1, GPU_FACTOR * CHUNK_ENTRIES // width)


def chunks(n: int, width: int, device: torch.device, times: int = 1) -> Iterator[slice]:
    """Slices of 0..n of `times` x `chunk_rows(width, device)` rows; the last one may have fewer."""
    return _slices(n, times * chunk_rows(width, device))


def buffer(n: int, width: int, device: torch.device, times: int = 1) -> Tensor:
    """Memory for the logits of the largest of `chunks(n, width, device, times)`."""
    return torch.empty(next(chunks(n, width, device, times), slice(0, 0)).stop, width, device=device)


def tiles(chunk: Tensor) -> Iterator[slice]:
    """Slices of the rows of a chunk [n, V]: a few rows each on a CPU, one slice of all rows elsewhere."""
    return _slices(len(chunk), TILE_ENTRIES // chunk.shape[1] if chunk.device.type == "cpu" else len(chunk))


def log_normaliser(logits: Tensor) -> Tensor:
    """log sum exp of a chunk's rows, [n, V] -> [n, 1], tile by tile."""
    return torch.cat(
        [kernels.on(logits.device).log_normaliser(logits[tile]) for tile in tiles(logits)] or [logits[:, :1]]
    )


def into_probabilities(logits: Tensor, log_z: Tensor, factor: Tensor) -> None:
    """A chunk's logits [n, V] <- softmax times `factor` [n, 1], in place, tile by tile; `log_z` [n, 1]."""
    for tile in tiles(logits):
        kernels.on(logits.device).into_probabilities(logits[tile], log_z[tile], factor[tile])


def _slices(n: int, size: int) -> Iterator[slice]:
    size = max(1, size)
    for start in range(0, n, size):
        yield slice(start, min(start + size, n))


def tempered(logits: Tensor, temperature: float) -> Tensor:
    """Logits divided by the temperature; unchanged at 1."""
    return logits if temperature == 1.0 else logits / temperature


@torch.no_grad()
def paired_log_probs(
    student: Head, student_hidden: Tensor, teacher: TeacherHead, teacher_hidden: Tensor, temperature: float = 1.0
) -> Iterator[tuple[Tensor, Tensor]]:
    """Both models' log-probs [n, V] at hidden states [N, H] of the same positions, tile by tile, in order."""
    for rows in chunks(len(student_hidden), student.vocabulary, student_hidden.device):
        ours = student.logits_at(student_hidden[rows], temperature)
        theirs = teacher.logits_at(teacher_hidden[rows], temperature)
        for tile in tiles(ours):
            yield ours[tile].log_softmax(-1), theirs[tile].log_softmax(-1)
