"""Rubrics as text: the questions to judges, the parsing of their answers, and the resulting reward.

A rubric is a list of criteria with points, from a comparison of better and worse answers to one prompt (arXiv
2605.07396). Pure: texts in, texts and numbers out.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from opd.samplers.asked.protocol import Question, UnreadableError

POINTS = (1, 5)  # the fewest and most points of a criterion


THINKS, THOUGHT = "<think>", "</think>"


WRITE = """\
Below are a task, answers of a strong model to it, and answers of a weaker one. Write a rubric that tells better \
answers from worse ones: what the strong answers do and the weaker ones miss, as criteria that another answer can meet \
or not.

Rules:
- {least} to {most} criteria, each a statement about one answer that is true or false of it, and that can be judged \
from that answer alone.
- Cover three families: whether the task is fulfilled, the quality that can be seen in the answer, and sound reasoning.
- Each has {low} to {high} points. One or two criteria, the decisive ones, have 4 or 5; together they hold more than \
half of all points.
- Do not quote an answer, and do not mention that there were several.

Reply with JSON alone: {{"criteria": [{{"criterion": "...", "points": 3}}, ...]}}

# Task
{prompt}

# Answers of the strong model
{teacher}

# Answers of the weaker model
{student}
"""


APPLY = """\
Below are a task, {k} criteria and {n} answers to the task. Decide for every answer and every criterion whether the \
answer meets it: 1 if it does, 0 if not. Judge each answer by itself, by what stands in it.

Reply with JSON alone: {{"verdicts": [[...], ...]}}, one list an answer, in the order of the answers; each list has \
{k} numbers, in the order of the criteria.

# Task
{prompt}

# Criteria
{criteria}

# Answers
{answers}
"""


@dataclass(frozen=True, slots=True)
class Criterion:
    """A statement about an answer, and its points."""

    text: str
    points: int


Rubric: TypeAlias = tuple[Criterion, ...]


def without_thought(text: str) -> str:
    """The text after the last `</think>` and before an unclosed `<think>`, stripped; without tags, the whole text."""
    return text.rpartition(THOUGHT)[2].partition(THINKS)[0].strip()


def rubric_question(
    prompt: str, teacher: Sequence[str], student: Sequence[str], bounds: tuple[int, int], temperature: float
) -> Question:
    """The question for a prompt's rubric: at least bounds[0] and at most bounds[1] criteria."""
    text = WRITE.format(
        least=bounds[0],
        most=bounds[1],
        low=POINTS[0],
        high=POINTS[1],
        prompt=prompt,
        teacher=_listed(teacher),
        student=_listed(student),
    )
    about = {"ask": "rubric", "prompt": prompt, "teacher": list(teacher), "student": list(student), "bounds": bounds}
    return Question(content=({"role": "user", "content": text},), temperature=temperature, about=about)


def read_rubric(question: Question, text: str) -> Rubric:
    """The rubric in an answer to `rubric_question`. Raises UnreadableError for any other text."""
    least, most = question.about["bounds"]
    given = _json(text, "criteria")
    if not least <= len(given) <= most:
        raise UnreadableError(f"the rubric has {len(given)} criteria instead of {least} to {most}")
    rubric: list[Criterion] = []
    for i, one in enumerate(given, 1):
        if not isinstance(one, dict) or set(one) != {"criterion", "points"}:
            raise UnreadableError(f"criterion {i} of the rubric needs exactly `criterion` and `points`: {one!r:.80}")
        statement, points = one["criterion"], one["points"]
        if not isinstance(statement, str) or not statement.strip():
            raise UnreadableError(f"criterion {i} of the rubric is not text: {statement!r:.80}")
        if type(points) is not int or not POINTS[0] <= points <= POINTS[1]:
            raise UnreadableError(
                f"criterion {i} of the rubric has {points!r:.20} points instead of a whole number from {POINTS[0]} to "
                f"{POINTS[1]}"
            )
        rubric.append(Criterion(statement.strip(), points))
    return tuple(rubric)


