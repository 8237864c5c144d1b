"""Order margins: the scores of right responses against those of wrong ones to the same prompt (arXiv 2605.03677).

Scores are numbers, one per response. Every function needs at least one right and one wrong response.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, TypeAlias

Gap: TypeAlias = Literal["mean", "minmax"]
Side: TypeAlias = Literal["both", "correct_up", "incorrect_down"]


def gap(right: Sequence[float], wrong: Sequence[float], statistic: Gap) -> float:
    """How far right responses score above wrong ones: mean - mean, or the least right one - the best wrong one."""
    assert right, "no right response"
    assert wrong, "no wrong response"
    if statistic == "mean":
        return math.fsum(right) / len(right) - math.fsum(wrong) / len(wrong)
    return min(right) - max(wrong)


def shift(of_gap: float, delta: float) -> float:
    """max(0, delta - gap): what the gap lacks to be `delta`."""
    return max(0.0, delta - of_gap)


def shares(size: float, side: Side) -> tuple[float, float]:
    """(added to right responses, added to wrong ones); the gap grows by `size` on each side."""
    return {"both": (size / 2, -size / 2), "correct_up": (size, 0.0), "incorrect_down": (0.0, -size)}[side]


def left_out(
    right: Sequence[float], wrong: Sequence[float], statistic: Gap, delta: float, keep: float
) -> tuple[set[int], set[int]]:
    """The places of the right and of the wrong responses to leave out until the gap is at least `delta`.

    Greedy, as in the released code: the lowest right or the highest wrong response, whichever removal gives the larger
    gap, the right one at a tie. It ends where no removal widens the gap, and never takes a class below `keep` of its
    number, rounded down, or below one response.
    """
    rights = sorted(range(len(right)), key=lambda i: (right[i], i))  # first: to be left out next
    wrongs = sorted(range(len(wrong)), key=lambda i: (-wrong[i], i))
    least = (max(1, int(keep * len(right))), max(1, int(keep * len(wrong))))

    def gap_of(of_right: Sequence[int], of_wrong: Sequence[int]) -> float:
        return gap([right[i] for i in of_right], [wrong[i] for i in of_wrong], statistic)

    now = gap_of(rights, wrongs)
    while now < delta:
        ways: list[tuple[float, list[int], list[int]]] = []
        if len(rights) > least[0]:
            ways.append((gap_of(rights[1:], wrongs), rights[1:], wrongs))
        if len(wrongs) > least[1]:
            ways.append((gap_of(rights, wrongs[1:]), rights, wrongs[1:]))
        best = max(ways, key=lambda way: way[0], default=None)
        if best is None or best[0] <= now:
            break
        now, rights, wrongs = best
    return set(range(len(right))) - set(rights), set(range(len(wrong))) - set(wrongs)
