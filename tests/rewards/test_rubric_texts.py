"""What is asked of a judge, which answers are taken for one, and the number that they make."""

from __future__ import annotations

import json
from typing import Any

import oracle
import pytest

from opd.rewards.rubric_texts import (
    Criterion,
    blind_order,
    read_rubric,
    read_verdicts,
    rubric_question,
    share_of_points,
    verdict_question,
    without_thought,
)
from opd.samplers.asked.protocol import UnreadableError

RUBRIC = (Criterion("It is short.", 5), Criterion("It has a number.", 2), Criterion("It says why.", 1))
WRITES = rubric_question("2+2?", ["four", "4"], ["5"], (2, 3), 0.7)
APPLIES = verdict_question("2+2?", RUBRIC, ["four", "5"], None, 0.0)


def text_of(question: Any) -> str:
    (message,) = question.content
    assert message["role"] == "user"
    return message["content"]


def criteria(*points: Any, **more: Any) -> str:
    return json.dumps({"criteria": [{"criterion": f"c{i}", "points": p, **more} for i, p in enumerate(points)]})


# --- questions -------------------------------------------------------------------------------------------------------


def test_rubric_question_has_all_answers_and_bounds():
    text = text_of(WRITES)
    strong, weak = text.split("# Answers of the weaker model")
    assert "2 to 3 criteria" in text
    assert "2+2?" in strong
    assert "## Answer 1\nfour\n\n## Answer 2\n4" in strong
    assert "## Answer 1\n5" in weak
    assert (WRITES.temperature, APPLIES.temperature) == (0.7, 0.0)


def test_rubric_question_keeps_braces():
    assert "{x} and {{y}}" in text_of(rubric_question("{x} and {{y}}", ["{teacher}"], ["{n}"], (1, 2), 0.0))


def test_verdict_question_omits_sources_when_blind():
    sources = ["teacher", "student"]
    blind = text_of(verdict_question("2+2?", RUBRIC, ["four", "5"], None, 0.0))
    told = text_of(verdict_question("2+2?", RUBRIC, ["four", "5"], sources, 0.0))
    assert "teacher" not in blind
    assert "student" not in blind
    assert "## Answer 1 (of the teacher)\nfour" in told
    assert "## Answer 2 (of the student)\n5" in told
    assert "3 criteria and 2 answers" in blind
    assert APPLIES.about["sources"] is None


def test_verdict_question_shows_no_points():
    assert "5 points" not in text_of(APPLIES)
    assert "1. It is short.\n2. It has a number.\n3. It says why." in text_of(APPLIES)


# --- answers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        criteria(5, 1),
        f"\n {criteria(5, 1)}\n",
        f"```json\n{criteria(5, 1)}\n```",
        f"<think>{{not this}}</think>{criteria(5, 1)}",
    ],
)
def test_read_rubric_gives_criteria(text: str):
    assert read_rubric(WRITES, text) == (Criterion("c0", 5), Criterion("c1", 1))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("Sure! Here it is.", "is not JSON .*'Sure! Here it is.'"),
        (f"Sure: {criteria(1, 2)}", "is not JSON"),
        (criteria(1, 2)[:-3], "is not JSON"),
        ("[" * 5000, "is not JSON"),
        ("[1, 2]", "not a JSON object with a list 'criteria'"),
        ('{"criteria": 3}', "not a JSON object with a list 'criteria'"),
        (criteria(1), "has 1 criteria instead of 2 to 3"),
        (criteria(1, 1, 1, 1), "has 4 criteria instead of 2 to 3"),
        (criteria(1, 0), "criterion 2 of the rubric has 0 points instead of a whole number from 1 to 5"),
        (criteria(6, 1), "criterion 1 of the rubric has 6 points"),
        (criteria(1, 2.5), "criterion 2 of the rubric has 2.5 points"),
        (criteria(True, 2), "criterion 1 of the rubric has True points"),
        (criteria(1, "2"), "criterion 2 of the rubric has '2' points"),
        (criteria(1, 2, why="x"), "criterion 1 of the rubric needs exactly `criterion` and `points`"),
        ('{"criteria": ["a", "b"]}', "criterion 1 of the rubric needs exactly"),
        (criteria(1, 2).replace("c1", " "), "criterion 2 of the rubric is not text: ' '"),
    ],
)
def test_read_rubric_raises_unreadable_error_with_reason(text: str, says: str):
    with pytest.raises(UnreadableError, match=says):
        read_rubric(WRITES, text)


def verdicts(*rows: Any) -> str:
    return json.dumps({"verdicts": list(rows)})


def test_read_verdicts_gives_booleans():
    assert read_verdicts(APPLIES, verdicts([1, 0, True], [0, 0, False])) == [[True, False, True], [False] * 3]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (verdicts([1, 0, 1]), "verdicts on 1 answers instead of 2"),
        (verdicts([1, 0, 1], [1, 0]), "on answer 2 are not 3 numbers 0 or 1"),
        (verdicts([1, 0, 1], "101"), "on answer 2 are not 3 numbers"),
        (verdicts([1, 0, 0.5], [1, 0, 0]), "on answer 1 are not 3 numbers"),
        (verdicts([1, 0, 0], [1, 2, 0]), "on answer 2 hold numbers other than 0 and 1"),
        (verdicts([1, None, 0], [1, 1, 0]), "on answer 1 are not 3 numbers"),
        ("", "is not JSON"),
    ],
)
def test_read_verdicts_raises_unreadable_error_with_reason(text: str, says: str):
    with pytest.raises(UnreadableError, match=says):
        read_verdicts(APPLIES, text)


# --- numbers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("met", [(1, 1, 1), (0, 0, 0), (1, 0, 0), (0, 1, 1)])
def test_share_of_points_equals_oracle(met: tuple[int, ...]):
    expected = oracle.rubric_reward([one.points for one in RUBRIC], list(met))
    assert share_of_points(RUBRIC, [bool(v) for v in met]) == pytest.approx(expected, abs=1e-7)


def test_blind_order_equals_oracle_and_depends_on_each_part():
    answers = [("teacher", 0, "a"), ("teacher", 1, "b"), *(("student", i, f"s{i}") for i in range(8))]
    order = blind_order("task/1", answers)
    assert sorted(order) == list(range(10))
    assert order == oracle.hash_order("task/1", answers)
    assert blind_order("task/1", answers) == order
    assert blind_order("task/2", answers) != order
    turned = [answers[i] for i in reversed(range(10))]
    assert [turned[i] for i in blind_order("task/1", turned)] == [answers[i] for i in order]


def test_blind_order_places_teacher_answers_evenly():
    """Over many prompts each place is the teacher's about as often as another: 2 of 10."""
    count = [0] * 10
    for prompt in range(600):
        answers = [("teacher", 0, "a"), ("teacher", 1, "b"), *(("student", i, "s") for i in range(8))]
        for place, i in enumerate(blind_order(f"None/{prompt}", answers)):
            count[place] += i < 2
    assert all(abs(n / 600 - 0.2) < 4 * (0.2 * 0.8 / 600) ** 0.5 for n in count)


@pytest.mark.parametrize(
    ("text", "rest"),
    [("a", "a"), ("<think>x</think> a ", "a"), ("x</think>y</think>\nz", "z"), ("x</think>", ""), ("a <think>x", "a")],
)
def test_without_thought_removes_thoughts(text: str, rest: str):
    assert without_thought(text) == rest
