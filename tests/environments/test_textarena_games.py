"""Games of textarena, where it is installed: `pip install 'opd[textarena]'`."""

from __future__ import annotations

import random
import re

import pytest

from opd.environments.protocol import Turn
from opd.environments.textarena_games import game_of
from opd.errors import ConfigError
from opd.types import Prompt

pytest.importorskip("textarena", reason="needs textarena: `pip install 'opd[textarena]'`")


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


def test_row_has_options_of_its_own():
    """Beside those of the environment; a game that does not take them is refused with the row."""
    game = game_of("GuessTheNumber-v0", {"max_number": 9, "max_turns": 5}, "stage")
    row = Prompt(id=0, content="x", metadata={"game": {"min_number": 3, "max_number": 8}})
    assert "between 3 and 8 within 5 turns" in str(game.begin(row, seed=(0, 1, 0, 0)).content)
    with pytest.raises(TypeError, match="largest"):
        game.begin(Prompt(id=0, content="x", metadata={"game": {"largest": 5}}), seed=(0, 1, 0, 0))


@pytest.mark.parametrize(
    ("last", "invalid", "won", "done", "reward"),
    [
        ("seven", 1.0, 0.0, False, None),  # refused once
        ("[99]", 1.0, 0.0, False, None),
        ("seven [99]", 2.0, 0.0, True, 0.0),  # twice in turn: lost
        ("[1] [2] [3]", 0.0, 1.0, True, 1.0),  # one of all numbers
    ],
)
def test_invalid_moves_and_won_games_are_counted(
    last: str, invalid: float, won: float, done: bool, reward: float | None
):
    game = game_of("GuessTheNumber-v0", {"max_number": 3, "max_turns": 9}, "stage")
    state = game.begin(Prompt(id=0, content="x"), seed=(0, 1, 0, 0)).state
    counted = {"invalid_moves": 0.0, "won": 0.0}
    for move in last.split():
        found = game.act(state, Turn(text=move))
        counted = {name: number + found.counts[name] for name, number in counted.items()}
        if found.done:
            break
    assert counted == {"invalid_moves": invalid, "won": won}
    assert (found.done, found.reward) == (done, reward)
