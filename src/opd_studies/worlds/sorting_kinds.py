"""Digits to sort, of several kinds in one data set; a data function for studies."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from opd.data.toy import Part, different


def sorting_of_kinds(
    count: int, kinds: Sequence[Mapping[str, Any]], digits: int = 5, seed: int = 0, part: Part = "train"
) -> Iterator[dict[str, Any]]:
    """`count` rows like `toy.sorting`, kind after kind: {"share": 0.9, "lowest": 0, "highest": 6, "sign": ">"}.

    A kind has its share of the rows, rounded; its digits are in lowest..highest, and its sign ends the prompt. Kinds
    with the same digits begin with the same rows. Data parts (train, held-out) never share a row of any kind. Raises
    ConfigError if a part has fewer rows than a kind needs.
    """
    for kind in kinds:
        low, high = int(kind["lowest"]), int(kind["highest"])

        def draw(rng: np.random.Generator, low: int = low, high: int = high) -> tuple[int, ...]:
            return tuple(int(n) for n in rng.integers(low, high + 1, digits))

        rows = different(
            round(kind["share"] * count),
            draw,
            seed=seed,
            part=part,
            total=(high - low + 1) ** digits,
            what=f"rows of {digits} digits in {low}..{high}",
        )
        for row in rows:
            answer = "".join(map(str, sorted(row)))
            yield {"prompt": "".join(map(str, row)) + kind["sign"], "response": answer, "answer": answer}
