"""Which responses of a step are shown in full, by rule: the extremes of a step say more than its first rows."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

Key: TypeAlias = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Candidate:
    """A response: `key` is its own and orders equal ones; `ratio` is its mean log q - log p per token, if known."""

    key: Key
    length: int
    ratio: float | None


def picked(candidates: Sequence[Candidate], count: int, seed: tuple[int, int]) -> dict[Key, str]:
    """At most `count` responses, each with its rule.

    In turn the least and the most mean log-ratio, the longest, the shortest, and one by chance, which follows from
    `seed` (of the run, step) alone.
    """
    left = sorted(candidates, key=lambda one: one.key)
    by_chance = left[:]
    random.Random(f"{seed[0]} {seed[1]}").shuffle(by_chance)
    rated = sorted((one for one in left if one.ratio is not None), key=lambda one: one.ratio or 0.0)
    by_length = sorted(left, key=lambda one: one.length)
    rules = {
        "least": rated,
        "most": rated[::-1],
        "longest": by_length[::-1],
        "shortest": by_length,
        "chance": by_chance,
    }
    out: dict[Key, str] = {}
    while len(out) < min(count, len(left)):
        for rule, order in rules.items():
            found = next((one for one in order if one.key not in out), None)
            if found is not None and len(out) < count:
                out[found.key] = rule
    return out
