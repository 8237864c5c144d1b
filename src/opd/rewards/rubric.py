"""The reward `rubric` of arXiv 2605.07396: judges write a rubric for each prompt and grade its responses by it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from opd.errors import ConfigError, DataError
from opd.recipe.schema import JudgeSection
from opd.rewards.base import GroupReward
from opd.rewards.rubric_texts import (
    Rubric,
    blind_order,
    read_rubric,
    read_verdicts,
    rubric_question,
    share_of_points,
    verdict_question,
    without_thought,
)
from opd.samplers.asked.build import check_judge
from opd.samplers.asked.cache import CachedJudge
from opd.samplers.asked.protocol import Failure, Question
from opd.types import Message, Prompt, Rollout


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """The settings of `rubric`."""

    answers: int
    column: str
    blind: bool
    shared: bool
    criteria: tuple[int, int]
    temperatures: tuple[float, float, float]  # of the author, the judge and the verifier


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """The answers that one rubric is built from and applied to; `rows` are the indices of the student's in the step."""

    uid: str
    prompt: str
    teacher: tuple[str, ...]
    student: tuple[str, ...]
    rows: tuple[int, ...]


def rubric(
    answers: int = 4,
    blind: bool = True,
    shared: bool = True,
    criteria: Sequence[int] = (4, 12),
    max_failed: float = 0.4,
    column: str = "teacher_answers",
    temperatures: Sequence[float] = (1.0, 0.7, 0.0),
    judge: JudgeSection | None = None,
    verifier: JudgeSection | None = None,
    author: JudgeSection | None = None,
) -> GroupReward:
    """R_i = sum_k w_k v_ik / sum_k w_k, in [0, 1]: the share of a rubric's points that response i gets.

    The judge reads the prompt, up to `answers` different answers of the teacher and all answers of the student, and
    writes a rubric of `criteria` = (fewest, most) criteria with 1 to 5 points each: one rubric for the whole group if
    `shared`, else one for each response. The verifier (default: the judge) reads all answers, the teacher's too, in
    the order of their hashes, and decides which criteria each meets; if not `blind`, it is told which are the
    teacher's. The teacher's answers come from `author`, or from the data's `column`, a text or a list of texts. Text
    up to `</think>` is removed from every answer. `temperatures` are those of the author, the judge and the verifier.

    A group has no rewards if one of its questions fails; `max_failed` is the largest share of such groups in a step.
    Raises ConfigError for settings out of range and for sections that `check_judge` refuses.
    """
    asks = _judges(judge, verifier, author)
    least, most = _pair(criteria)
    if type(answers) is not int or answers < 1:
        raise ConfigError(f"The reward 'rubric' got `answers: {answers!r}`. Give a number of answers, at least 1.")
    if not isinstance(max_failed, (int, float)) or not 0 <= max_failed <= 1:
        raise ConfigError(f"The reward 'rubric' got `max_failed: {max_failed!r}`. Give a share, from 0 to 1.")
    if len(temperatures) != 3 or min(temperatures) < 0:
        raise ConfigError(
            f"The reward 'rubric' got `temperatures: {list(temperatures)!r}`. Give three that are not negative: of the "
            "author, the judge and the verifier."
        )
    settings = Settings(
        answers=answers,
        column=column,
        blind=blind,
        shared=shared,
        criteria=(least, most),
        temperatures=(temperatures[0], temperatures[1], temperatures[2]),
    )
    return GroupReward(
        name="rubric",
        needs=frozenset() if author is not None else frozenset({column}),
        asks=asks,
        max_failed=max_failed,
        judging=lambda rollouts, judges: judged(rollouts, judges, settings),
    )


