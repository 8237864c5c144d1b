"""Tasks made on the spot, with answers that can be checked: data functions for recipes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import numpy as np

from opd.errors import ConfigError

HELD_OUT_SHARE = 0.1


def addition(
    count: int, digits: int = 3, seed: int = 0, part: Literal["train", "held_out"] = "train"
) -> Iterator[dict[str, Any]]:
    """`count` different sums of two numbers of `digits` digits, with a chain of thought from the last digit up.

    {"prompt": "347+285=", "response": "7+5+0=12,4+8+1=13,3+2+1=06;632", "answer": "632"}: each column adds two digits
    and the carry. Which part a sum belongs to depends on its numbers alone, so the parts never share one, whatever the
    seed. Raises ConfigError when a part has fewer than `count` sums.
    """
    total = (9 * 10 ** (digits - 1)) ** 2
    share = HELD_OUT_SHARE if part == "held_out" else 1 - HELD_OUT_SHARE
    if count > 0.5 * share * total:
        raise ConfigError(f"{part} has about {share * total:.0f} sums of {digits} digits; {count} are too many.")
    rng = np.random.default_rng(seed)
    seen: set[tuple[int, int]] = set()
    while len(seen) < count:
        a, b = (int(n) for n in rng.integers(10 ** (digits - 1), 10**digits, 2))
        held_out = np.random.default_rng((a, b)).random() < HELD_OUT_SHARE
        if (a, b) in seen or held_out != (part == "held_out"):
            continue
        seen.add((a, b))
        yield {"prompt": f"{a}+{b}=", "response": f"{worked(a, b)};{a + b}", "answer": str(a + b)}


def worked(a: int, b: int) -> str:
    """The columns of a + b from the last digit up, with carries."""
    columns: list[str] = []
    carry = 0
    for x, y in zip(reversed(str(a)), reversed(str(b)), strict=True):
        total = int(x) + int(y) + carry
        columns.append(f"{x}+{y}+{carry}={total:02d}")
        carry = total // 10
    return ",".join(columns)
