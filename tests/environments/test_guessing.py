"""The game of guessing: its answers, its rows, and rows that it refuses."""

from __future__ import annotations

import pytest

from opd.data.toy import LETTERS, guesses
from opd.environments.guessing import guessing
from opd.environments.protocol import Turn
from opd.errors import DataError
from opd.types import Prompt

SEED = (0, 1, 2, 3)


def test_guesses_are_answered_until_the_letter_is_found():
    game = guessing()
    state = game.begin(Prompt(id=2, content="?", answer="h"), seed=SEED).state
    assert game.act(state, Turn(text="p;")).text == "<"
    assert game.act(state, Turn(text="c;")).text == ">"
    found = game.act(state, Turn(text="h;"))
    assert (found.done, found.reward) == (True, 1.0)


@pytest.mark.parametrize("text", ["", ";", "ab;", "!;", "<;"])
def test_a_turn_without_a_letter_is_counted(text: str):
    answer = guessing().act(3, Turn(text=text))
    assert (answer.text, answer.done, dict(answer.counts)) == ("?", False, {"no_guess": 1})


@pytest.mark.parametrize("answer", [None, "", "ab", "A", 7])
def test_game_refuses_rows_without_a_letter(answer: object):
    with pytest.raises(DataError, match="needs one of the letters abcdefghijklmnopqrstuvwxyz01234 as the row's"):
        guessing().begin(Prompt(id=2, content="?", answer=answer), seed=SEED)


@pytest.mark.parametrize("strategy", ["halving", "random"])
def test_rows_are_games_as_the_environment_answers_them(strategy):
    """Every letter is found by halving; at random the game may end before."""
    rows = list(guesses(count=200, strategy=strategy, slips=0.0 if strategy == "halving" else 0.3, seed=4))
    assert len({row["prompt"] for row in rows}) > 50
    game = guessing()
    for i, row in enumerate(rows):
        first, last = (LETTERS.index(letter) for letter in row["prompt"][:2])
        assert 8 <= last - first + 1 <= 15
        state = game.begin(Prompt(id=i, content=row["prompt"], answer=row["answer"]), seed=SEED).state
        assert first <= state <= last
        said, turns = "", [part.lstrip("<>") for part in row["response"].split(";")[:-1]]
        for turn in turns:
            assert first <= LETTERS.index(turn) <= last
            answer = game.act(state, Turn(text=f"{turn};"))
            said += f"{turn};{answer.text}"
        assert said.rstrip("<>") == row["response"]
        assert len(turns) <= 4
        assert (answer.reward == 1.0) or (strategy == "random" and len(turns) == 4)


def test_parts_share_no_prompt_and_hold_every_game_once():
    parts = [list(guesses(count=2000, part="train", seed=5)), list(guesses(count=2000, part="held_out", seed=6))]
    prompts = [{row["prompt"] for row in rows} for rows in parts]
    assert not prompts[0] & prompts[1]
    assert len(prompts[0] | prompts[1]) == sum(31 - size + 1 for size in range(8, 16))
    for rows, names in zip(parts, prompts, strict=True):
        games = sum(LETTERS.index(name[1]) - LETTERS.index(name[0]) + 1 for name in names)
        assert len({(row["prompt"], row["answer"]) for row in rows[:games]}) == games
