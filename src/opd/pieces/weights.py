"""Weights: Batch -> weight [B, T] >= 0, in phase A."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache, partial
from typing import TYPE_CHECKING, Any

from opd.errors import ConfigError
from opd.pieces import token_sequences
from opd.pieces.needs import Piece, Reads, Trait, needing, needing_tokenizer, needs_of, with_tokenizer
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


def place_values(cap: float = 3.0, other: float = 0.1) -> Weight:
    """The weight of a digit is its place from the right, at most `cap`; of any other token `other`: arXiv 2605.00642.

    A number of N tokens that are one digit each, such as 512, weighs N, ..., 2, 1 from the left. The piece needs the
    student's tokenizer. Raises ConfigError for a number below 0, and for a tokenizer without tokens of one digit.
    """
    if cap < 0 or other < 0:
        raise ConfigError(f"Weights of digits are at least 0, got cap {cap} and other {other}.")

    made = partial(_of_places, cap, other)
    return needing_tokenizer("weights.place_values", made, Trait.LOOKS_AT_SAMPLED_TOKEN)


def _of_places(cap: float, other: float, tokenizer: Any) -> Weight:
    """`place_values` with the student's tokenizer."""
    digits = frozenset(i for i in tokenizer.get_vocab().values() if _is_digit(tokenizer, i))
    if not digits:
        raise ConfigError(
            "weights.place_values: no token of the student's tokenizer is one digit, so no digit has a place. Use "
            "a tokenizer that splits numbers into digits, or set `digits: false`."
        )

    def weight(batch: Batch) -> Tensor:
        out = torch.full_like(batch.teacher_logp, other)
        for row, rollout in enumerate(batch.rollouts):
            place, ids = 0, [int(i) for i in rollout.response_ids]
            for t in reversed(range(len(ids))):
                place = place + 1 if ids[t] in digits else 0
                if place:
                    out[row, t] = min(place, cap)
        return out

    return needing(weight, Trait.LOOKS_AT_SAMPLED_TOKEN)


def _is_digit(tokenizer: Any, token: int) -> bool:
    text: str = tokenizer.decode([token])
    return len(text) == 1 and text in "0123456789"


def certain() -> Weight:
    """1 - H / log V for each token: H is the entropy of the teacher's distribution, V the number of tokens.

    Of arXiv 2605.00642. The piece needs the student's tokenizer, which has V.
    """

    def make(tokenizer: Any) -> Weight:
        most = math.log(max(tokenizer.get_vocab().values()) + 1)

        def weight(batch: Batch) -> Tensor:
            assert batch.teacher_entropy is not None
            return (1.0 - batch.teacher_entropy / most).clamp(min=0.0)

        return needing(weight, Reads.TEACHER_ENTROPY)

    return needing_tokenizer("weights.certain", make, Reads.TEACHER_ENTROPY)


def times(*weights: Weight) -> Weight:
    """The product of several weights."""

    def weight(batch: Batch) -> Tensor:
        return torch.stack([one(batch) for one in weights]).prod(0)

    def make(tokenizer: object) -> Weight:
        return times(*(with_tokenizer(one, tokenizer) for one in weights))

    return Piece(weight, needs_of(*weights), make)
