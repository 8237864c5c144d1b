"""Means at the first places of a response, one each: a bucket of 64 tokens hides a lesson of one token."""

from __future__ import annotations

import torch
from torch import Tensor

from opd.maths.metrics import Metrics

PLACES = 8


def add_by_place(metrics: Metrics, name: str, values: Tensor, step: Tensor) -> None:
    """Record `name/at_0` to `at_7`: the mean of `values` [N] at each of the first places `step` [N], from 0."""
    first = step < PLACES
    counts = torch.bincount(step[first], minlength=PLACES)
    sums = torch.zeros(PLACES, dtype=torch.float64, device=values.device)
    sums.index_add_(0, step[first], values[first].double())
    for place, (total, count) in enumerate(zip(sums.tolist(), counts.tolist(), strict=True)):
        if count:
            metrics.mean(f"{name}/at_{place}", total, count)
