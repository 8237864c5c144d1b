"""The program that judges, and the table that its rewards are held against."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from opd.rewards.rubric_texts import Criterion, read_rubric, read_verdicts, rubric_question, verdict_question
from opd.samplers.asked.protocol import Question
from opd_studies.worlds.graders import ALPHABET, STATEMENTS, grader
from opd_studies.worlds.rubric_table import Table, advantage_of, arms_of, judged_by, played, spearman

RIGHT = ["01234", "01234"]
WRONG = ["43210", "3142"]


def asks(teacher: list[str], student: list[str]) -> Question:
    return rubric_question("31420>", teacher, student, (4, 12), 0.7)


def applies(answers: list[str], sources: list[str] | None = None) -> Question:
    rubric = tuple(Criterion(statement, 1) for statement in STATEMENTS)
    return verdict_question("31420>", rubric, answers, sources, 0.0)


def test_grader_writes_rubric_from_contrast():
    question = asks(RIGHT, WRONG)
    rubric = read_rubric(question, grader(question))
    points = {one.text: one.points for one in rubric}
    assert points["Its digits never fall."] == 5  # true of both of the teacher's, of none of the student's
    assert sorted(points.values()) == [1] * (len(points) - 2) + [4, 5]
    assert len(points) < 9
    assert "Its digits never rise." not in points
    assert "It has a 7." not in points


def test_grader_writes_fewest_criteria_when_answers_are_equal():
    question = asks(RIGHT, RIGHT)
    assert [one.points for one in read_rubric(question, grader(question))] == [5, 4, 1, 1]


def test_grader_gives_right_answer_true_verdicts():
    (verdicts,) = read_verdicts(applies(["01234"]), grader(applies(["01234"])))
    true = {statement for statement, met in zip(STATEMENTS, verdicts, strict=True) if met}
    assert {"Its digits never fall.", "It has each digit as often as the task has it."} <= true
    assert {"Its digits never rise.", "It has a 7."}.isdisjoint(true)


def table_of(question: Question, **options: Any) -> np.ndarray:
    return np.array(json.loads(grader(question, **options))["verdicts"])


def test_grader_flips_share_of_noise_by_salt():
    answers = [f"{i:05d}" for i in range(400)]
    clear, noisy, other = (table_of(applies(answers), **o) for o in ({}, {"noise": 0.2}, {"noise": 0.2, "salt": 1}))
    count = clear.size
    assert abs((clear != noisy).mean() - 0.2) < 4 * (0.16 / count) ** 0.5
    assert (noisy != other).any()
    assert (table_of(applies(answers), noise=0.2) == noisy).all()


def test_grader_bias_denies_only_student_answers_when_told():
    answers, half = ["01234"] * 400, ["student"] * 200 + ["teacher"] * 200
    clear, told = table_of(applies(answers)), table_of(applies(answers, half), bias=0.5)
    assert (table_of(applies(answers), bias=0.5) == clear).all()
    assert (told[200:] == clear[200:]).all()
    assert (told <= clear).all()
    true = int(clear[:200].sum())
    assert abs(told[:200].sum() / true - 0.5) < 4 * (0.25 / true) ** 0.5


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        ([1, 2, 3], [10, 20, 90], 1.0),
        ([1, 2, 3], [3, 2, 1], -1.0),
        ([1, 1, 2], [1, 2, 3], 0.8660254),
        ([1, 1], [1, 2], None),
    ],
)
def test_spearman_gives_rank_correlation(a: list[float], b: list[float], expected: float | None):
    got = spearman(np.array(a), np.array(b))
    assert got == (None if expected is None else pytest.approx(expected))


def test_arms_of_has_right_answer_and_quality():
    one = arms_of(0, Table(), np.random.default_rng(0))
    task = str(one.prompt.content)[:-1]
    assert one.answers[0] == "".join(sorted(task))
    assert one.quality[0] == 1.0
    assert len(set(one.answers)) == 24
    assert one.quality.max() == 1.0
    assert (one.quality[1:] < 1).all()


def test_advantage_of_rewards_right_answer_most_often(tmp_path: Path):
    rng = np.random.default_rng(1)
    tasks = [arms_of(i, Table(), rng) for i in range(6)]
    drawn = [np.arange(24) for _ in tasks]
    rewards, advantages = advantage_of(tasks, drawn, judged_by({}, {}, tmp_path))
    assert (rewards.argmax(1) == 0).mean() > 0.5
    assert np.abs(advantages.mean(1)).max() < 1e-5


def test_played_raises_quality(tmp_path: Path):
    small = Table(prompts=4, updates=12, salts=2)
    before = played(Table(prompts=4, updates=0, salts=2), 0, {}, {}, tmp_path / "a")
    after = played(small, 0, {}, {}, tmp_path / "b")
    assert after["quality"] > before["quality"] + 0.1
    assert after["rank correlation"] == before["rank correlation"] > 0.3


def rubric_of(question: Question, **options: Any) -> dict[str, int]:
    return {one.text: one.points for one in read_rubric(question, grader(question, **options))}


def test_grader_keeps_more_statements_when_share_is_lower():
    question = asks(["01234", "43210", "01234", "43210"], ["98", "87"])
    rising = "Its digits never fall."
    assert rising not in rubric_of(question)
    assert rising in rubric_of(question, share=0.5)
    assert len(rubric_of(question, share=0.5)) > len(rubric_of(question))


def test_grader_gives_points_to_shared_letters():
    question = asks(["abcde", "abfgh", "abij", "abkl"], ["acdefghijkl", "cdefghijkl"])
    points = rubric_of(question, share=0.5, answers="letters")
    assert points["It has the letter b."] == 5  # in all of the teacher's texts, in none of the student's
    assert points["It has the letter a."] == 4


def test_arms_of_wants_letters_held_by_texts():
    table = Table(answers="letters", texts=2000, arms=200)
    one = arms_of(3, table, np.random.default_rng(0))
    texts: Any = one.prompt.metadata["teacher_answers"]
    held = {letter: np.mean([letter in text for text in texts]) for letter in ALPHABET}
    wanted = {letter for letter, share in held.items() if share > 0.65}
    assert len(wanted) == 4
    assert {letter: share > 0.65 for letter, share in held.items()} == {c: c in wanted for c in ALPHABET}
    assert one.taught == pytest.approx(0.8, abs=0.02)
    assert one.quality.mean() == pytest.approx(0.5, abs=0.06)
    for answer, quality in zip(one.answers, one.quality, strict=True):
        assert quality == pytest.approx(len(wanted & set(answer)) / 4)
