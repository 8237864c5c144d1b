"""The one denominator of a step, counted from the mask after generation."""

from __future__ import annotations

from functools import cache

from opd.pieces.needs import needing
from opd.types import Batch, Denominator, Normalise


@cache
def per_token() -> Normalise:
    """Mean over all trained tokens of the step: a long response has more say than a short one."""

    def normalise(batch: Batch) -> Denominator:
        return Denominator(count=float(batch.mask.sum()), share=batch.mask.float())

    return needing(normalise)


@cache
def per_sequence() -> Normalise:
    """Mean over responses of the mean over their tokens: every response has the same say."""

    def normalise(batch: Batch) -> Denominator:
        lengths = batch.mask.sum(1, keepdim=True)
        share = batch.mask / lengths.clamp(min=1)
        return Denominator(count=float((lengths > 0).sum()), share=share)

    return needing(normalise)


def per_constant(tokens: int) -> Normalise:
    """Sum over tokens divided by responses x `tokens`, a length that does not depend on what was written.

    Dr.GRPO (arXiv 2503.20783): dividing by the response's own length rewards long wrong answers.
    """

    def normalise(batch: Batch) -> Denominator:
        return Denominator(count=float(batch.mask.shape[0] * tokens), share=batch.mask.float())

    return needing(normalise)
