"""Games of textarena (`pip install 'opd[textarena]'`) for one player, `textarena:GuessTheNumber-v0`.

A row of the data is a game: its prompt's id seeds it, so that all responses to a prompt play the same one. The game's
own text takes the place of the prompt; system messages stay before it. The reward is the game's, at its end.
"""

from __future__ import annotations

import contextlib
import importlib
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from opd.environments.protocol import Begun, Environment, Observation, Seed, Turn
from opd.errors import ConfigError, nearest
from opd.plugins import RAISED
from opd.types import Message, Prompt


@dataclass(slots=True)
class _Played:
    """One game, and its own state of the global generators, which textarena's games draw from."""

    game: Any
    generators: tuple[Any, Any]

    @contextlib.contextmanager
    def alone(self) -> Iterator[Any]:
        """The game, with its own random numbers: nothing is shared with other games or with the run."""
        before = random.getstate(), np.random.get_state()
        random.setstate(self.generators[0])
        np.random.set_state(self.generators[1])
        try:
            yield self.game
        finally:
            self.generators = random.getstate(), np.random.get_state()
            random.setstate(before[0])
            np.random.set_state(before[1])


@dataclass(frozen=True, slots=True, kw_only=True)
class Game(Environment):
    """A game by its id in textarena's registry, in its raw form: an observation has what is new alone."""

    id: str
    options: Mapping[str, Any] = field(default_factory=dict[str, Any])
    name: str = "textarena"
    rewards: bool = True

    def begin(self, prompt: Prompt, *, seed: Seed) -> Begun:
        """Raises what the game raises for options of the row that it does not take."""
        own = prompt.metadata.get("game") or {}
        played, text = self._started(random.Random(f"{seed[0]} {seed[2]}").getrandbits(31), own)
        if isinstance(prompt.content, str):
            return Begun(state=played, content=text)
        first: list[Message] = [one for one in prompt.content if one["role"] == "system"]
        return Begun(state=played, content=(*first, {"role": "user", "content": text}))

    def act(self, state: Any, turn: Turn) -> Observation:
        with state.alone() as game:
            done, _ = game.step(turn.text)
            said = game.get_observation()[1]
            given, of_player = game.close() if done else (None, {})
        reward = None if not given else float(given.get(0, 0.0))
        refused = _refused(said) or bool(of_player and of_player[0].get("invalid_move"))
        counts = {"invalid_moves": float(refused), "won": float(reward is not None and reward >= 1.0)}
        return Observation(text=_text(said), reward=reward, done=bool(done), counts=counts)

    def _started(self, seed: int, own: Mapping[str, Any] = {}) -> tuple[_Played, str]:
        """A game that has begun, with a row's `own` options, and its text."""
        numpy = np.random.RandomState(seed).get_state()
        played = _Played(None, (random.Random(seed).getstate(), numpy))
        with played.alone():
            played.game = importlib.import_module("textarena").make(self.id, **{**self.options, **own})
            played.game.reset(num_players=1, seed=seed)
            text = _text(played.game.get_observation()[1])
        return played, text


def game_of(game_id: str, options: Mapping[str, Any], where: str) -> Game:
    """A game, begun once to see that it works. Raises ConfigError."""
    try:
        registry = importlib.import_module("textarena.envs.registration").ENV_REGISTRY
    except ImportError as error:
        raise ConfigError(
            f"{where}: textarena is not installed ({error}). Install it with `pip install 'opd[textarena]'`."
        ) from error
    raw = game_id if game_id.endswith("-raw") else f"{game_id}-raw"
    if raw not in registry:
        known = [name.removesuffix("-raw") for name in registry if name.endswith("-raw")]
        raise ConfigError(
            f"{where}: textarena has no game {game_id!r}.{nearest(game_id, known)} It has {len(known)} games."
        )
    game = Game(id=raw, options=dict(options), name=f"textarena:{game_id}")
    try:
        game._started(0)
    except RAISED as error:  # a game may need several players, a download, or other options
        raise ConfigError(
            f"{where}: the game {game_id!r} does not begin with one player and the options {dict(options)}: "
            f"{type(error).__name__}: {' '.join(str(error).split()):.300}. Choose another game, or correct the options."
        ) from error
    return game


def _refused(observation: Any) -> bool:
    """Whether the game refused the move and wants another one."""
    return not isinstance(observation, str) and any(kind.name == "GAME_ADMIN" for _, _, kind in observation)


def _text(observation: Any) -> str:
    """What the game has said since the last turn, without the player's own words."""
    if isinstance(observation, str):
        return observation
    return "\n".join(str(message).strip() for sender, message, kind in observation if kind.name != "PLAYER_ACTION")
