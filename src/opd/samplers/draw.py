"""Draws one token per row by inverting the distribution function at a given uniform number, without sorting."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from opd.errors import NotFiniteError
from opd.models.head import tiles

BLOCK = 128  # tokens per block; the block is chosen by its mass, then the token in it


SORTED = 4096  # largest vocabulary that is sorted


BINS = (0x3F800000 >> 16) + 1  # float32 bit patterns from 0 to 1, by their upper 16 bits


@dataclass(frozen=True, slots=True)
class Drawn:
    """One token per row, [b] each. `entropy` is after temperature and before truncation, in nats."""

    ids: Tensor
    sampler_logp: Tensor
    policy_logp: Tensor
    entropy: Tensor | None


def draw(
    logits: Tensor,
    uniforms: Tensor,
    *,
    temperature: float,
    top_p: float = 1.0,
    top_k: int = 0,
    entropy: bool = False,
) -> Drawn:
    """Tokens from logits [b, V] float32 at uniforms [b] float64 in [0, 1).

    The order is temperature, top-k, top-p. `sampler_logp` is under the filtered, renormalised distribution,
    `policy_logp` under temperature only. Temperature 0 takes the most likely token: its `sampler_logp` is 0, and its
    `policy_logp` and `entropy` are those of temperature 1. Sums over the vocabulary run in float64, because rounding
    accumulates over 150,000 tokens.
    """
    parts = [_draw(logits[t], uniforms[t], temperature, top_p, top_k, entropy) for t in tiles(logits)]
    return Drawn(
        ids=torch.cat([part.ids for part in parts]),
        sampler_logp=torch.cat([part.sampler_logp for part in parts]),
        policy_logp=torch.cat([part.policy_logp for part in parts]),
        entropy=torch.cat([part.entropy for part in parts if part.entropy is not None]) if entropy else None,
    )


def _draw(logits: Tensor, uniforms: Tensor, temperature: float, top_p: float, top_k: int, entropy: bool) -> Drawn:
    vocabulary = logits.shape[-1]
    mass = (logits if temperature in (0, 1) else logits / temperature).softmax(-1)
    if vocabulary % BLOCK:  # pad to whole blocks with zero mass
        mass = torch.nn.functional.pad(mass, (0, BLOCK - vocabulary % BLOCK))
    blocks = sums_of_blocks(mass)
    total = blocks.sum(-1)
    log_total = total.log()  # 0 up to float32 rounding, which over 150,000 tokens is not negligible
    if not bool(log_total.isfinite().all()):
        raise NotFiniteError(
            "The model's logits are not finite (NaN or +inf), so no token can be drawn: its weights or its "
            "activations overflowed. Go back to an earlier checkpoint, lower the learning rate, or use float32 instead "
            "of float16."
        )
    spread = (torch.special.entr(mass).sum(-1) / total + log_total).float() if entropy else None
    if temperature == 0:
        ids = logits.argmax(-1)
        return Drawn(ids, torch.zeros_like(logits[:, 0]), _logp(mass, ids, log_total), spread)
    kept = mass
    if 0 < top_k < vocabulary:
        kept = largest(kept, top_k)
    if top_p < 1.0:
        kept = nucleus(kept, top_p)
    kept_blocks = blocks if kept is mass else sums_of_blocks(kept)
    ids = invert(kept, kept_blocks, uniforms)
    policy_logp = _logp(mass, ids, log_total)
    if kept is mass:
        return Drawn(ids, policy_logp, policy_logp, spread)
    return Drawn(ids, _logp(mass, ids, kept_blocks.sum(-1).log()), policy_logp, spread)


def _logp(mass: Tensor, ids: Tensor, log_total: Tensor) -> Tensor:
    """[b]: log of the tokens' shares of the total."""
    return (mass.gather(-1, ids[:, None])[:, 0].double().log() - log_total).float()


def largest(mass: Tensor, k: int) -> Tensor:
    """[b, C] with all but the k largest of each row set to 0; of equal masses, the lower ids stay."""
    values = mass.topk(min(k + 1, mass.shape[1]), dim=-1).values
    return _from(mass, values, torch.full_like(values[:, :1], k - 1, dtype=torch.long))


