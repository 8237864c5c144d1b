"""Weights: Batch -> weight [B, T] >= 0, in phase A."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

from opd.pieces import token_sequences
from opd.pieces.needs import binding, bound, needing, needs_of, numbers_of, reads, unbound
from opd.types import Batch, Weight


@cache
def every_token() -> Weight:
    """1 for every trained token."""
    return needing(lambda batch: torch.ones_like(batch.teacher_logp))


def mask_tokens(
    sequences: Sequence[token_sequences.Given], occurrences: token_sequences.Occurrences = "first"
) -> Weight:
    """0 on the tokens of given sequences (texts, or lists of ids), 1 on all others: arXiv 2603.25562 section 4.

    `first` takes the first occurrence of each sequence in a response, as the paper's released code does, `every` all of
    them. A masked token has no gradient and still counts in the denominator; `keep.without_tokens` takes it out of
    both, as the paper does. The piece has to be bound to a tokenizer (`Method.bound`) before it is called.
    Raises ConfigError for an empty sequence, and when it is bound for one that the tokenizer does not know.
    """
    token_sequences.check(sequences, occurrences)

    def bind(tokenizer: object) -> Weight:
        ids = token_sequences.encoded(sequences, tokenizer)

        def weight(batch: Batch) -> Tensor:
            out = torch.ones_like(batch.teacher_logp)
            for row, rollout in enumerate(batch.rollouts):
                masked = token_sequences.covered_tokens(rollout.response_ids, ids, occurrences)
                out[row, : len(masked)].masked_fill_(torch.tensor(masked, device=out.device), 0.0)
            return out

        return needing(weight, "sampled_token")

    return binding(needing(unbound("weights.mask_tokens"), "sampled_token"), bind)


def times(*weights: Weight) -> Weight:
    """The product of several weights."""

    def weight(batch: Batch) -> Tensor:
        return torch.stack([one(batch) for one in weights]).prod(0)

    unsaid = {"teacher_logp"} if any(reads(one, "teacher_logp") for one in weights) else set[str]()
    return binding(
        needing(weight, *needs_of(*weights), *unsaid, **numbers_of(*weights)),
        lambda tokenizer: times(*(bound(one, tokenizer) for one in weights)),
    )
