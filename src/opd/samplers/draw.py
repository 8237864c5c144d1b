"""Draw one token a row by inverting the distribution function at a given uniform number."""

from __future__ import annotations

import torch
from torch import Tensor


def draw(
    logits: Tensor, uniforms: Tensor, *, temperature: float, top_p: float = 1.0, top_k: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """(ids, sampler_logp, policy_logp), each [b], from logits [b, V] float32 and uniforms [b] float64 in [0, 1).

    The order of the filters is temperature, top-k, top-p. `sampler_logp` is under the filtered, renormalised
    distribution, `policy_logp` under temperature alone. Temperature 0 takes the most likely token: its `sampler_logp`
    is 0 (the distribution is a point) and its `policy_logp` that of temperature 1. Sums run in float64: rounding adds
    up over a vocabulary of 150,000.
    """
    log_p = (logits if temperature == 0 else logits / temperature).log_softmax(-1)
    if temperature == 0:
        ids = log_p.argmax(-1)
        return ids, torch.zeros_like(log_p[:, 0]), log_p.gather(-1, ids[:, None])[:, 0]
    if top_p >= 1.0 and not 0 < top_k < logits.shape[-1]:
        cumulative = log_p.double().exp().cumsum(-1)
        ids = _invert(cumulative, uniforms)
        policy_logp = log_p.gather(-1, ids[:, None])[:, 0]
        return ids, policy_logp, policy_logp
    candidates, p = nucleus(log_p, top_p=top_p, top_k=top_k)  # [b, C] in falling order, zero where filtered out
    cumulative = p.cumsum(-1)
    position = _invert(cumulative, uniforms)[:, None]
    sampler_logp = (p.gather(-1, position) / cumulative[:, -1:]).log()[:, 0].float()
    ids = candidates.gather(-1, position)
    return ids[:, 0], sampler_logp, log_p.gather(-1, ids)[:, 0]


def nucleus(log_p: Tensor, *, top_p: float, top_k: int) -> tuple[Tensor, Tensor]:
    """Candidates [b, C] in falling order and their probabilities (float64, not renormalised, 0 if filtered out).

    Top-p keeps the smallest set whose mass, after top-k and renormalisation, is at least `top_p`. The tokens are found
    by a partial sort that grows until every row's set is inside it: a full sort of the vocabulary is rarely needed.
    """
    vocabulary = log_p.shape[-1]
    limit = min(top_k, vocabulary) if top_k > 0 else vocabulary
    size = min(limit, 64)
    while True:
        values, candidates = log_p.topk(size, dim=-1)
        p = values.double().exp()
        before = p.cumsum(-1) - p
        total = p.sum(-1, keepdim=True) if top_k > 0 else torch.ones_like(p[:, :1])
        if size == limit or (top_k <= 0 and bool((before[:, -1] + p[:, -1] >= top_p).all())):
            keep = before < top_p * total
            keep[:, 0] = True
            return candidates, p * keep
        size = limit if top_k > 0 else min(limit, size * 8)


def _invert(cumulative: Tensor, uniforms: Tensor) -> Tensor:
    """The first index whose cumulative mass exceeds u times the total, [b]; entries of zero mass are never drawn."""
    target = uniforms[:, None] * cumulative[:, -1:]
    index = torch.searchsorted(cumulative, target, right=True)[:, 0]
    # A u so close to 1 that the product rounds to the total would point behind the last token with mass.
    last = torch.searchsorted(cumulative, cumulative[:, -1:].contiguous(), right=False)[:, 0]
    return torch.minimum(index, last)
