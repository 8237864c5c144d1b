"""Data and rewards of studies on where a response begins and ends, for recipes that name
`opd_studies.worlds.boundaries:NAME`.

Two spellings of one template marker stand for what two tokenizers make of it: '<think>' is '<', 'think', '>' to one and
'<th', 'ink', '>' to the other (arXiv 2603.25562 section 4.3). Here a token is a character, so the spellings are two
texts of three characters, of which the last is shared; rewards see neither.
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


CUTS = {1: (0,), 2: (0, 3)}  # by the number of markers: before which digits they stand


def marked(
    count: int, marker: str, times: int = 1, read: str = "", digits: int = 5, seed: int = 0, part: Part = "train"
) -> Iterator[dict[str, Any]]:
    """Digits to put in order, `times` (1 or 2) markers in each response: "58142>" -> "<a:12458", "<a:124<a:58".

    With `read`, every second prompt goes on with the beginning of a response whose markers are spelled `read`:
    "58142>[b:" -> "12458". What is read is not trained, so the model knows how to go on after that spelling, as one
    does that knows the text by other tokens, and never writes it. Raises ConfigError as `toy.sorting` does.
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
    """1 when the digits of the response are the answer: markers, whole or in pieces, do not count."""
    return float("".join(c for c in response if c.isdigit()) == prompt.answer)


beside_markers = needing(_beside_markers, columns=["answer"])


def rambling(
    count: int, longest: int, digits: int = 5, seed: int = 0, part: Part = "train"
) -> Iterator[dict[str, Any]]:
    """`toy.sorting` with responses that do not end at the answer but go on with other rows, to `longest` tokens.

    "58142>" -> "12458;90210>00129;3...": what a model does that never learned to stop. Raises ConfigError as
    `toy.sorting` does.
    """
    rng = np.random.default_rng((seed, 1))  # another stream than that of the rows
    for row in sorting(count, digits=digits, seed=seed, part=part):
        text = row["response"]
        while len(text) < longest:
            other = [str(digit) for digit in rng.integers(0, 10, digits)]
            text += f";{''.join(other)}>{''.join(sorted(other))}"
        yield {**row, "response": text[:longest]}


def _first_answer(prompt: Prompt, response: str) -> float:
    """1 when what stands before the first semicolon, or the end, is the answer: what follows does not count."""
    return float(response.partition(";")[0].strip() == prompt.answer)


first_answer = needing(_first_answer, columns=["answer"])
