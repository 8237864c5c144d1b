"""Several teachers in one stage: each row names its teacher."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from opd.errors import TeacherError, nearest
from opd.types import Prompt, Rollout, ScoreRequest, Scores, Teacher


@dataclass(frozen=True, slots=True, kw_only=True)
class RoutedTeacher(Teacher):
    """A `Teacher` that routes each row to the teacher that its prompt names (`Prompt.teacher_id`).

    The teachers may differ in size, chat template and offloading, and in their tokenizer if the method allows it.
    """

    teachers: Mapping[str, Teacher]
    otherwise: Teacher | None = None  # of rows that name none; None: each row has to name one

    @property
    def name(self) -> str:
        """The names of all teachers."""
        return ", ".join(self.teachers)

    def of(self, teacher_id: str | None) -> Teacher:
        """The teacher of that name. Raises TeacherError for an unknown name."""
        if teacher_id is None and self.otherwise is not None:
            return self.otherwise
        if teacher_id not in self.teachers:
            raise TeacherError(
                f"A prompt's `teacher_id` is {teacher_id!r}, but the teachers are {', '.join(self.teachers)}."
                f"{nearest(str(teacher_id), self.teachers)} Each row must name one of them."
            )
        return self.teachers[str(teacher_id)]

    def head(self, teacher_id: str | None = None) -> Any:
        """The output layer of that teacher."""
        return self.of(teacher_id).head(teacher_id)

    def refuses(self, request: ScoreRequest) -> str | None:
        """The first teacher's refusal, if any."""
        refusals = (teacher.refuses(request) for teacher in self.teachers.values())
        return next((why for why in refusals if why is not None), None)

    def score(self, rollouts: Sequence[Rollout], contexts: Sequence[Prompt], request: ScoreRequest) -> list[Scores]:
        """Scores in the order of the rollouts; each teacher is called once. Raises TeacherError for an unknown name."""
        found: dict[int, Scores] = {}
        for teacher, indices in routed(self, rollouts):
            scores = teacher.score([rollouts[i] for i in indices], [contexts[i] for i in indices], request)
            found |= dict(zip(indices, scores, strict=True))
        return [found[i] for i in range(len(rollouts))]

    def score_early(self, rollouts: Sequence[Rollout], contexts: Sequence[Prompt], request: ScoreRequest) -> None:
        """Call it on each, with its rows."""
        for teacher, indices in routed(self, rollouts):
            teacher.score_early([rollouts[i] for i in indices], [contexts[i] for i in indices], request)

    def pop_requests(self) -> dict[str, float]:
        """The sums over all teachers."""
        return summed([teacher.pop_requests() for teacher in self.teachers.values()])

    def after_step(self) -> None:
        """Call it on each."""
        for teacher in self.teachers.values():
            teacher.after_step()

    def jumped(self, by: Mapping[str, Tensor]) -> None:
        """Call it on each."""
        for teacher in self.teachers.values():
            teacher.jumped(by)

    def state_dict(self) -> dict[str, Tensor]:
        """The states of all teachers, under their names."""
        states = {name: teacher.state_dict() for name, teacher in self.teachers.items()}
        return {f"{name}/{key}": value for name, state in states.items() for key, value in state.items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore each teacher's part of what `state_dict` returned."""
        for name, teacher in self.teachers.items():
            own = {key.removeprefix(f"{name}/"): value for key, value in state.items() if key.startswith(f"{name}/")}
            teacher.load_state_dict(own)


def summed(counts: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Counts by name, added up; some may lack a name."""
    names = dict.fromkeys(name for one in counts for name in one)
    return {name: sum(one.get(name, 0.0) for one in counts) for name in names}


def routed(teacher: Teacher, rollouts: Sequence[Rollout]) -> list[tuple[Teacher, list[int]]]:
    """Each teacher with the indices of its rows; teachers in the order of their first rows."""
    rows: dict[int, tuple[Teacher, list[int]]] = {}
    for i, rollout in enumerate(rollouts):
        one = teacher.of(rollout.prompt.teacher_id)
        rows.setdefault(id(one), (one, []))[1].append(i)
    return list(rows.values())
