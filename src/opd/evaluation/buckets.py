"""Means by position in the response, in at most sixteen buckets; the last one is open-ended."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from opd.maths.metrics import Metrics

MOST = 16


def starting_at(position: int) -> str:
    """The name of a bucket by its first token, `from_00064`: zero-padded, so that names sort by position."""
    return f"from_{position:05d}"


@dataclass(frozen=True, slots=True)
class Buckets:
    """`count` buckets of `width` tokens; the last one includes all later tokens. Make it with `Buckets.over`."""

    width: int
    count: int

    @classmethod
    def over(cls, smallest: int, longest: int) -> Buckets:
        """Buckets for responses of up to `longest` tokens.

        The width is `smallest`, doubled until sixteen buckets suffice: with 64, responses of 16,384 tokens get buckets
        of 1,024, as in arXiv 2603.25562 and the code of 2604.13016.
        """
        assert smallest >= 1
        width = smallest
        while width * MOST < longest:
            width *= 2
        return cls(width, max(1, -(-longest // width)))

    def of(self, step: Tensor) -> Tensor:
        """The bucket of each token, from its position in the response counted from 0, [N] -> [N]."""
        return (step // self.width).clamp(max=self.count - 1)

    def add_means(self, metrics: Metrics, name: str, values: Tensor, step: Tensor) -> None:
        """Record `name/from_...`, the mean of `values` [N] at positions `step` [N], for each bucket that has a token.

        Records nothing if there is a single bucket: its mean is that over all tokens, which has another name.
        """
        if self.count == 1:
            return
        bucket = self.of(step)
        counts = torch.bincount(bucket, minlength=self.count)
        sums = torch.zeros(self.count, dtype=torch.float64, device=values.device).index_add_(0, bucket, values.double())
        for b, (total, count) in enumerate(zip(sums.tolist(), counts.tolist(), strict=True)):
            if count:
                metrics.mean(f"{name}/{starting_at(b * self.width)}", total, count)
