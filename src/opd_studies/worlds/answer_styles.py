"""Digits to sort, with worked responses in several styles; a data function for studies."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from opd.data.toy import Part, rows_of_digits

# (digits, answer) -> the response. The answer is the last number of all of them.
STYLES: Mapping[str, Callable[[str, str], str]] = {
    "direct": lambda digits, answer: answer,
    "late": lambda digits, answer: f";{answer}",  # the direct one, one token later
    "copied": lambda digits, answer: f"{digits};{answer}",
}


def styled(
    count: int,
    styles: Sequence[str],
    digits: int = 5,
    seed: int = 0,
    part: Part = "train",
    knowing: float = 0.0,
) -> Iterator[dict[str, Any]]:
    """`count` rows like `toy.sorting`, each with a style drawn by row: "12458", ";12458" or "58142;12458".

    A share `knowing` of the prompts begins with the solution, "12458=58142>", so that a model trained on them learns to
    read it. Parts as in `toy.sorting`. Raises ConfigError if a part has too few rows for `count`.
    """
    rng = np.random.default_rng((seed, count))
    for row in rows_of_digits(count, digits, seed, part):
        given, answer = "".join(map(str, row)), "".join(map(str, sorted(row)))
        shown = f"{answer}=" if rng.random() < knowing else ""
        style = styles[int(rng.integers(len(styles)))]
        yield {"prompt": f"{shown}{given}>", "response": STYLES[style](given, answer), "answer": answer}
