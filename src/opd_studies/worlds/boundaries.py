"""Data and rewards of studies on the start and end of responses, as `opd_studies.worlds.boundaries:NAME` in recipes.

Two spellings of one template marker stand for the tokens of two tokenizers: '<think>' is '<', 'think', '>' in one and
'<th', 'ink', '>' in the other (arXiv 2603.25562 section 4.3). Here a token is a character, so the spellings are two
texts of three characters with the same last one; rewards ignore both.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from opd.data.toy import Part, sorting
from opd.pieces.needs import needing
from opd.types import Prompt

SPELLINGS = {"student": "<a:", "teacher": "[b:"}


CHARACTERS = "0123456789><a:[b"


CUTS = {1: (0,), 2: (0, 3)}  # by the number of markers: indices of the digits that follow them


def marked(
    count: int, marker: str, times: int = 1, read: str = "", digits: int = 5, seed: int = 0, part: Part = "train"
) -> Iterator[dict[str, Any]]:
    """Digits to sort, with `times` (1 or 2) markers in each response: "58142>" -> "<a:12458", "<a:124<a:58".

    With `read`, every second prompt ends with the start of a response whose markers are spelled `read`: "58142>[b:" ->
    "12458". Prompts are not trained, so the model can continue after that spelling but never writes it, like a model
    that knows the text in other tokens. Raises ConfigError as `toy.sorting` does.
    """
    cuts = CUTS[times]
    for i, row in enumerate(sorting(count, digits=digits, seed=seed, part=part)):
        pieces = [row["answer"][start:end] for start, end in zip(cuts, (*cuts[1:], None), strict=True)]
        given = 1 + (i // 2) % times if read and i % 2 else 0
        begun = "".join(f"{piece}{read}" for piece in ["", *pieces[: given - 1]]) if given else ""
        rest = pieces[given - 1] if given else ""
        rest += "".join(f"{marker}{piece}" for piece in pieces[given:])
        yield {"prompt": row["prompt"] + begun, "response": rest, "answer": row["answer"]}


def _beside_markers(prompt: Prompt, response: str) -> float:
    """1 if the digits of the response are the answer; markers, whole or in pieces, are ignored."""
    return float("".join(c for c in response if c.isdigit()) == prompt.answer)


beside_markers = needing(_beside_markers, columns=["answer"])


def rambling(
    count: int, longest: int, digits: int = 5, seed: int = 0, part: Part = "train"
) -> Iterator[dict[str, Any]]:
    """`toy.sorting` with responses that continue after the answer with other rows, up to `longest` tokens.

    "58142>" -> "12458;90210>00129;3...", like a model that never learned to stop. Raises ConfigError as `toy.sorting`
    does.
    """
    rng = np.random.default_rng((seed, 1))  # independent of the stream for the rows
    for row in sorting(count, digits=digits, seed=seed, part=part):
        text = row["response"]
        while len(text) < longest:
            other = [str(digit) for digit in rng.integers(0, 10, digits)]
            text += f";{''.join(other)}>{''.join(sorted(other))}"
        yield {**row, "response": text[:longest]}


def _first_answer(prompt: Prompt, response: str) -> float:
    """1 if the text before the first semicolon is the answer; the rest is ignored."""
    return float(response.partition(";")[0].strip() == prompt.answer)


first_answer = needing(_first_answer, columns=["answer"])
