"""The denominator of a step, counted from the mask after generation."""

from __future__ import annotations

from functools import cache

from opd.errors import ConfigError
from opd.pieces.needs import needing
from opd.types import Average, Batch, Denominator, Normalise


@cache
def per(what: Average | int) -> Normalise:
    """The denominator of a mean `per` token, per sequence or per a number of tokens.

    token     the mean over all trained tokens of the step: a long response weighs more than a short one
    sequence  the mean over responses of each response's mean over tokens: all responses weigh the same
    a number  the sum over tokens, divided by responses x that number, whatever their length. Dr.GRPO (arXiv
              2503.20783): dividing by the response's own length rewards long wrong answers

    Raises ConfigError for another word.
    """

    def over_tokens(batch: Batch) -> Denominator:
        return Denominator(count=float(batch.mask.sum()), share=batch.mask.float())

    def over_sequences(batch: Batch) -> Denominator:
        lengths = batch.mask.sum(1, keepdim=True)
        share = batch.mask / lengths.clamp(min=1)
        return Denominator(count=float((lengths > 0).sum()), share=share)

    def over_constant(batch: Batch) -> Denominator:
        return Denominator(count=float(batch.mask.shape[0] * int(what)), share=batch.mask.float())

    named = {"token": over_tokens, "sequence": over_sequences}
    if isinstance(what, int):
        return needing(over_constant)
    if what not in named:
        raise ConfigError(f"A mean is per 'token', per 'sequence' or per a number of tokens, got {what!r}.")
    return needing(named[what])