def verdict_question(
    prompt: str, rubric: Rubric, answers: Sequence[str], sources: Sequence[str] | None, temperature: float
) -> Question:
    """The question which answers meet which criteria; `sources` names the model of each answer (None: blind)."""
    titles = [f"## Answer {i}" + (f" (of the {sources[i - 1]})" if sources else "") for i in range(1, len(answers) + 1)]
    text = APPLY.format(
        k=len(rubric),
        n=len(answers),
        prompt=prompt,
        criteria="\n".join(f"{i}. {one.text}" for i, one in enumerate(rubric, 1)),
        answers="\n\n".join(f"{title}\n{answer}" for title, answer in zip(titles, answers, strict=True)),
    )
    about: dict[str, Any] = {
        "ask": "verdicts",
        "prompt": prompt,
        "criteria": [one.text for one in rubric],
        "answers": list(answers),
        "sources": None if sources is None else list(sources),
    }
    return Question(content=({"role": "user", "content": text},), temperature=temperature, about=about)


def read_verdicts(question: Question, text: str) -> list[list[bool]]:
    """The verdicts [answers][criteria] in an answer to `verdict_question`. Raises UnreadableError for other texts."""
    answers, criteria = len(question.about["answers"]), len(question.about["criteria"])
    given = _json(text, "verdicts")
    if len(given) != answers:
        raise UnreadableError(f"there are verdicts on {len(given)} answers instead of {answers}")
    for i, row in enumerate(given, 1):
        if not isinstance(row, list) or len(row) != criteria or any(type(v) not in (int, bool) for v in row):
            raise UnreadableError(f"the verdicts on answer {i} are not {criteria} numbers 0 or 1: {row!r:.80}")
        if any(v not in (0, 1) for v in row):
            raise UnreadableError(f"the verdicts on answer {i} hold numbers other than 0 and 1: {row!r:.80}")
    return [[bool(v) for v in row] for row in given]


def share_of_points(rubric: Rubric, met: Sequence[bool]) -> float:
    """sum_k w_k v_k / sum_k w_k, in [0, 1]: the points of the criteria that an answer meets (2605.07396)."""
    points = sum(one.points for one, v in zip(rubric, met, strict=True) if v)
    return points / sum(one.points for one in rubric)


def blind_order(uid: str, answers: Sequence[tuple[str, int, str]]) -> list[int]:
    """The order in which a judge reads `answers`, each (source, index, text): by their hashes.

    It hides the source of an answer, and is the same for the same answers.
    """
    hashes = [hashlib.sha256(json.dumps([uid, *answer]).encode()).hexdigest() for answer in answers]
    return sorted(range(len(answers)), key=hashes.__getitem__)


def _listed(answers: Sequence[str]) -> str:
    return "\n\n".join(f"## Answer {i}\n{answer}" for i, answer in enumerate(answers, 1))


def _json(text: str, name: str) -> list[Any]:
    """The list `name` of the JSON object in a text. Raises UnreadableError."""
    what = f"a JSON object with a list {name!r}"
    given = json_of(text, what)
    if not isinstance(given.get(name), list):
        raise UnreadableError(f"the answer is not {what}: {text.strip()[:120]!r}")
    return given[name]


def json_of(text: str, what: str = "a JSON object") -> dict[str, Any]:
    """The JSON object in a text after its thought, possibly in a fence. Raises UnreadableError, which says `what`."""
    body = without_thought(text)
    if body.startswith("```") and body.endswith("```"):
        body = body.removesuffix("```").partition("\n")[2]
    try:
        given = json.loads(body)
    except (ValueError, RecursionError) as error:  # RecursionError: endless brackets
        raise UnreadableError(f"the answer is not JSON ({error}): {text.strip()[:120]!r}") from error
    if not isinstance(given, dict):
        raise UnreadableError(f"the answer is not {what}: {text.strip()[:120]!r}")
    return given
