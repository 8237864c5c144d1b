"""What a model would have written at each token of given responses: for people who read samples, and for no loss.

The student and the teachers in this process are read by one more forward each, without gradient. Servers are requested
once more. A teacher of the user's own is never called for this, because a call may change what it returns next.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from opd.models.alignment import TeacherTokens, retokenise
from opd.models.language_model import LanguageModel
from opd.pieces.supports import full, sampled
from opd.teachers.cross_tokenizer import CrossTokenizerTeacher
from opd.teachers.local import LocalTeacher
from opd.teachers.mixed import MixedTeacher
from opd.teachers.routed import routed
from opd.teachers.served import ServedTeacher
from opd.types import NoTeacher, Prompt, Rollout, ScoreRequest, Scores, Teacher


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """A model's numbers at the tokens of one response, after temperature, over its whole vocabulary.

    `top_ids` are ids of `tokenizer`. With a tokenizer of its own the model's numbers are those before the first token
    of a unit, and `units` has its (student start, student end, teacher start, teacher end) in `own_ids`.
    """

    logp: Tensor  # [T]
    top_ids: Tensor | None  # [T, k] in falling order
    top_logp: Tensor | None  # [T, k]
    tokenizer: Any
    entropy: Tensor | None = None  # [T]
    rank: Tensor | None = None  # [T] int64
    hidden: Tensor | None = None  # [T, H], if requested, of a model with the student's vocabulary
    units: tuple[tuple[int, int, int, int], ...] | None = None
    own_ids: tuple[int, ...] = ()
    inside: Tensor | None = None  # [T] bool: the token is in a unit; None: the model has numbers of all tokens


def seen_by_student(
    student: LanguageModel,
    rollouts: Sequence[Rollout],
    *,
    k: int,
    temperature: float,
    micro_batch_tokens: int,
    states: bool = False,
) -> list[Seen]:
    """The student's numbers, after the prompts that it read. `states`: also the hidden states."""
    view = LocalTeacher(lm=student, micro_batch_tokens=micro_batch_tokens, student_device=student.device)
    request = _request(min(k, student.vocabulary), temperature, states)
    scores = view.score_after([r.prompt_ids for r in rollouts], rollouts, request)
    return [_seen(one, student.tokenizer) for one in scores]


def seen_by_teacher(
    teacher: Teacher,
    rollouts: Sequence[Rollout],
    contexts: Sequence[Prompt],
    *,
    k: int,
    temperature: float,
    states: bool = False,
) -> list[Seen | None]:
    """The numbers of each row's teacher, after the contexts; None for a row that it does not tell: `why_unseen`.

    `states`: also the hidden states, of a teacher in this process with the student's vocabulary.
    """
    out: list[Seen | None] = [None] * len(rollouts)
    for one, rows in routed(teacher, rollouts):
        if why_unseen(one, temperature) is None:
            found = _seen_by(one, [rollouts[i] for i in rows], [contexts[i] for i in rows], k, temperature, states)
            for i, seen in zip(rows, found, strict=True):
                out[i] = seen
    return out


def why_unseen(teacher: Teacher, temperature: float = 1.0) -> str | None:
    """Why a teacher's own choices are not in samples; None if they are. For a teacher of rows, see `Teacher.of`."""
    if isinstance(teacher, LocalTeacher | MixedTeacher | CrossTokenizerTeacher):
        return None
    if isinstance(teacher, ServedTeacher):
        return teacher.refuses(ScoreRequest(support=sampled(), temperature=temperature))
    if isinstance(teacher, NoTeacher):
        return "the method has no teacher"
    return "it is your own, and is called for the loss alone"


def has_states(teacher: Teacher) -> bool:
    """Whether a teacher has hidden states for a comparison over the student's whole vocabulary."""
    return isinstance(teacher, LocalTeacher | MixedTeacher)


