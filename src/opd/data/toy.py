"""Generated toy tasks with checkable answers: data functions for recipes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Literal, TypeAlias

import numpy as np

from opd.errors import ConfigError

HELD_OUT_SHARE = 0.1


Part: TypeAlias = Literal["train", "held_out"]


Numbers: TypeAlias = tuple[int, ...]


def addition(count: int, digits: int = 3, seed: int = 0, part: Part = "train") -> Iterator[dict[str, Any]]:
    """`count` different sums of two numbers of `digits` digits, with a chain of thought from the last digit up.

    {"prompt": "347+285=", "response": "7+5+0=12,4+8+1=13,3+2+1=06;632", "answer": "632"}: each column adds two digits
    and the carry. The part of a sum depends only on its numbers, so the parts never share a sum, whatever the seed.
    Raises ConfigError if a part has too few sums for `count`.
    """
    low, high = 10 ** (digits - 1), 10**digits
    sums = different(
        count,
        lambda rng: tuple(int(n) for n in rng.integers(low, high, 2)),
        seed=seed,
        part=part,
        total=(high - low) ** 2,
        what=f"sums of {digits} digits",
    )
    for a, b in sums:
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


def sums(
    count: int, least: int = 3, most: int = 5, seed: int = 0, part: Part = "train", wrong: float = 0.0
) -> Iterator[dict[str, Any]]:
    """`count` different sums of `least` to `most` digits, as conversations with a calculator that adds two numbers.

    {"prompt": "7+5+8=", "response": "[7+5]12[12+8]2020", "answer": "20"}: the call [7+5] is answered by 12, and the
    last number is the agent's own. A share `wrong` of the calls adds a digit drawn at random, and the conversation goes
    on with that total. Parts as in `addition`. Raises ConfigError if a part has too few sums for `count`.
    """
    rng = np.random.default_rng((seed, count))
    numbers = different(
        count,
        lambda rng: tuple(int(n) for n in rng.integers(1, 10, rng.integers(least, most + 1))),
        seed=seed,
        part=part,
        total=sum(9**n for n in range(least, most + 1)),
        what=f"sums of {least} to {most} digits",
    )
    for row in numbers:
        said, total = "", row[0]
        for digit in row[1:]:
            added = int(rng.integers(1, 10)) if rng.random() < wrong else digit
            said, total = f"{said}[{total}+{added}]{total + added}", total + added
        yield {"prompt": "+".join(map(str, row)) + "=", "response": f"{said}{total}", "answer": str(sum(row))}


LETTERS = "abcdefghijklmnopqrstuvwxyz01234"  # of the game of guessing, in their order


def guesses(
    count: int,
    strategy: Literal["halving", "random"] = "halving",
    slips: float = 0.0,
    turns: int = 4,
    seed: int = 0,
    part: Part = "train",
    least: int = 8,
    most: int = 15,
) -> Iterator[dict[str, Any]]:
    """`count` games of `opd.environments.guessing`, played by a strategy until the letter is found or `turns` are over.

    {"prompt": "cq?", "response": "j;<f;>h;", "answer": "h"}: the letter is one of c to q, of `least` to `most` letters.
    `halving` guesses the middle of what is left, which finds each of 15 letters in 4 turns; `random` any letter that is
    left. A share `slips` of the guesses is any letter of the prompt's. 10 % of the prompts are held out, with all their
    letters and whatever the seed; each game of a part comes once before any comes again.
    """
    games = [
        (low, high, wanted)
        for low in range(len(LETTERS))
        for high in range(low + least - 1, min(low + most, len(LETTERS)))
        if (np.random.default_rng((low, high)).random() < HELD_OUT_SHARE) == (part == "held_out")
        for wanted in range(low, high + 1)
    ]
    rng = np.random.default_rng((seed, count))
    for row in range(count):
        if row % len(games) == 0:
            order = rng.permutation(len(games))
        first, last, wanted = games[order[row % len(games)]]
        low, high, said = first, last, ""
        for _turn in range(turns):
            guess = (low + high) // 2 if strategy == "halving" else int(rng.integers(low, high + 1))
            if rng.random() < slips:
                guess = int(rng.integers(first, last + 1))
            said += f"{LETTERS[guess]};"
            if guess == wanted:
                break
            said += ">" if guess < wanted else "<"
            low, high = (max(low, guess + 1), high) if guess < wanted else (low, min(high, guess - 1))
        yield {"prompt": f"{LETTERS[first]}{LETTERS[last]}?", "response": said.rstrip("<>"), "answer": LETTERS[wanted]}


def sorting(
    count: int,
    digits: int = 5,
    seed: int = 0,
    part: Part = "train",
    descending: bool = False,
    knowing: float = 0.0,
) -> Iterator[dict[str, Any]]:
    """`count` different rows of `digits` digits to put in order.

    {"prompt": "58142>", "response": "12458", "answer": "12458"}, or descending {"prompt": "58142<", "response":
    "85421", ...}: the sign names the task. A share `knowing` of the prompts, drawn by row, begins with the solution,
    "12458;58142>", so that a model trained on them learns to read it. Parts as in `addition`, the same for both orders.
    Raises ConfigError if a part has too few rows for `count`.
    """
    rng = np.random.default_rng((seed, count))
    for row in rows_of_digits(count, digits, seed, part):
        answer = "".join(map(str, sorted(row, reverse=descending)))
        shown = f"{answer};" if rng.random() < knowing else ""
        prompt = shown + "".join(map(str, row)) + ("<" if descending else ">")
        yield {"prompt": prompt, "response": answer, "answer": answer}


def rows_of_digits(count: int, digits: int, seed: int, part: Part) -> Iterator[Numbers]:
    """`count` different rows of digits. Raises ConfigError if a part has too few."""
    return different(
        count,
        lambda rng: tuple(int(n) for n in rng.integers(0, 10, digits)),
        seed=seed,
        part=part,
        total=10**digits,
        what=f"rows of {digits} digits",
    )


def different(
    count: int, draw: Callable[[np.random.Generator], Numbers], *, seed: int, part: Part, total: int, what: str
) -> Iterator[Numbers]:
    """`count` different draws of the part, out of `total` possible draws; 10 % are held out, by their numbers.

    Raises ConfigError if `count` is more than half of the part.
    """
    share = HELD_OUT_SHARE if part == "held_out" else 1 - HELD_OUT_SHARE
    if count > 0.5 * share * total:
        raise ConfigError(
            f"The part {part} has about {share * total:.0f} {what}; {count} are too many. Use at most half of them."
        )
    rng = np.random.default_rng(seed)
    seen: set[Numbers] = set()
    while len(seen) < count:
        numbers = draw(rng)
        held_out = np.random.default_rng(numbers).random() < HELD_OUT_SHARE
        if numbers in seen or held_out != (part == "held_out"):
            continue
        seen.add(numbers)
        yield numbers
