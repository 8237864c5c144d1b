"""Several teachers in one stage: each row has its own, by name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from opd.errors import TeacherError, nearest
from opd.models.head import Head
from opd.models.language_model import LanguageModel
from opd.teachers.cross_tokenizer import OneTeacher
from opd.teachers.local import LocalTeacher
from opd.types import Prompt, Rollout, Scores, Support


@dataclass(frozen=True, slots=True, kw_only=True)
class SeveralTeachers:
    """A `Teacher` that hands each row to the one that its prompt names (`Prompt.teacher_id`).

    They may differ in size, in chat template, and in whether they are kept on the CPU between their turns; their tokens
    are the student's, or the method lets each have its own.
    """

    teachers: Mapping[str, OneTeacher]

    def of(self, teacher_id: str | None) -> OneTeacher:
        """The teacher of that name. Raises TeacherError for one that is not here."""
        if teacher_id not in self.teachers:
            raise TeacherError(
                f"A prompt's `teacher_id` is {teacher_id!r}, and the teachers are {', '.join(self.teachers)}."
                f"{nearest(str(teacher_id), self.teachers)} Each row is scored by the teacher that it names."
            )
        return self.teachers[str(teacher_id)]

    def head(self, teacher_id: str | None) -> Head:
        """The output layer that goes with the hidden states of that teacher's rows."""
        return self.of(teacher_id).head()

    def score(
        self,
        rollouts: Sequence[Rollout],
        contexts: Sequence[Prompt],
        support: Support,
        temperature: float,
        *,
        sampled: bool = True,
        entropy: bool = False,
        top_k: int = 0,
    ) -> list[Scores]:
        """Scores in the order of the rollouts, as `LocalTeacher.score` makes them; each teacher is called once."""
        found: dict[int, Scores] = {}
        for teacher, indices in shares_of(self, rollouts):
            scores = teacher.score(
                [rollouts[i] for i in indices],
                [contexts[i] for i in indices],
                support,
                temperature,
                sampled=sampled,
                entropy=entropy,
                top_k=top_k,
            )
            found |= dict(zip(indices, scores, strict=True))
        return [found[i] for i in range(len(rollouts))]

    def after_step(self) -> None:
        """Let each follow its student, if it does."""
        for teacher in self.teachers.values():
            teacher.after_step()

    def state_dict(self) -> dict[str, Tensor]:
        """The states of all, each under its teacher's name."""
        states = {name: teacher.state_dict() for name, teacher in self.teachers.items()}
        return {f"{name}/{key}": value for name, state in states.items() for key, value in state.items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """What `state_dict` gave, each its own."""
        for name, teacher in self.teachers.items():
            own = {key.removeprefix(f"{name}/"): value for key, value in state.items() if key.startswith(f"{name}/")}
            teacher.load_state_dict(own)


def shares_of(teacher: OneTeacher | SeveralTeachers, rollouts: Sequence[Rollout]) -> list[tuple[OneTeacher, list[int]]]:
    """Each teacher with the indices of its rows; one teacher has them all."""
    if not isinstance(teacher, SeveralTeachers):
        return [(teacher, list(range(len(rollouts))))]
    rows: dict[str | None, list[int]] = {}
    for i, rollout in enumerate(rollouts):
        rows.setdefault(rollout.prompt.teacher_id, []).append(i)
    return [(teacher.of(name), indices) for name, indices in rows.items()]


def heads_of(
    teacher: OneTeacher | SeveralTeachers | None,
    student: LanguageModel,
    support: Support,
    rollouts: Sequence[Rollout],
) -> dict[str | None, Head]:
    """The output layers by `teacher_id` that phase B applies to these rollouts, where the support reads states.

    A student that teaches itself is left out: sharded weights are whole only inside a forward.
    """
    if teacher is None or not support.reads_states or teaches_itself(teacher, student):
        return {}
    return {name: teacher.head(name) for name in {rollout.prompt.teacher_id for rollout in rollouts}}


def teaches_itself(teacher: OneTeacher | SeveralTeachers | None, student: LanguageModel) -> bool:
    """Whether the teacher's weights are the student's own."""
    return isinstance(teacher, LocalTeacher) and teacher.lm is student
