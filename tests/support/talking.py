"""An environment for recipes of tests, `talking:talker`: it speaks from the seed of the conversation alone."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

from opd.environments.protocol import Begun, Environment, Observation, Seed, Turn
from opd.types import Prompt


@dataclass(frozen=True, slots=True)
class Talker(Environment):
    """Says a few digits, gives a reward for some turns, and ends after one to `longest` turns."""

    longest: int
    name: str = "talker"
    rewards: bool = True

    def begin(self, prompt: Prompt, *, seed: Seed) -> Begun:
        own = random.Random(repr(seed))
        return Begun(state={"random": own, "left": own.randint(1, self.longest)})

    def act(self, state: Any, turn: Turn) -> Observation:
        state["left"] -= 1
        said = "".join(state["random"].choice("0123456789;") for _ in range(state["random"].randint(1, 3)))
        reward = 1.0 if turn.text[:1] in ("1", "3", "5") else None
        return Observation(text=said, reward=reward, done=state["left"] == 0)


def talker(longest: int = 3) -> Talker:
    return Talker(longest=longest)