def nucleus(mass: Tensor, top_p: float) -> Tensor:
    """[b, C], set to 0 outside the smallest set with a share `top_p` of each row's mass.

    The set is the tokens above a threshold. A histogram over the upper 16 bits of the masses finds the bin of the
    threshold, and only this bin is sorted. (Positive float32 numbers have the order of their bit patterns, so a bin is
    1/128 wide.) A small vocabulary is sorted completely, which is faster there.
    """
    if mass.shape[1] <= SORTED:
        values = torch.nn.functional.pad(mass.sort(-1, descending=True).values, (0, 1))
        target = top_p * mass.sum(-1, keepdim=True, dtype=torch.float64)
    else:
        bins = (mass.view(torch.int32) >> 16).long()
        sums = mass.new_zeros(len(mass), BINS, dtype=torch.float64).scatter_add_(1, bins, mass.double())
        up_to = sums.cumsum(-1)
        total = up_to[:, -1:]
        deciding = torch.searchsorted(up_to, (1.0 - top_p) * total, right=True).clamp(max=BINS - 1)  # [b, 1]
        values = _falling(mass, bins == deciding)
        target = top_p * total - (total - up_to.gather(-1, deciding))  # mass to take from the deciding bin
    reached = torch.searchsorted(values.double().cumsum(-1), target)
    reached = torch.minimum(reached, (values > 0).sum(-1, keepdim=True) - 1)  # rounding may point past the end
    return _from(mass, values, reached)


def _falling(mass: Tensor, chosen: Tensor) -> Tensor:
    """The chosen masses of each row in falling order, then zeros, at least one: [b, largest count + 1]."""
    rows, columns = chosen.nonzero(as_tuple=True)
    counts = torch.bincount(rows, minlength=len(mass))
    place = torch.arange(len(rows), device=rows.device) - (counts.cumsum(0) - counts)[rows]
    values = mass.new_zeros(len(mass), int(counts.max()) + 1)
    values[rows, place] = mass[rows, columns]
    return values.sort(-1, descending=True).values


def _from(mass: Tensor, values: Tensor, last: Tensor) -> Tensor:
    """`mass` [b, C] down to entry `last` [b, 1] of its falling `values`, 0 below; of equals, the lower ids stay."""
    threshold = values.gather(-1, last)
    following = values.gather(-1, (last + 1).clamp(max=values.shape[1] - 1))
    if not bool(((following == threshold) & (last + 1 < values.shape[1])).any()):
        return torch.where(mass >= threshold, mass, 0.0)
    tied = mass == threshold
    equals = last + 1 - (values > threshold).sum(-1, keepdim=True)
    return mass * ((mass > threshold) | (tied & (tied.cumsum(-1) <= equals)))


def sums_of_blocks(mass: Tensor) -> Tensor:
    """[b, C] -> [b, C / BLOCK] in float64; C is a multiple of BLOCK."""
    return mass.view(len(mass), -1, BLOCK).sum(-1, dtype=torch.float64)


def invert(mass: Tensor, blocks: Tensor, uniforms: Tensor) -> Tensor:
    """[b]: index at which the running sum of mass [b, C] exceeds u times its total, given its sums by block.

    Finds the block, then the token in it. Never returns an index without mass.
    """
    up_to = blocks.cumsum(-1)
    target = uniforms[:, None] * up_to[:, -1:]
    block = _first_above(up_to, target)
    before = torch.where(block > 0, up_to.gather(-1, (block - 1).clamp(min=0)), 0.0)
    rows = torch.arange(len(mass), device=mass.device)
    inside = mass.view(len(mass), -1, BLOCK)[rows, block[:, 0]].cumsum(-1, dtype=torch.float64)
    return (block * BLOCK + _first_above(inside, target - before))[:, 0]


def _first_above(cumulative: Tensor, target: Tensor) -> Tensor:
    """The first index [b, 1] at which the sum exceeds the target; never past the last index with mass."""
    index = torch.searchsorted(cumulative, target, right=True)
    # A u so close to 1 that the product rounds to the total would point past the last token with mass.
    last = torch.searchsorted(cumulative, cumulative[:, -1:].contiguous(), right=False)
    return torch.minimum(index, last)
