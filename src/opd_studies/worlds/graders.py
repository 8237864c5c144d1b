"""A judge that is a program: it writes rubrics from the contrast of answers, and applies them.

It knows statements that are true or false of one answer, some of them irrelevant, and does not know the right answer.
It may misread a statement, and may be biased against answers marked as the student's. Answers are sorted digits, or
texts of letters; the letters that a task wants are hidden from the judge.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from functools import lru_cache
from typing import Any, Literal, TypeAlias

from opd.samplers.asked.protocol import Question

Statement: TypeAlias = Callable[[str, str], bool]  # (digits of the task, answer)


STATEMENTS: dict[str, Statement] = {
    "It holds digits alone.": lambda task, answer: answer.isdigit(),
    "It is as long as the task.": lambda task, answer: len(answer) == len(task),
    "It has each digit as often as the task has it.": lambda task, answer: sorted(answer) == sorted(task),
    "Its digits never fall.": lambda task, answer: bool(answer) and list(answer) == sorted(answer),
    "It begins with the smallest digit of the task.": lambda task, answer: answer[:1] == min(task),
    "It ends with the largest digit of the task.": lambda task, answer: answer[-1:] == max(task),
    "Its digits never rise.": lambda task, answer: bool(answer) and list(answer) == sorted(answer, reverse=True),
    "It begins as the task does.": lambda task, answer: answer[:1] == task[:1],
    "It ends as the task does.": lambda task, answer: answer[-1:] == task[-1:],
    "No digit stands in it twice.": lambda task, answer: len(set(answer)) == len(answer),
    "It has an even digit.": lambda task, answer: any(c in "02468" for c in answer),
    "It has a 7.": lambda task, answer: "7" in answer,
}


# Statements that are true of every right answer and distinguish it from wrong ones of its length.
DECISIVE = tuple(STATEMENTS)[2:6]


ALPHABET = "abcdefghijkl"


def _has(letter: str) -> Statement:
    return lambda task, answer: letter in answer


LETTERS: dict[str, Statement] = {f"It has the letter {letter}.": _has(letter) for letter in ALPHABET}


KNOWN = {"digits": STATEMENTS, "letters": LETTERS}


def grader(
    question: Question,
    noise: float = 0.0,
    bias: float = 0.0,
    salt: int = 0,
    share: float = 0.75,
    answers: Literal["digits", "letters"] = "digits",
) -> str:
    """A rubric, or verdicts, as JSON.

    The rubric has the statements that are true of at least `share` of the teacher's answers and of fewer of the
    student's, plus the next ones if these are too few; the two with the largest differences have more than half of the
    points. `noise`: probability of misreading a statement of an answer. `bias`: probability of denying a true statement
    of an answer marked as the student's. Random numbers are a function of the question and `salt`. `answers` selects
    the statements that it knows.
    """
    about = question.about
    task = "".join(c for c in about["prompt"] if c.isdigit())
    known = KNOWN[answers]

    def holds(statement: str, answer: str) -> bool:
        return known[statement](task, answer) != (_uniform(salt, about["ask"], task, statement, answer) < noise)

    if about["ask"] == "rubric":
        true_of = {
            source: {s: sum(holds(s, one) for one in about[source]) / len(about[source]) for s in known}
            for source in ("teacher", "student")
        }
        contrast = {s: true_of["teacher"][s] - true_of["student"][s] for s in known}
        ranked = sorted(known, key=lambda s: (true_of["teacher"][s] >= share, contrast[s]), reverse=True)
        least, most = about["bounds"]
        good = sum(true_of["teacher"][s] >= share and contrast[s] > 0 for s in ranked)
        kept = ranked[: min(most, max(least, good))]
        points = [5, 4, *[1] * len(kept)]  # as in the paper: one or two decisive criteria have more than half
        return json.dumps({"criteria": [{"criterion": s, "points": p} for s, p in zip(kept, points, strict=False)]})
    verdicts: list[list[int]] = []
    for i, answer in enumerate(about["answers"]):
        judged = [holds(statement, answer) for statement in about["criteria"]]
        if about["sources"] and about["sources"][i] == "student":
            judged = [
                v and _uniform(salt, "bias", task, s, i) >= bias for v, s in zip(judged, about["criteria"], strict=True)
            ]
        verdicts.append([int(v) for v in judged])
    return json.dumps({"verdicts": verdicts})


@lru_cache(maxsize=1 << 16, typed=True)  # every update of a table has the same answers
def _uniform(*parts: Any) -> float:
    """A number in [0, 1), a hash of the parts."""
    digest = hashlib.sha256(json.dumps(parts).encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def adviser(question: Question) -> str:
    """A judge of the reward `feedback` for models of characters: the verified answer, or 7 if there is none."""
    answer = question.about["answer"]
    return json.dumps({"feedback": "7" if answer is None else str(answer)})