def _seen_by(
    teacher: Any, rollouts: list[Rollout], contexts: list[Prompt], k: int, temperature: float, states: bool
) -> list[Seen | None]:
    if isinstance(teacher, CrossTokenizerTeacher):
        return _by_unit(teacher, rollouts, contexts, k, temperature)
    if isinstance(teacher, ServedTeacher):
        return _served(teacher, rollouts, contexts, k, temperature)
    lm = next(iter(teacher.teachers.values())).lm if isinstance(teacher, MixedTeacher) else teacher.lm
    scores = teacher.score(rollouts, contexts, _request(min(k, lm.vocabulary), temperature, states))
    return [None if one.scored is not None and not one.scored.any() else _seen(one, lm.tokenizer) for one in scores]


def _request(k: int, temperature: float, states: bool) -> ScoreRequest:
    return ScoreRequest(
        support=full() if states else sampled(), temperature=temperature, entropy=True, top_k=k, rank=True
    )


def _seen(scores: Scores, tokenizer: Any) -> Seen:
    return Seen(
        logp=scores.teacher_logp,
        top_ids=scores.teacher_top_ids,
        top_logp=scores.teacher_top_logp,
        tokenizer=tokenizer,
        entropy=scores.teacher_entropy,
        rank=scores.teacher_rank,
        hidden=scores.teacher_hidden,
    )


def _served(
    teacher: ServedTeacher, rollouts: list[Rollout], contexts: list[Prompt], k: int, temperature: float
) -> list[Seen | None]:
    """Of a server: log-probs and the top k, which its protocol gives. A response without an answer has none.

    Raises TeacherError if too many have none.
    """
    k = min(k, len(teacher.tokenizer))
    request = ScoreRequest(support=sampled(), temperature=temperature, top_k=k)
    scores = teacher.score(rollouts, contexts, request)
    return [
        None if one.scored is not None and not one.scored.any() else _seen(one, teacher.tokenizer) for one in scores
    ]


def _by_unit(
    teacher: CrossTokenizerTeacher, rollouts: list[Rollout], contexts: list[Prompt], k: int, temperature: float
) -> list[Seen | None]:
    """Of a teacher with another tokenizer: its numbers before each unit's first token; NaN outside units."""
    texts = [retokenise(rollout.response_ids.tolist(), teacher.pair) for rollout in rollouts]
    read = [i for i, text in enumerate(texts) if text.teacher_ids]
    out: list[Seen | None] = [None] * len(rollouts)
    if not read:
        return out
    theirs = [replace(rollouts[i], response_ids=torch.tensor(texts[i].teacher_ids)) for i in read]
    request = _request(min(k, teacher.lm.vocabulary), temperature, False)
    scores = teacher.local.score(theirs, [contexts[i] for i in read], request)
    for i, one in zip(read, scores, strict=True):
        out[i] = _on_units(_seen(one, teacher.lm.tokenizer), texts[i], len(rollouts[i].response_ids))
    return out


def _on_units(theirs: Seen, text: TeacherTokens, tokens: int) -> Seen:
    """Numbers of the teacher's tokens [T'] by the student's tokens [T]; the log-prob of a unit in equal parts."""
    first = torch.zeros(tokens, dtype=torch.long)
    inside = torch.zeros(tokens, dtype=torch.bool)
    logp, each = torch.full((tokens,), torch.nan), theirs.logp.cpu()
    for unit in text.units:
        at = slice(unit.student.start, unit.student.stop)
        first[at], inside[at] = unit.teacher.start, True
        logp[at] = float(each[unit.teacher.start : unit.teacher.stop].sum()) / len(unit.student)

    def _placed(values: Tensor | None) -> Tensor | None:
        return None if values is None else values.cpu()[first]

    return replace(
        theirs,
        logp=logp,
        entropy=_placed(theirs.entropy),
        rank=_placed(theirs.rank),
        inside=inside,
        top_ids=_placed(theirs.top_ids),
        top_logp=_placed(theirs.top_logp),
        units=tuple((u.student.start, u.student.stop, u.teacher.start, u.teacher.stop) for u in text.units),
        own_ids=text.teacher_ids,
    )
