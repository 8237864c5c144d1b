"""Rows of sorted digits in which some responses have a bad habit; a data function for studies.

A model of any size that is trained on these examples learns the habit; a reward for right answers removes it. So they
separate the effect of reinforcement learning from that of size.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from opd.data.toy import Part, sorting


def sorting_both_ways(
    count: int, falling: float = 0.5, digits: int = 5, seed: int = 0, part: Part = "train"
) -> Iterator[dict[str, Any]]:
    """Rows of `opd.data.toy.sorting`; a share `falling` of the responses is in falling order.

    The answer stays the rising order. Raises ConfigError as `sorting` does.
    """
    rng = np.random.default_rng((seed, count))
    for row in sorting(count, digits=digits, seed=seed, part=part):
        yield {**row, "response": row["response"][::-1]} if rng.random() < falling else row