def _judges(
    judge: JudgeSection | None, verifier: JudgeSection | None, author: JudgeSection | None
) -> dict[str, JudgeSection]:
    """The sections by role. Raises ConfigError without a judge, and for a section that `check_judge` refuses."""
    given = {"judge": judge, "verifier": verifier or judge, "author": author}
    for role, section in given.items():
        if section is not None and not isinstance(section, JudgeSection):
            raise ConfigError(f"The reward 'rubric': put `{role}` next to `options`, not into them.")
    if judge is None:
        raise ConfigError(
            "The reward 'rubric' needs a judge, got none. Set the reward's `judge`, e.g. {url: "
            "http://localhost:8000/v1, model: NAME} or {function: my_package.mine:function}."
        )
    asks = {role: section for role, section in given.items() if section is not None}
    for role, section in asks.items():
        check_judge(section, f"The reward 'rubric', {role}")
    return asks


def judged(rollouts: Sequence[Rollout], judges: Mapping[str, CachedJudge], settings: Settings) -> list[Rollout]:
    """The rollouts with rewards, or with the reason why their group has none. One batch of questions per role."""
    groups: dict[int, list[int]] = {}
    for i, rollout in enumerate(rollouts):
        groups.setdefault(rollout.prompt.id, []).append(i)
    prompts = {key: rollouts[rows[0]].prompt for key, rows in groups.items()}
    written = dict(zip(groups, teacher_answers(list(prompts.values()), judges.get("author"), settings), strict=True))
    failures = {key: one.why for key, one in written.items() if isinstance(one, Failure)}
    cases: list[tuple[int, Case]] = []
    for key, rows in groups.items():
        teacher = written[key]
        if isinstance(teacher, Failure):
            continue
        for part in [rows] if settings.shared else [[row] for row in rows]:
            case = Case(
                uid=f"{prompts[key].task}/{key}",
                prompt=shown(prompts[key]),
                teacher=teacher,
                student=tuple(without_thought(rollouts[i].text) for i in part),
                rows=tuple(part),
            )
            cases.append((key, case))
    scored = points_of([case for _, case in cases], judges, settings)
    out = list(rollouts)
    for (key, case), one in zip(cases, scored, strict=True):
        if isinstance(one, Failure):
            failures.setdefault(key, one.why)
            continue
        rewards, numbers = one
        for i, reward in zip(case.rows, rewards, strict=True):
            out[i] = replace(out[i], reward=reward, judged=numbers)
    return [
        replace(r, reward=None, judged={}, unjudged=failures[r.prompt.id]) if r.prompt.id in failures else r
        for r in out
    ]


def points_of(
    cases: Sequence[Case], judges: Mapping[str, CachedJudge], settings: Settings
) -> list[tuple[list[float], dict[str, float]] | Failure]:
    """For each case the rewards of the student's answers and numbers for the metrics, or the Failure."""
    _, warm, cold = settings.temperatures
    about = [rubric_question(c.prompt, c.teacher, c.student, settings.criteria, warm) for c in cases]
    rubrics = judges["judge"].ask(about, read_rubric)
    found: list[tuple[list[float], dict[str, float]] | Failure] = []
    applied: list[tuple[Question, list[int]]] = []
    for case, made in zip(cases, rubrics, strict=True):
        if not isinstance(made, Failure):
            applied.append(_blind_question(case, made, settings.blind, cold))
    verdicts = iter(judges["verifier"].ask([question for question, _ in applied], read_verdicts))
    orders = iter(order for _, order in applied)
    for case, made in zip(cases, rubrics, strict=True):
        if isinstance(made, Failure):
            found.append(Failure(f"the judge wrote no rubric: {made.why}"))
            continue
        verdict, order = next(verdicts), next(orders)
        if isinstance(verdict, Failure):
            found.append(Failure(f"the verifier gave no verdicts: {verdict.why}"))
            continue
        points = dict(zip(order, (share_of_points(made, met) for met in verdict), strict=True))
        in_order = [points[i] for i in range(len(order))]
        teacher, student = in_order[: len(case.teacher)], in_order[len(case.teacher) :]
        numbers = {
            "criteria": float(len(made)),
            "points": float(sum(one.points for one in made)),
            "teacher_reward": sum(teacher) / len(teacher),
        }
        found.append((student, numbers))
    return found


