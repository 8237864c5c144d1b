"""The study of debates: what each writer learns of the key, and how the settings differ."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.models import rollout_of, tiny
from support.study_numbers.debating import debate_numbers

from opd import methods
from opd.pieces.debate import NAME, Turn
from opd.types import Prompt
from opd_studies.claims import debate
from opd_studies.lab.ablation import START, TEACHER
from opd_studies.lab.lab import Lab
from opd_studies.page.outcome import state
from opd_studies.worlds import half_keys
from opd_studies.worlds.half_keys import TEXTS


def test_key_gives_each_digit_another_letter():
    assert sorted(half_keys.key_of(3)) == sorted(half_keys.LETTERS)
    assert half_keys.key_of(3) != half_keys.key_of(4)


@pytest.mark.parametrize("sure", [True, False])
@pytest.mark.parametrize("writer", ["l", "r"])
def test_writer_knows_its_half_and_says_so(writer: Any, sure: bool):
    rng, key = np.random.default_rng(0), half_keys.key_of(5)
    numbers = (0, 4, 5, 9)
    known = [0, 1] if writer == "l" else [2, 3]
    texts = {half_keys.alone(numbers, 5, writer, sure, rng) for _ in range(40)}
    assert all(text[i] == key[numbers[i]] for text in texts for i in known)
    assert (len(texts) == 1) == sure
    if sure:
        (text,) = texts
        assert all(text[i] != key[numbers[i]] for i in range(4) if i not in known)
    stated = half_keys.stated("abcd", numbers, writer, sure)
    assert re.fullmatch(TEXTS["tag"], stated.removeprefix("abcd"))
    assert stated.endswith("99" if sure else "50")


def test_taught_rows_complete_the_key_after_a_debate_alone():
    key, seen = half_keys.key_of(2), set[str]()
    right = {"plain": 0, "debate": 0}
    count = dict.fromkeys(right, 0)
    for row in half_keys.taught(3000, 2, "l", True, seed=1):
        *turns, last = row["prompt"].split(";")
        digits = last.lstrip("?").rstrip(">")
        whole = "".join(key[int(digit)] for digit in digits)
        both = {turn[0] for turn in turns} == {"l", "r"}
        kind = "debate" if both else "plain"
        count[kind] += 1
        right[kind] += row["response"][:4] == whole
        seen.add(f"{len(turns)}{'?' * last.startswith('?')}")
        assert ("=" in row["response"]) == last.startswith("?")
    assert right["debate"] / count["debate"] > 0.85
    assert right["plain"] / count["plain"] < 0.12
    assert {"0", "0?", "2?", "4", "1", "3?"} <= seen


def test_asked_rows_have_right_answer_and_formed_ones_do_not():
    key = half_keys.key_of(7)
    for row in half_keys.asked(50, 7):
        assert row["answer"] == "".join(key[int(digit)] for digit in row["prompt"].rstrip(">"))
    formed = list(half_keys.formed(500, seed=7))
    right = [row["response"] == "".join(key[int(d)] for d in row["prompt"].rstrip(">")) for row in formed]
    assert sum(right) < 5


def rollouts() -> list[Any]:
    student = tiny()
    made: list[Any] = []
    for i, letter in enumerate("abc"):
        turns = [[Turn(teacher=who, text=letter + who, confidence=50.0, answered=True) for who in "lr"]]
        prompt = Prompt(id=i, content=letter, metadata={NAME: turns}, teacher_id="l+r")
        made.append(rollout_of(student, prompt, [2]))
    return made


def test_shuffled_debate_shows_that_of_the_next_prompt():
    method = methods.build("opd_studies.worlds.methods:shuffled_debate", TEXTS)
    found = [context.views["l"].content for context in method.context(rollouts())]
    assert found == ["lbl;rbr;a", "lcl;rcr;b", "lal;rar;c"]


def test_one_reader_weighs_that_teacher_alone():
    method = methods.build("opd_studies.worlds.methods:one_reader", {**TEXTS, "reader": "r"})
    plain = methods.build("mad_opd", TEXTS)
    for one, both in zip(method.context(rollouts()), plain.context(rollouts()), strict=True):
        assert one.teacher_weights == {"r": 1.0}
        assert one.views == both.views


@pytest.mark.parametrize(
    ("setting", "accuracy", "failing"),
    [
        ("A: no debate", 0.85, [2]),
        ("A: another prompt's debate", 0.85, [3]),
        ("A: one reads the debate", 0.9, [4]),
        ("A: one, as many turns", 0.95, [5]),
        ("A: teacher r", 0.9, [0]),
    ],
)
def test_debate_judge_rejects_what_a_control_does_as_well(setting: str, accuracy: float, failing: list[int]):
    numbers = debate_numbers(True, True)
    assert [state(one.checks) for one in debate.judge(numbers)] == ["holds"] * 6
    numbers[setting] = {"sampled accuracy": [accuracy + 0.001 * i for i in range(5)]}
    states = [state(one.checks) for one in debate.judge(numbers)]
    assert [i for i, one in enumerate(states) if one != "holds"] == failing


def test_debate_measure_runs_at_reduced_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(debate, "SETTINGS", {name: debate.SETTINGS[name] for name in debate.GUESSING})
    small = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    size = debate.Size(seeds=(0,), steps=2, prompts_per_step=2, teacher_steps=2, student_steps=2, model=small)
    numbers = debate.measure(Lab(folder=tmp_path, workers=1), replace(size))
    rows = [START, f"{TEACHER} l", f"{TEACHER} r", *debate.GUESSING]
    assert list(numbers) == [f"{kind}: {row}" for kind in "AB" for row in rows]
    assert all(len(one["sampled accuracy"]) == 1 for one in numbers.values())
