"""Games of textarena's GuessTheNumber as conversations: what they hold, and what they need."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from typing import Any

import pytest

from opd.data.prompts import load_prompts
from opd.environments.guess_number import games
from opd.errors import ConfigError
from opd.recipe.schema import DataSection

GAMES = "opd.environments.guess_number:games"

textarena = pytest.mark.skipif(find_spec("textarena") is None, reason="needs textarena: `pip install 'opd[textarena]'`")


def said(row: dict[str, Any], role: str) -> list[str]:
    """The texts of one side behind the prompt."""
    return [message["content"] for message in row["response"] if message["role"] == role]


def test_games_without_textarena_name_the_extra(monkeypatch: pytest.MonkeyPatch):
    for name in ("textarena", "textarena.envs.registration"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(
        ConfigError, match=rf"{GAMES}: textarena is not installed .* `pip install 'opd\[textarena\]'`\.$"
    ):
        load_prompts(DataSection(path=GAMES, options={"count": 2}, assistant_turns="all"))


@textarena
def test_games_halve_until_the_number_is_found():
    rows = list(games(count=300, seed=1))
    for row in rows:
        low, high = row["game"]["min_number"], row["game"]["max_number"]
        assert 8 <= high - low + 1 <= 15
        assert f"between {low} and {high} within 3 turns" in row["prompt"][0]["content"]
        guesses, answers = said(row, "assistant"), said(row, "user")
        assert len(guesses) <= 4
        for guess, answer in zip(guesses, [*answers, ""], strict=True):
            middle = (low + high) // 2
            assert guess == f"[{middle}]"
            low, high = (low, middle - 1) if answer.endswith("lower.") else (middle + 1, high)
    assert {len(said(row, "assistant")) for row in rows} == {1, 2, 3, 4}


@textarena
def test_slips_are_other_guesses_and_refused_moves():
    rows = list(games(count=300, seed=1, slips=0.4))
    first = [int(said(row, "assistant")[0][1:-1]) for row in rows]
    middles = [(row["game"]["min_number"] + row["game"]["max_number"]) // 2 for row in rows]
    away = sum(guess != middle for guess, middle in zip(first, middles, strict=True)) / len(rows)
    assert 0.27 < away < 0.45  # 0.4 * 10.5 / 11.5 = 0.37, and 3.2 standard errors of 0.028
    refused = [answer for row in rows for answer in said(row, "user") if "invalid move" in answer]
    assert refused
    assert all("already guessed" in answer for answer in refused)


@textarena
def test_parts_share_no_range_and_hold_all_of_them():
    parts = [{str(row["game"]) for row in games(count=200, part=part, seed=3)} for part in ("train", "held_out")]
    assert not parts[0] & parts[1]
    assert len(parts[0] | parts[1]) == sum(20 - size + 1 for size in range(8, 16))


@textarena
def test_games_take_the_id_of_another_game():
    assert list(games(count=3, game="GuessTheNumber-v0-hardcore")) == list(games(count=3))
    with pytest.raises(ConfigError, match=r"no game 'GuessTheNumbr-v0'. Did you mean 'GuessTheNumber-v0'\?"):
        list(games(count=3, game="GuessTheNumbr-v0"))


@textarena
def test_games_without_a_range_of_numbers_are_refused():
    with pytest.raises(ConfigError, match="no 8 to 15 numbers in a row out of 1 to 7 in the part train"):
        list(games(count=3, largest=7))


@textarena
def test_rows_are_conversations_of_the_players_turns():
    loaded = load_prompts(DataSection(path=GAMES, options={"count": 20, "seed": 2}, assistant_turns="all"))
    for prompt in loaded:
        assert not isinstance(prompt.content, str)
        assert str(prompt.content[0]["content"]).endswith("Enter your guess.")
        assert [turn["role"] for turn in prompt.turns[::2]] == ["assistant"] * ((len(prompt.turns) + 1) // 2)
        assert prompt.metadata["game"]["max_turns"] == 3