def _blind_question(case: Case, made: Rubric, blind: bool, temperature: float) -> tuple[Question, list[int]]:
    """The verifier's question, and the order of its answers as indices into (teacher's, student's)."""
    pooled = [
        *(("teacher", i, text) for i, text in enumerate(case.teacher)),
        *(("student", i, text) for i, text in enumerate(case.student)),
    ]
    order = blind_order(case.uid, pooled)
    sources = None if blind else [pooled[i][0] for i in order]
    return verdict_question(case.prompt, made, [pooled[i][2] for i in order], sources, temperature), order


def teacher_answers(
    prompts: Sequence[Prompt], author: CachedJudge | None, settings: Settings
) -> list[tuple[str, ...] | Failure]:
    """Up to `settings.answers` different answers of the teacher to each prompt, from the data or from the author.

    Raises DataError for a row without an answer in its column.
    """
    if author is None:
        return [_different(_column(prompt, settings.column), settings.answers) for prompt in prompts]
    questions = [
        Question(
            content=prompt.content,
            temperature=settings.temperatures[0],
            about={"ask": "answer", "prompt": shown(prompt)},
            number=number,
        )
        for prompt in prompts
        for number in range(settings.answers)
    ]
    replies = author.ask(questions, lambda question, text: text, whole=True)
    found: list[tuple[str, ...] | Failure] = []
    for start in range(0, len(replies), settings.answers):
        mine = replies[start : start + settings.answers]
        kept = _different([one for one in mine if not isinstance(one, Failure)], settings.answers)
        why = next((one.why for one in mine if isinstance(one, Failure)), "its answers are empty")
        found.append(kept or Failure(f"the author wrote no answer: {why}"))
    return found


def shown(prompt: Prompt) -> str:
    """The text of a prompt for the judges. Raises DataError if a part of it is not text."""
    if prompt.images:
        raise DataError(
            f"Prompt {prompt.id} has images, but the judges of the reward 'rubric' read only text. Use another reward "
            "for it."
        )
    if isinstance(prompt.content, str):
        return prompt.content
    return "\n\n".join(_said(message, prompt.id, alone=len(prompt.content) == 1) for message in prompt.content)


def _said(message: Message, prompt: int, *, alone: bool) -> str:
    content: Any = message["content"]
    parts: list[Any] = [{"text": content}] if isinstance(content, str) else list(content or ())
    if any(not isinstance(part.get("text"), str) for part in parts):
        raise DataError(
            f"Prompt {prompt} holds parts other than text, but the judges of the reward 'rubric' read only text. "
            "Use another reward for it."
        )
    text = "\n".join(part["text"] for part in parts)
    return text if alone else f"[{message['role']}]\n{text}"


def _column(prompt: Prompt, column: str) -> list[str]:
    value = getattr(prompt, column) if column in ("response", "answer") else prompt.metadata.get(column)
    texts: list[Any] = [value] if isinstance(value, str) else list(value) if isinstance(value, (list, tuple)) else []
    if not texts or not all(isinstance(text, str) and without_thought(text) for text in texts):
        raise DataError(
            f"Prompt {prompt.id} has {value!r:.80} in `{column}`, where the reward 'rubric' finds the teacher's "
            "answers. Give a text or a list of texts, none of them empty, or name an `author` that writes them."
        )
    return texts


def _different(texts: Sequence[str], count: int) -> tuple[str, ...]:
    """The first `count` different non-empty texts, without their thoughts."""
    stripped = (without_thought(text) for text in texts)
    return tuple(dict.fromkeys(text for text in stripped if text))[:count]


def _pair(criteria: Sequence[int]) -> tuple[int, int]:
    good = len(criteria) == 2 and all(type(n) is int for n in criteria) and 1 <= criteria[0] <= criteria[1]
    if not good:
        raise ConfigError(
            f"The reward 'rubric' got `criteria: {list(criteria)!r}`. Give two whole numbers, the fewest and the most "
            "criteria, at least 1."
        )
    return criteria[0], criteria[1]
