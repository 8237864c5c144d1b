"""Games of textarena, where it is installed: `pip install 'opd[textarena]'`."""

from __future__ import annotations

import random
import re

import pytest

from opd.environments.protocol import Turn
from opd.environments.textarena_games import game_of
from opd.errors import ConfigError
from opd.types import Prompt

pytest.importorskip("textarena")


def played(prompt: int, sample: int, seed: int = 0) -> tuple[list[int], float | None]:
    """GuessTheNumber by halving: the guesses, and the reward."""
    game = game_of("GuessTheNumber-v0", {}, "stage")
    begun = game.begin(Prompt(id=prompt, content="x"), seed=(seed, 1, prompt, sample))
    assert "between 1 and 20" in str(begun.content)
    low, high, guesses = 1, 20, []
    while True:
        guesses.append((low + high) // 2)
        found = game.act(begun.state, Turn(text=f"[{guesses[-1]}]"))
        if found.done:
            return guesses, found.reward
        low, high = (low, guesses[-1] - 1) if "lower" in found.text else (guesses[-1] + 1, high)


def test_game_is_won_and_its_number_depends_on_seed_and_prompt():
    games = {(prompt, seed): played(prompt, 0, seed) for prompt in range(4) for seed in range(2)}
    assert all(reward == 1.0 for _, reward in games.values())
    assert len({guesses[-1] for guesses, _ in games.values()}) > 2
    assert all(played(prompt, 1, seed) == one for (prompt, seed), one in games.items())


def test_game_leaves_the_global_generator_alone():
    random.seed(3)
    expected = random.random()
    random.seed(3)
    played(0, 0)
    assert random.random() == expected


def test_games_at_once_share_nothing():
    game = game_of("GuessTheNumber-v0", {}, "stage")
    states = [game.begin(Prompt(id=i, content="x"), seed=(0, 1, i, 0)).state for i in range(3)]
    answers = [game.act(state, Turn(text="[10]")).text for state in states]
    assert [game.act(state, Turn(text="[10]")).text for state in states] != answers


def test_chat_keeps_system_messages():
    game = game_of("GuessTheNumber-v0", {}, "stage")
    system = {"role": "system", "content": "Be brief."}
    begun = game.begin(Prompt(id=0, content=(system, {"role": "user", "content": "x"})), seed=(0, 1, 0, 0))
    assert begun.content is not None
    assert begun.content[0] == system
    assert len(begun.content) == 2


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("GuesTheNumber-v0", {}, r"no game 'GuesTheNumber-v0'. Did you mean 'GuessTheNumber-v0'\?"),
        ("GuessTheNumber-v0", {"largest": 5}, r"does not begin with one player and the options .*TypeError"),
        ("ConnectFour-v0", {}, r"does not begin with one player"),
    ],
)
def test_game_that_does_not_begin_is_refused(name: str, options: dict[str, int], message: str):
    with pytest.raises(ConfigError, match=message):
        game_of(name, options, "stage")


def test_invalid_move_is_said():
    game = game_of("GuessTheNumber-v0", {}, "stage")
    state = game.begin(Prompt(id=0, content="x"), seed=(0, 1, 0, 0)).state
    assert re.search("invalid move", game.act(state, Turn(text="seven")).text)
