"""The loss and its gradient computed together, chunk by chunk, inside the forward.

Phase A fixes weights and denominator before the student runs. So the loss of a chunk is final once its logits are
computed, and its gradient goes at once into the hidden states and the output layer. No [N, V] tensor is kept or
recomputed. Each position costs three products with the output layer: one forward, two backward.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import torch
from torch import Tensor

from opd.models.head import Head, chunks
from opd.models.products import linear

# Logits [n, C] of some rows, after temperature -> the chunk's loss; overwrites the logits with its gradient.
ChunkLoss: TypeAlias = Callable[[Tensor, slice], Tensor]


def fused_loss(
    chunk_loss: ChunkLoss,
    hidden: Tensor,
    head: Head,
    temperature: float = 1.0,
    ids: Tensor | None = None,
    parts: Sequence[slice] | None = None,
) -> Tensor:
    """Sum of `chunk_loss(logits, rows)` over chunks of `hidden` [N, H], a scalar that backpropagates.

    C is the vocabulary, or K with `ids` [N, K], where only these rows of the output layer are read. `parts` sets the
    chunks, for a loss that cannot be cut at every token. The gradient goes into `hidden`, and into `head.weight` and
    `head.bias` if they train. Sums over chunks run in float32.
    """
    return _Fused.apply(hidden, head.weight, head.bias, head, chunk_loss, temperature, ids, parts)  # type: ignore[no-any-return]


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        head: Head,
        chunk_loss: ChunkLoss,
        temperature: float,
        ids: Tensor | None,
        parts: Sequence[slice] | None,
    ) -> Tensor:
        """The loss. Computes the gradients of hidden [N, H], weight [>= V, H] and bias; `backward` returns them."""
        head = replace(head, weight=weight.detach(), bias=None if bias is None else bias.detach())
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        width = head.vocabulary if ids is None else ids.shape[1] * weight.shape[1]  # of _Rows: [n, K, H] is gathered
        parts = parts or list(chunks(len(hidden), width, hidden.device))
        whole = ids is None and len(parts) > 0  # the first chunk writes each row of a token
        grads = _Gradients.like(hidden, weight, bias, ctx.needs_input_grad[:3], head.vocabulary if whole else 0)
        longest = max((part.stop - part.start for part in parts), default=0)
        layer = _Rows(head, ids) if ids is not None else _Whole(head, torch.empty(longest, width, device=hidden.device))
        for number, rows in enumerate(parts):
            piece = hidden[rows].detach().to(weight.dtype)  # some models give bfloat16 under autocast
            logits = layer.project(piece, rows)
            slope = head.finish_(logits, temperature, None if ids is None else ids[rows])
            total += chunk_loss(logits, rows)
            grad = logits if head.multiplier == temperature else logits.mul_(head.multiplier / temperature)
            if slope is not None:
                grad.mul_(slope)
            layer.add_gradients(grads, grad, piece, rows, first=number == 0)
        ctx.grads = grads
        return total

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Any, ...]:
        """Return the gradients from `forward` times the gradient of the loss. Works once."""
        (upstream,) = grad_outputs
        grads: _Gradients = ctx.grads
        ctx.grads = None
        return (*grads.times(upstream), None, None, None, None, None)


@dataclass(slots=True)
class _Gradients:
    """The gradient sum of each input; None for an input that does not train."""

    hidden: Tensor | None
    weight: Tensor | None  # float32
    bias: Tensor | None  # float32
    dtypes: tuple[torch.dtype, torch.dtype]

    @classmethod
    def like(
        cls, hidden: Tensor, weight: Tensor, bias: Tensor | None, needed: tuple[bool, ...], written: int
    ) -> _Gradients:
        """Zeros, but for the first `written` rows of the weight's, which may hold anything: zeros cost a pass."""
        own = torch.empty_like(weight, dtype=torch.float32) if needed[1] else None
        if own is not None:
            own[written:] = 0.0
        return cls(
            hidden=torch.zeros_like(hidden) if needed[0] else None,
            weight=own,
            bias=torch.zeros_like(bias, dtype=torch.float32) if bias is not None and needed[2] else None,
            dtypes=(weight.dtype, weight.dtype if bias is None else bias.dtype),
        )

    def times(self, upstream: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """The gradients times `upstream`, computed in place, in the inputs' dtypes."""
        if upstream.item() != 1.0:  # a loss that is not scaled, as in a step, costs no pass over the weight's
            for gradient in (self.hidden, self.weight, self.bias):
                if gradient is not None:
                    gradient.mul_(upstream)
        weight = None if self.weight is None else self.weight.to(self.dtypes[0])
        return self.hidden, weight, None if self.bias is None else self.bias.to(self.dtypes[1])


@dataclass(frozen=True, slots=True)
class _Whole:
    """All V rows of the output layer; every chunk's logits use the same memory."""

    head: Head
    memory: Tensor

    def project(self, hidden: Tensor, rows: slice) -> Tensor:
        return self.head.project_into(self.memory, hidden)

    def add_gradients(self, grads: _Gradients, grad: Tensor, hidden: Tensor, rows: slice, *, first: bool) -> None:
        """Add a chunk's gradients; the `first` chunk's overwrite what the memory held."""
        weight = self.head.weight[: self.head.vocabulary]
        small = grad.to(weight.dtype)
        if grads.hidden is not None:
            grads.hidden[rows] = linear(small, weight.t())
        if grads.weight is not None:
            total = grads.weight[: self.head.vocabulary]
            if weight.dtype == torch.float32:
                total.addmm_(grad.t(), hidden, beta=0.0 if first else 1.0)  # at 0, NaN in `total` is not read
            elif first:
                total.copy_(small.t() @ hidden)
            else:  # the product in the weight's dtype, the sum over chunks in float32
                total += small.t() @ hidden
        if grads.bias is not None:
            grads.bias[: self.head.vocabulary] += grad.sum(0)


@dataclass(frozen=True, slots=True)
class _Rows:
    """K rows of the output layer at each position, by `ids` [N, K]."""

    head: Head
    ids: Tensor

    def project(self, hidden: Tensor, rows: slice) -> Tensor:
        ids = self.ids[rows]
        logits = torch.einsum("nkh,nh->nk", self.head.weight[ids], hidden).float()
        return logits if self.head.bias is None else logits + self.head.bias[ids]

    def add_gradients(self, grads: _Gradients, grad: Tensor, hidden: Tensor, rows: slice, *, first: bool) -> None:
        ids = self.ids[rows]
        if grads.hidden is not None:
            picked = self.head.weight[ids]
            grads.hidden[rows] = torch.einsum("nk,nkh->nh", grad.to(picked.dtype), picked)
        if grads.weight is not None:
            outer = grad[:, :, None] * hidden[:, None, :].float()
            grads.weight.index_add_(0, ids.flatten(), outer.flatten(0, 1))
        if grads.bias is not None:
            grads.bias.index_add_(0, ids.flatten(), grad.flatten())
