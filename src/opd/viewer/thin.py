"""What a page keeps of more than it can hold: points of curves, rows of files, tokens of responses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

POINTS = 1200  # of a curve: more than a chart has pixels
FILES = 100  # of samples
FOLLOWED = 24  # steps at which the same prompts are shown
HELD_OUT = 400  # responses of an evaluation
LEAST = 128  # tokens of a response that are kept at any budget
WINDOW, WINDOWS = 64, 8  # tokens around each of the largest values of a long response, and how many of them
TOPS = 20  # one in so many tokens of the budget keeps its most likely tokens
LEAST_TOPS = 12  # of a response

# What a file of samples picked by each rule; the rows of a page are taken in this order.
PICKS = ("least", "most", "longest", "shortest", "chance")


def m4(xs: Sequence[float], ys: Sequence[float], most: int = POINTS) -> tuple[list[float], list[float]]:
    """The first, least, most and last point of each of `most` / 4 buckets of equal size: no spike is lost.

    `xs` and `ys` have one entry per point, and are returned whole if there are at most `most`.
    """
    n = len(xs)
    assert n == len(ys), f"{n} places of {len(ys)} values"
    if n <= most:
        return list(xs), list(ys)
    values = np.asarray(ys, dtype=np.float64)
    kept: set[int] = set()
    for bucket in np.array_split(np.arange(n), most // 4):
        inside = values[bucket]
        kept |= {int(bucket[0]), int(bucket[inside.argmin()]), int(bucket[inside.argmax()]), int(bucket[-1])}
    order = sorted(kept)
    return [xs[i] for i in order], [ys[i] for i in order]


def evenly(n: int, most: int) -> list[int]:
    """At most `most` of n places, the first and the last among them, as far apart as each other."""
    if n <= most:
        return list(range(n))
    return [0] if most == 1 else np.unique(np.linspace(0, n - 1, most).round().astype(int)).tolist()


def picked(picks: Sequence[str | None], most: int) -> list[int]:
    """At most `most` rows of a file of samples: one of each rule first, then more of them, then rows of no rule.

    `picks` is the file's column. Rows of `follow` are left out: they were not trained on.
    """
    chosen: list[int] = []
    by_rule = [[i for i, pick in enumerate(picks) if pick == rule] for rule in PICKS]
    for turn in range(max(map(len, by_rule), default=0)):
        chosen += [rows[turn] for rows in by_rule if turn < len(rows)]
    chosen += [i for i, pick in enumerate(picks) if pick is None]
    return sorted(chosen[:most])


def spread(means: Sequence[float], most: int) -> list[int]:
    """At most `most` rows of a file that has no picks: the least, the most and the middle mean, the rest evenly."""
    order = np.argsort(np.asarray(means, dtype=np.float64), kind="stable").tolist()
    first = dict.fromkeys(
        [*order[:1], *order[-1:], order[len(order) // 2], *order[1:2], *order[-2:-1]] if order else []
    )
    rest = [i for i in range(len(order)) if i not in first]
    chosen = [*first, *(rest[i] for i in evenly(len(rest), max(0, most - len(first))))]
    return sorted(chosen[:most])


def kept_tokens(n: int, cap: int, values: np.ndarray | None) -> list[tuple[int, int]]:
    """The parts [start, end) that a page keeps of a response of n tokens, at most `cap` of them.

    Half of the cap is its head, a quarter its tail, and a quarter windows around the tokens of the largest absolute
    `values` [n] between them (without values: more of the head).
    """
    if n <= cap:
        return [(0, n)] if n else []
    tail = cap // 4
    wide = min(WINDOW, max(8, cap // 4))
    windows = min(WINDOWS, cap // 4 // wide) if values is not None else 0
    head = cap - tail - windows * wide
    keep = np.zeros(n, dtype=bool)
    keep[:head] = keep[n - tail :] = True
    if windows and values is not None:
        sizes = np.nan_to_num(np.abs(values), nan=0.0)
        for _ in range(windows):
            at = int(np.where(keep, -1.0, sizes).argmax())
            start = min(max(at - wide // 2, 0), n - wide)
            keep[start : start + wide] = True
    edges = np.flatnonzero(np.diff(np.concatenate([[0], keep.astype(np.int8), [0]])))
    return [(int(a), int(b)) for a, b in zip(edges[::2], edges[1::2], strict=True)]


def strongest(values: np.ndarray | None, n: int, most: int) -> list[int]:
    """At most `most` of n tokens, those of the largest absolute values [n], in order; the first without values."""
    if n <= most:
        return list(range(n))
    if values is None:
        return list(range(most))
    sizes = np.nan_to_num(np.abs(values), nan=-1.0)
    return sorted(np.argsort(-sizes, kind="stable")[:most].tolist())


@dataclass(frozen=True, slots=True)
class Budget:
    """How much of each response a page keeps: tokens, and tokens with the most likely ones of both models."""

    cap: int
    tops: int

    @classmethod
    def of(cls, tokens: int, lengths: Sequence[int]) -> Budget:
        """The largest cap at which responses of these lengths have at most `tokens` tokens, but at least `LEAST`."""
        total = sum(lengths)
        longest = max(lengths, default=0)
        if total <= tokens:
            cap = max(longest, 1)
        else:
            low, high = LEAST, max(LEAST, longest)
            while low < high:  # the sum grows with the cap
                middle = (low + high + 1) // 2
                low, high = (middle, high) if sum(min(n, middle) for n in lengths) <= tokens else (low, middle - 1)
            cap = low
        shown = sum(min(n, cap) for n in lengths)
        allowed = tokens // TOPS
        tops = cap if shown <= allowed else max(LEAST_TOPS, allowed // max(1, len(lengths)))
        return cls(cap, tops)
