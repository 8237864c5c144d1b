"""Games of textarena's GuessTheNumber as conversations, played on the spot by a player who halves what is left.

    game     You have to guess the number between 4 and 14 within 3 turns. ... Enter your guess.
    student  [9]
    game     The target number is lower.

For `sft` with `data.assistant_turns: all`. In a stage with the environment `textarena:GuessTheNumber-v0` a row is
another game between the same two numbers, which are in the column `game`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from opd.data.toy import HELD_OUT_SHARE, Part
from opd.environments.protocol import Turn
from opd.environments.textarena_games import Game, game_of
from opd.errors import ConfigError
from opd.types import Message, Prompt


def games(
    count: int,
    slips: float = 0.0,
    seed: int = 0,
    part: Part = "train",
    largest: int = 20,
    least: int = 8,
    most: int = 15,
    max_turns: int = 3,
    game: str = "GuessTheNumber-v0",
) -> Iterator[dict[str, Any]]:
    """`count` games, each of `least` to `most` numbers in a row out of 1 to `largest`.

    {"prompt": [the game's text], "response": [the turns], "game": {"min_number": 4, "max_number": 14, "max_turns": 3}}.
    Each guess is the middle of what is left, and a share `slips` of them any of the game's numbers, also one that was
    guessed before, which the game refuses. 10 % of the ranges are held out, whatever the seed; each range of a part
    comes once before any comes again. `max_turns` is what the game says: textarena 0.7 takes one guess more.
    Raises ConfigError for a part without ranges, and where textarena is missing or has no such game.
    """
    played = game_of(game, {}, "opd.environments.guess_number:games")
    ranges = [
        (low, high)
        for low in range(1, largest + 1)
        for high in range(low + least - 1, min(low + most - 1, largest) + 1)
        if (np.random.default_rng((low, high)).random() < HELD_OUT_SHARE) == (part == "held_out")
    ]
    if not ranges:
        raise ConfigError(
            f"opd.environments.guess_number:games has no {least} to {most} numbers in a row out of 1 to {largest} in "
            f"the part {part}. Raise `largest` or `most`, or lower `least`."
        )
    rng = np.random.default_rng((seed, count))
    for row in range(count):
        if row % len(ranges) == 0:
            order = rng.permutation(len(ranges))
        low, high = ranges[order[row % len(ranges)]]
        options = {"min_number": low, "max_number": high, "max_turns": max_turns}
        number = int(rng.integers(2**31))
        said = _messages(played, Prompt(id=number, content=(), metadata={"game": options}), low, high, slips, rng)
        yield {"prompt": said[:1], "response": said[1:], "game": options}


def _messages(game: Game, prompt: Prompt, low: int, high: int, slips: float, rng: np.random.Generator) -> list[Message]:
    """One game to its end: its messages, of which the last is the player's."""
    begun = game.begin(prompt, seed=(0, 0, prompt.id, 0))
    assert begun.content is not None
    said: list[Message] = [*begun.content]  # type: ignore[list-item]
    first, last = low, high
    while True:
        guess = int(rng.integers(first, last + 1)) if rng.random() < slips else (low + high) // 2
        said.append({"role": "assistant", "content": f"[{guess}]"})
        answer = game.act(begun.state, Turn(text=f"[{guess}]"))
        if answer.done:
            return said
        said.append({"role": "user", "content": answer.text})
        if answer.text.endswith("higher."):
            low = max(low, guess + 1)
        elif answer.text.endswith("lower."):
            high = min(high, guess - 1)
