"""Rows of digits put in order by someone with a bad habit, a data function that only studies use.

Whoever imitates these examples takes over the habit, however large the imitator is; a reward for right answers breaks
it. So they set apart what reinforcement learning adds from what size adds.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from opd.data.toy import Part, sorting


def sorting_both_ways(
    count: int, falling: float = 0.5, digits: int = 5, seed: int = 0, part: Part = "train"
) -> Iterator[dict[str, Any]]:
    """Rows of `opd.data.toy.sorting`; a share `falling` of the responses begins with the largest digit.

    The answer stays the rising row. Raises ConfigError as `sorting`.
    """
    rng = np.random.default_rng((seed, count))
    for row in sorting(count, digits=digits, seed=seed, part=part):
        yield {**row, "response": row["response"][::-1]} if rng.random() < falling else row
