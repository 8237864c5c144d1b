"""The loss of units: as `token_loss.py`, for a student and a teacher with different tokenizers.

A row of `Tokens` is a unit. Its support has entries that both models have: the tokens of both vocabularies at the
unit's first position, and the entry that `Support.span` adds. The log-probs of the unit's other tokens are leaves too,
so that the gradient reaches all positions:

    d/dz_j = g_j - p_j sum_v g_v        at each position, with g = d loss / d log p there
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from opd.loss.collate import MicroBatch
from opd.loss.fused import ChunkLoss
from opd.method import Method
from opd.models import head
from opd.models.head import Head, into_probabilities, log_normaliser
from opd.types import Shared, Support, Tokens, Units

Observe = Callable[[str, Tensor, int | None], None]  # name, values, their count (None: the number of tokens)


def unit_chunks(micro: MicroBatch, student: Head, teacher: Head) -> list[slice]:
    """Chunks of the micro-batch's tokens that cut no unit, sized for either model's logits plus one entry."""
    assert micro.units is not None
    width = max(student.vocabulary, teacher.vocabulary) + 1
    return whole_chunks(micro.units.size, head.chunk_rows(width, micro.token_ids.device))


def on_units(method: Method, micro: MicroBatch, weight: Tensor, teacher: Head, observe: Observe) -> ChunkLoss:
    """A chunk's loss: the sum over its units of signal times the mean of `weight` [N] over the unit's tokens."""
    units, shared = micro.units, teacher.shared
    assert units is not None
    assert shared is not None, "only a teacher with another tokenizer scores units"
    both = len(shared.student)

    def chunk_loss(logits: Tensor, rows: slice) -> Tensor:
        """[n, V] logits of the student at `rows`: their part of the loss, and its gradient in their place."""
        own = units.each(lambda field: field[rows])
        cut = Cut.at(own.size)
        y = micro.token_ids[rows, None]
        log_z = log_normaliser(logits)
        logp = (logits.gather(-1, y) - log_z)[:, 0]  # [n]
        observe("train/student_nll", -logp, None)
        ids, theirs = _columns(method.support, shared, logits.shape[1], teacher.vocabulary)
        columns = logits[cut.start][:, ids] - log_z[cut.start]  # [u, C]
        says = _teacher_columns(micro, teacher, method.temperature, rows, cut, theirs)
        with torch.enable_grad():
            leaves = columns.requires_grad_(), logp.requires_grad_()
            tokens = _tokens(
                method.support, micro, rows, own.each(lambda field: field[cut.start]), cut, *leaves, says, both
            )
            per_unit = method.signal(tokens)
            loss = (per_unit * cut.mean(weight[rows])).sum()
        grads = _gradients(loss, leaves)
        _observe(observe, tokens, per_unit.detach())
        if micro.signal is not None:  # in equal parts, as the weight of a unit is the mean of its tokens' weights
            micro.signal[rows][cut.token] = (per_unit.detach() / cut.size)[cut.of]
        _into(logits, log_z, cut.start, ids, y, *grads)
        return loss.detach()

    return chunk_loss


def _columns(support: Support, shared: Shared, student: int, teacher: int) -> tuple[Tensor, Tensor]:
    """The columns to read of both vocabularies: the shared tokens, or all tokens with the shared ones first."""
    if support.span != "product":
        return shared.student, shared.teacher
    return shared.first(shared.student, student), shared.first(shared.teacher, teacher)


def _teacher_columns(micro: MicroBatch, head: Head, temperature: float, rows: slice, cut: Cut, ids: Tensor) -> Tensor:
    """[u, C]: the teacher's full-vocabulary log-probs at the units' first positions."""
    assert micro.teacher_hidden is not None
    logits = head.project(micro.teacher_hidden[rows][cut.start])
    head.finish_(logits, temperature)
    log_z = log_normaliser(logits)
    return logits[:, ids].sub_(log_z)


def _tokens(
    support: Support,
    micro: MicroBatch,
    rows: slice,
    at: Units,
    cut: Cut,
    columns: Tensor,
    logp: Tensor,
    says: Tensor,
    shared: int,
) -> Tokens:
    """The units as rows. The student's leaves are `columns` [u, C] and its tokens' log-probs `logp` [n].

    `shared` is the number of tokens in both vocabularies.
    """
    joint, teacher_joint = cut.sum(logp), at.first_logp + at.rest_logp
    mask: Tensor | None = torch.ones_like(columns, dtype=torch.bool)
    if support.span == "product":
        columns, says, mask = columns + (joint - logp[cut.start])[:, None], says + at.rest_logp[:, None], None
    elif support.span == "column":
        columns = torch.cat([columns, (joint / cut.size)[:, None]], 1)
        says = torch.cat([says, (teacher_joint / at.teacher_size)[:, None]], 1)
        mask = torch.cat([mask, ~at.shared[:, None]], 1)
    if mask is not None and support.least_mass:
        mass = says.masked_fill(~mask, -torch.inf).logsumexp(-1, keepdim=True).exp().clamp(max=1.0)
        mask = mask & (mass >= support.least_mass)
    return Tokens(
        student_logp=joint,
        sampler_logp=cut.sum(micro.sampler_logp[rows]),
        teacher_logp=teacher_joint,
        advantage=cut.mean(micro.advantage[rows]),
        weight=cut.mean(micro.weight[rows]),
        base_logp=None if micro.base_logp is None else cut.sum(micro.base_logp[rows]),
        student_support_logp=columns,
        teacher_support_logp=says,
        support_mask=mask,
        shared=shared if support.span == "product" else None,
    )


def _gradients(loss: Tensor, leaves: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """The gradient of the loss with respect to the leaves; zeros for a signal that reads neither."""
    if not loss.requires_grad:
        return torch.zeros_like(leaves[0]), torch.zeros_like(leaves[1])
    columns, logp = torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)
    return columns, logp


def _into(logits: Tensor, log_z: Tensor, start: Tensor, ids: Tensor, y: Tensor, columns: Tensor, logp: Tensor) -> None:
    """Overwrite the logits [n, V] with their gradient, given the gradient with respect to the log-probs."""
    total = logp.index_add(0, start, columns.sum(-1))[:, None]  # [n, 1]
    into_probabilities(logits, log_z, -total)
    logits.scatter_add_(-1, y, logp[:, None])
    logits[start] = logits[start].index_add(1, ids, columns)


def _observe(observe: Observe, tokens: Tokens, per_unit: Tensor) -> None:
    n = len(per_unit)
    observe("train/signal", per_unit, None)
    observe("units/signal", per_unit, n)
    observe("units/log_ratio", (tokens.teacher_logp - tokens.student_logp).detach(), n)
    if tokens.support_mask is None or tokens.student_support_logp is None or tokens.teacher_support_logp is None:
        return
    for name, logp in (("student", tokens.student_support_logp.detach()), ("teacher", tokens.teacher_support_logp)):
        observe(f"support/{name}_mass", logp.exp().masked_fill(~tokens.support_mask, 0.0), n)
    observe("support/empty_share", (~tokens.support_mask.any(-1)).float(), n)


@dataclass(frozen=True, slots=True)
class Cut:
    """The u units of a chunk of n tokens, none of them cut; m of the tokens belong to units."""

    start: Tensor  # [u] the first token of each unit
    size: Tensor  # [u]
    token: Tensor  # [m] the tokens in units
    of: Tensor  # [m] the unit of each of these tokens

    @classmethod
    def at(cls, size: Tensor) -> Cut:
        """The units from `size` [n]: the unit's size at its first token, 0 elsewhere."""
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
    """Slices of N tokens, each of at most `most`, that cut no unit; a longer unit is one slice.

    `size` [N] is the size of the unit that begins at each token, 0 if none begins there.
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
