"""The smallest or the largest of some digits, by the sign that ends the prompt; a data function for studies."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from opd.data.toy import Part, rows_of_digits


def extremes(
    count: int,
    sign: str,
    largest: bool = False,
    wrong: float = 0.0,
    digits: int = 4,
    seed: int = 0,
    part: Part = "train",
) -> Iterator[dict[str, Any]]:
    """`count` rows: {"prompt": "3891>", "response": "1", "answer": "1"}, or with `largest` "9" for "3891".

    A share `wrong` of the responses, drawn by row, is the other extreme; the answer stays. Parts as in `toy.sorting`,
    the same for all signs. Raises ConfigError if a part has too few rows for `count`.
    """
    rng = np.random.default_rng((seed, count))
    for row in rows_of_digits(count, digits, seed, part):
        answer, other = (max(row), min(row)) if largest else (min(row), max(row))
        prompt = "".join(map(str, row)) + sign
        yield {"prompt": prompt, "response": str(other if rng.random() < wrong else answer), "answer": str(answer)}
