"""Means by position in the response: at most sixteen buckets, the last one without an end."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from opd.maths.metrics import Metrics

MOST = 16


def starting_at(position: int) -> str:
    """`from_00064`: a bucket by its first token, of even length so that names sort as positions do."""
    return f"from_{position:05d}"


@dataclass(frozen=True, slots=True)
class Buckets:
    """`count` buckets of `width` tokens; what lies behind the last one's end is in it. Make it with `Buckets.over`."""

    width: int
    count: int

    @classmethod
    def over(cls, smallest: int, longest: int) -> Buckets:
        """Buckets for responses of up to `longest` tokens.

        The width is `smallest`, doubled until sixteen are enough: with 64, responses of 16,384 tokens get buckets of
        1,024, which are those of arXiv 2603.25562 and of the code of 2604.13016.
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
        """Record `name/from_...`, the mean of values [N] at positions [N], for each bucket that holds a token.

        A single bucket is the mean over all tokens, which has a name of its own: it is not recorded.
        """
        if self.count == 1:
            return
        bucket = self.of(step)
        counts = torch.bincount(bucket, minlength=self.count)
        sums = torch.zeros(self.count, dtype=torch.float64, device=values.device).index_add_(0, bucket, values.double())
        for b, (total, count) in enumerate(zip(sums.tolist(), counts.tolist(), strict=True)):
            if count:
                metrics.mean(f"{name}/{starting_at(b * self.width)}", total, count)
