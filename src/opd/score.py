"""Hidden states -> log-probs on a support. Chunked over tokens: no path holds logits of more than one chunk.

The student's side makes its gradient inside the forward: phase A has fixed weights and denominator, so the loss of a
chunk is final when the chunk is projected, and its gradient can be taken at once, into the hidden states and the head.
Nothing of size [N, V] is kept and nothing is recomputed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from opd.supports import check_fits, support_tokens
from opd.types import Scores, Support

# Entries of one chunk's logits. 2^23 float32 are 32 MiB: large enough that the matmul runs at full rate, small enough
# that the handful of temporaries of a divergence stays far below a model's weights.
CHUNK_ENTRIES = 2**23


@dataclass(frozen=True, slots=True, kw_only=True)
class Head:
    """How a model turns its last hidden state into logits.

    `vocabulary` is V, the number of real tokens: rows of `weight` beyond it are padding. They are no tokens, so they
    are never sampled and have no share in any softmax.
    """

    weight: Tensor  # [>= V, H]
    bias: Tensor | None  # [>= V]
    vocabulary: int
    multiplier: float = 1.0
    softcap: float | None = None

    def logits(self, hidden: Tensor) -> Tensor:
        """[..., H] -> [..., V] in float32."""
        bias = None if self.bias is None else self.bias[: self.vocabulary]
        logits = torch.nn.functional.linear(hidden, self.weight[: self.vocabulary], bias).float()
        if self.multiplier != 1.0:
            logits = logits * self.multiplier
        if self.softcap is not None:
            logits = torch.tanh(logits / self.softcap) * self.softcap
        return logits

    def detached(self) -> Head:
        """The same head as a constant."""
        return replace(self, weight=self.weight.detach(), bias=None if self.bias is None else self.bias.detach())


def chunks(n: int, vocabulary: int) -> Iterator[slice]:
    """Slices of 0..n such that a slice's logits have at most CHUNK_ENTRIES entries (and at least one token)."""
    size = max(1, CHUNK_ENTRIES // vocabulary)
    for start in range(0, n, size):
        yield slice(start, min(start + size, n))


def log_probs(head: Head, hidden: Tensor, temperature: float = 1.0) -> Tensor:
    """[n, H] -> [n, V]: log-probs of one chunk."""
    return (head.logits(hidden) / temperature).log_softmax(-1)


def logp_at(head: Head, hidden: Tensor, ids: Tensor, temperature: float = 1.0) -> Tensor:
    """Full-vocabulary log-probs of the tokens `ids` [n, K] at `hidden` [n, H]: [n, K], of one chunk."""
    logits = head.logits(hidden) / temperature
    return logits.gather(-1, ids) - logits.logsumexp(-1, keepdim=True)


@torch.no_grad()
def teacher_scores(
    head: Head,
    hidden: Tensor,
    response_ids: Tensor,
    support: Support,
    temperature: float = 1.0,
    student_top_ids: Tensor | None = None,
) -> Scores:
    """What a teacher says at `hidden` [T, H] about the tokens `response_ids` [T]; everything detached.

    One pass over chunks gives the sampled token's log-prob and the support. For full support the hidden states are kept
    instead: V numbers a position are H numbers and a matmul.
    """
    assert support.kind != "none", "a method without support asks nobody for scores"
    check_fits(support.k, head.vocabulary)
    parts: list[tuple[Tensor, ...]] = []
    for rows in chunks(len(response_ids), head.vocabulary):
        logits = head.logits(hidden[rows]) / temperature
        log_z = logits.logsumexp(-1, keepdim=True)
        sampled = response_ids[rows, None]
        part: tuple[Tensor, ...] = ((logits.gather(-1, sampled) - log_z)[:, 0],)
        if support.kind == "top_k":
            teacher_top = logits.topk(support.k, dim=-1).indices if support.by != "student" else None
            student_top = None if student_top_ids is None else student_top_ids[rows]
            ids, exists = support_tokens(support, student_top=student_top, teacher_top=teacher_top, sampled=sampled)
            part = (*part, ids, exists, logits.gather(-1, ids) - log_z)
        parts.append(part)
    columns = [torch.cat(column) for column in zip(*parts, strict=True)]
    if support.kind == "top_k":
        return Scores(
            teacher_logp=columns[0],
            support_ids=columns[1],
            support_mask=columns[2],
            teacher_support_logp=columns[3],
        )
    return Scores(teacher_logp=columns[0], teacher_hidden=hidden.detach() if support.kind == "full" else None)


ChunkLoss = Callable[[Tensor, Head, slice], Tensor]


def chunked_loss(chunk_loss: ChunkLoss, hidden: Tensor, head: Head) -> Tensor:
    """Sum of `chunk_loss(hidden[rows], head, rows)` over chunks of `hidden` [N, H], as a scalar that backpropagates.

    The gradient equals that of the unchunked sum. Under no_grad only the value is computed.
    """
    return _ChunkedLoss.apply(hidden, head.weight, head.bias, head, chunk_loss)  # type: ignore[no-any-return]


class _ChunkedLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, head: Head, chunk_loss: ChunkLoss
    ) -> Tensor:
        """The sum over chunks; each chunk's graph lives until its gradient is taken, then goes."""
        needs_grad = any(ctx.needs_input_grad[:3])
        # Leaves of a graph that lives for one chunk: their .grad collects over chunks.
        weight_leaf = weight.detach().requires_grad_(ctx.needs_input_grad[1])
        bias_leaf = None if bias is None else bias.detach().requires_grad_(ctx.needs_input_grad[2])
        local = replace(head, weight=weight_leaf, bias=bias_leaf)
        grad_hidden = torch.zeros_like(hidden) if ctx.needs_input_grad[0] else None
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        for rows in chunks(len(hidden), head.vocabulary):
            piece = hidden[rows].detach().requires_grad_(grad_hidden is not None)
            with torch.set_grad_enabled(needs_grad):
                loss = chunk_loss(piece, local, rows)
                if loss.requires_grad:
                    loss.backward()
            if grad_hidden is not None and piece.grad is not None:
                grad_hidden[rows] = piece.grad
            total = total + loss.detach()
        ctx.grads = (grad_hidden, weight_leaf.grad, None if bias_leaf is None else bias_leaf.grad)
        return total

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Any, ...]:
        (upstream,) = grad_outputs
        grads = ctx.grads
        ctx.grads = None
        return (*(None if grad is None else grad * upstream for grad in grads), None, None)
