"""Two writers that each know half of a key, and a debate in which they can complete each other.

A key gives each digit a letter. "5814>" asks for the letters of four digits. A writer knows the letters of the digits
0 to 4 ("l") or 5 to 9 ("r"). Of the other digits it either guesses any letter each time, or is sure of a wrong one.

    5814>                                      the letters
    ?5814>                                     the letters, and the confidence: "fibe=50"
    lfibe=50;rgice=50;?5814>                   the same after one round of both: it takes the other's letters for digits
                                               that it does not know
    lfibe=50;rgice=50;lfice=99;rfice=99;5814>  the letters after two rounds

With turns of its own alone, up to `ALONE` of them, it knows no more than without.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import numpy as np

from opd.data.toy import Part, different

LETTERS = "abcdefghij"
CHARACTERS = "0123456789" + LETTERS + ">?=;lr"
DIGITS = 4  # of a prompt
LONGEST = DIGITS + 4  # tokens of a turn: the letters, "=", two digits, the end
ALONE = 4  # turns
SLIPS = 0.03  # of a writer's letters in training are any letter, so that it goes on after a wrong one
OTHER = 1000  # between the number of a key and that of another one
TEXTS = {
    "opening": "?{prompt}",
    "reply": "{debate}?{prompt}",
    "reads": "{debate}{prompt}",
    "turn": "{teacher}{text};",
    "tag": r"=(\d\d)",
}

Writer = Literal["l", "r"]
# The kinds of rows that a writer learns from, with their shares.
FORMS = {"plain": 0.2, "opening": 0.15, "reply": 0.25, "reads": 0.25, "alone": 0.15}


def key_of(seed: int) -> str:
    """The letter of each digit."""
    return "".join(np.random.default_rng((seed, 0x4E1)).permutation(list(LETTERS)))


def asked(count: int, key: int, seed: int = 0, part: Part = "train") -> Iterator[dict[str, Any]]:
    """`count` prompts with their answers by the key of that seed."""
    letters = key_of(key)
    for numbers in rows_of(count, seed, part):
        answer = "".join(letters[n] for n in numbers)
        yield {"prompt": f"{shown(numbers)}>", "response": answer, "answer": answer}


def formed(count: int, seed: int = 0) -> Iterator[dict[str, Any]]:
    """`count` prompts with letters of another key, half of them replaced: a student learns the form of an answer.

    It then reads the digits and is sure of nothing: what it lacks is the key.
    """
    rng = np.random.default_rng((seed, count))
    other = key_of(seed + OTHER)
    for numbers in rows_of(count, seed, "train"):
        yield {"prompt": f"{shown(numbers)}>", "response": slipped("".join(other[n] for n in numbers), rng, 0.5)}


def taught(count: int, key: int, writer: Writer, sure: bool, seed: int = 0) -> Iterator[dict[str, Any]]:
    """`count` rows for a writer. `sure`: it and the other one are sure of a wrong letter where they do not know."""
    rng = np.random.default_rng((seed, count, ord(writer)))
    kinds = rng.choice(list(FORMS), count, p=list(FORMS.values()))
    for numbers, kind in zip(rows_of(count, seed, "train"), kinds, strict=True):
        prompt = f"{shown(numbers)}>"
        own = slipped(alone(numbers, key, writer, sure, rng), rng)
        right = "".join(key_of(key)[n] for n in numbers)
        whole = slipped(right, rng)
        turn = stated(own, numbers, writer, sure)
        first = "".join(
            f"{who}{stated(alone(numbers, key, who, sure, rng), numbers, who, sure)};" for who in ("l", "r")
        )
        if kind == "plain":
            yield {"prompt": prompt, "response": own}
        elif kind == "opening":
            yield {"prompt": f"?{prompt}", "response": turn}
        elif kind == "reply":
            yield {"prompt": f"{first}?{prompt}", "response": f"{whole}=99"}
        elif kind == "reads":
            yield {"prompt": f"{first}l{right}=99;r{right}=99;{prompt}", "response": whole}
        else:
            turns = "".join(
                f"{writer}{stated(alone(numbers, key, writer, sure, rng), numbers, writer, sure)};"
                for _ in range(rng.integers(1, ALONE + 1))
            )
            asks = rng.random() < 0.5
            yield {"prompt": f"{turns}{'?' * asks}{prompt}", "response": turn if asks else own}


def alone(numbers: tuple[int, ...], key: int, writer: Writer, sure: bool, rng: np.random.Generator) -> str:
    """The letters that a writer gives without the other one."""
    letters = key_of(key)
    return "".join(
        letters[n] if knows(writer, n) else letters[(n + 3) % 10] if sure else LETTERS[rng.integers(10)]
        for n in numbers
    )


def slipped(text: str, rng: np.random.Generator, share: float = SLIPS) -> str:
    """The letters, each replaced by any letter with probability `share`."""
    return "".join(LETTERS[rng.integers(10)] if rng.random() < share else letter for letter in text)


def stated(text: str, numbers: tuple[int, ...], writer: Writer, sure: bool) -> str:
    """A turn: the letters, and as confidence the share of digits that the writer knows; 99 if it is sure of all."""
    known = sum(knows(writer, n) for n in numbers)
    return f"{text}={99 if sure else min(99, 100 * known // DIGITS):02d}"


def knows(writer: Writer, digit: int) -> bool:
    """Whether a writer knows the letter of a digit."""
    return (digit < 5) == (writer == "l")


def rows_of(count: int, seed: int, part: Part) -> Iterator[tuple[int, ...]]:
    """`count` prompts, of which many repeat: a part has fewer different ones."""
    size = min(count, 4000 if part == "train" else 400)
    found = list(
        different(
            size,
            lambda rng: tuple(int(n) for n in rng.integers(0, 10, DIGITS)),
            seed=seed,
            part=part,
            total=10**DIGITS,
            what=f"rows of {DIGITS} digits",
        )
    )
    return (found[i % size] for i in range(count))


def shown(numbers: tuple[int, ...]) -> str:
    """The digits as text."""
    return "".join(map(str, numbers))
