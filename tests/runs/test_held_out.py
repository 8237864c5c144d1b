"""Held-out prompts that are training prompts are counted, with the remedy."""

from __future__ import annotations

from typing import Any

import pytest

from opd.recipe.schema import DataSection
from opd.runs.held_out import remedy, shared, words_of
from opd.types import Prompt


def prompt(content: Any) -> Prompt:
    return Prompt(id=0, content=content)


def test_words_are_compared_without_system_messages_and_white_space():
    user = {"role": "user", "content": "1 + 1\n= "}
    system = {"role": "system", "content": "Be short."}
    assert words_of(prompt("1 + 1 =")) == words_of(prompt((user,))) == words_of(prompt((system, user)))
    reply = {"role": "assistant", "content": "2"}
    assert words_of(prompt((user, reply, user))) != words_of(prompt((user,)))


def test_shared_counts_held_out_prompts():
    training = {words_of(prompt(text)) for text in ("a", "b")}
    assert shared(training, [prompt("a"), prompt(" a "), prompt("c")]) == 2


@pytest.mark.parametrize(
    ("training", "held_out", "says"),
    [
        ({"path": "reasoning_gym:gcd", "limit": 40, "skip": 2}, {"path": "reasoning_gym:gcd"}, "`skip: 42`"),
        ({"path": "reasoning_gym:gcd"}, {"path": "reasoning_gym:gcd"}, "`skip: 500`"),
        ({"path": "a.jsonl"}, {"path": "b.jsonl"}, "{by: {path: a.jsonl}, keep: far}"),
    ],
)
def test_remedy_names_the_key(training, held_out, says):
    assert says in remedy(DataSection(**training), DataSection(**held_out))
