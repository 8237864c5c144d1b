"""A game without words: guess one of up to 31 letters, each guess answered by < or >.

    prompt   cq?     the letter is one of c to q
    student  j;      guess, and the end of its turn
    game     <       the letter comes before j; after the right guess the game ends with the reward 1

As an environment: `name: "opd.environments.guessing:guessing"`, with `sampling.stop: [";"]`. The letter is the row's
`answer`; `opd.data.toy:guesses` makes rows.
"""

from __future__ import annotations

from typing import Any

from opd.data.toy import LETTERS
from opd.environments.protocol import Begun, Environment, Observation, Seed, Turn
from opd.errors import DataError
from opd.types import Prompt


class Guessing(Environment):
    """Answers guesses. A turn that is no letter of the game is answered by ?, and counted in environment/no_guess."""

    name = "guessing"
    rewards = True

    def begin(self, prompt: Prompt, *, seed: Seed) -> Begun:
        """Raises DataError for a row whose answer is no letter of the game."""
        if str(prompt.answer) not in LETTERS or len(str(prompt.answer)) != 1:
            raise DataError(
                f"Prompt {prompt.id}: the game of guessing needs one of the letters {LETTERS} as the row's `answer`, "
                f"got {prompt.answer!r}. `opd.data.toy:guesses` makes such rows."
            )
        return Begun(state=LETTERS.index(str(prompt.answer)))

    def act(self, state: Any, turn: Turn) -> Observation:
        guess = turn.text.removesuffix(";")
        if len(guess) != 1 or guess not in LETTERS:
            return Observation(text="?", counts={"no_guess": 1})
        place = LETTERS.index(guess)
        if place == state:
            return Observation(reward=1.0, done=True)
        return Observation(text=">" if place < state else "<")


def guessing() -> Guessing:
    """The game, for a recipe."""
    return Guessing()
