"""What a method's state learns from a step: read once the batch is there, before credit and weight are.

An observer gets the batch of its own process and `gather`, which gives everybody's value in every process: what the
state becomes is the same in all of them. It returns the numbers to log, the same in all of them too.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache

from opd.needs import needing, needs_of, numbers_of
from opd.types import Batch, Gather, Observe


@cache
def nothing() -> Observe:
    """No state that learns from the batch."""

    def observe(batch: Batch, gather: Gather) -> Mapping[str, float]:
        return {}

    return needing(observe)


def all_of(*observers: Observe) -> Observe:
    """One after the other, in the order given."""

    def observe(batch: Batch, gather: Gather) -> Mapping[str, float]:
        return {name: value for one in observers for name, value in one(batch, gather).items()}

    return needing(observe, *needs_of(*observers), **numbers_of(*observers))
