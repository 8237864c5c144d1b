"""Weights: Batch -> weight [B, T] >= 0, in phase A."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING

from opd.pieces import token_sequences
from opd.pieces.needs import Piece, Trait, needing, needing_tokenizer, needs_of, with_tokenizer
from opd.plugins import torch
from opd.types import Batch, Weight

if TYPE_CHECKING:
    from torch import Tensor


@cache
def every_token() -> Weight:
    """1 for every trained token."""

    def weight(batch: Batch) -> Tensor:
        return torch.ones_like(batch.teacher_logp)

    return needing(weight)


def mask_tokens(
    sequences: Sequence[token_sequences.TokenSequence], occurrences: token_sequences.Occurrences = "first"
) -> Weight:
    """0 on the tokens of given sequences (texts, or lists of ids), 1 on all other tokens: arXiv 2603.25562 section 4.

    `first`: the first occurrence of each sequence in a response, as in the paper's released code; `every`: all
    occurrences. A masked token has no gradient but is counted in the denominator; `filters.without_tokens` removes it
    from both, as in the paper. The piece needs the student's tokenizer (`Method.with_tokenizer`) before it is called.
    Raises ConfigError for an empty sequence, and, given the tokenizer, for a sequence that it does not know.
    """
    token_sequences.check(sequences, occurrences)

    def make(tokenizer: object) -> Weight:
        ids = token_sequences.encoded(sequences, tokenizer)

        def weight(batch: Batch) -> Tensor:
            out = torch.ones_like(batch.teacher_logp)
            for row, rollout in enumerate(batch.rollouts):
                masked = token_sequences.covered_tokens(rollout.response_ids, ids, occurrences)
                out[row, : len(masked)].masked_fill_(torch.tensor(masked, device=out.device), 0.0)
            return out

        return needing(weight, Trait.LOOKS_AT_SAMPLED_TOKEN)

    return needing_tokenizer("weights.mask_tokens", make, Trait.LOOKS_AT_SAMPLED_TOKEN)


def times(*weights: Weight) -> Weight:
    """The product of several weights."""

    def weight(batch: Batch) -> Tensor:
        return torch.stack([one(batch) for one in weights]).prod(0)

    def make(tokenizer: object) -> Weight:
        return times(*(with_tokenizer(one, tokenizer) for one in weights))

    return Piece(weight, needs_of(*weights), make)
