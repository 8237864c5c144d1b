"""The one denominator of a step, counted from the mask after generation."""

from __future__ import annotations

from functools import cache

from opd.errors import ConfigError
from opd.pieces.needs import needing
from opd.types import Average, Batch, Denominator, Normalise


@cache
def per(what: Average | int) -> Normalise:
    """The mean over what has the same say.

    token     over all trained tokens of the step: a long response has more say than a short one
    sequence  over responses of the mean over their tokens: every response has the same say
    a number  sum over tokens, divided by responses x that many tokens, whatever was written. Dr.GRPO (arXiv
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
        raise ConfigError(f"A mean is per token, per sequence or per a number of tokens, got {what!r}.")
    return needing(named[what])
