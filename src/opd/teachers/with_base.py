"""A teacher beside a base model: the scores of both in one record, for signals of three models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from opd.errors import ConfigError
from opd.models.language_model import LanguageModel
from opd.models.vocabularies import check_same_tokens
from opd.pieces.supports import sampled
from opd.teachers.local import LocalTeacher
from opd.teachers.routed import summed
from opd.types import Prompt, Rollout, ScoreRequest, Scores, Teacher

BASE = "base."  # before the names of the base's tensors in a checkpoint


@dataclass(frozen=True, slots=True, kw_only=True)
class WithBase(Teacher):
    """A `Teacher` that adds `Scores.base_logp` where the request reads it; all else is the teacher's.

    `third` scores the sampled tokens after the student's prompt, whatever the teacher reads, at the same temperature.
    """

    teacher: Teacher
    third: Teacher

    @property
    def name(self) -> str:
        """The teacher's name."""
        return self.teacher.name

    @property
    def lm(self) -> Any:
        """The model that teaches."""
        return self.teacher.lm

    @property
    def base(self) -> bool:
        """Whether the model that teaches scores with its adapter off."""
        return self.teacher.base

    @property
    def is_student(self) -> bool:
        """Whether the teacher uses the student's own weights."""
        return self.teacher.is_student

    def score(self, rollouts: Sequence[Rollout], contexts: Sequence[Prompt], request: ScoreRequest) -> list[Scores]:
        """The teacher's scores with `base_logp`."""
        scores = self.teacher.score(rollouts, contexts, replace(request, base=False))
        if not request.base:
            return scores
        wanted = ScoreRequest(support=sampled(), temperature=request.temperature)
        third = self.third.score(rollouts, [rollout.prompt for rollout in rollouts], wanted)
        return [replace(one, base_logp=other.teacher_logp) for one, other in zip(scores, third, strict=True)]

    def score_early(self, rollouts: Sequence[Rollout], contexts: Sequence[Prompt], request: ScoreRequest) -> None:
        """Call it on the teacher."""
        self.teacher.score_early(rollouts, contexts, request)

    def refuses(self, request: ScoreRequest) -> str | None:
        """The teacher's refusal, or else the base's."""
        why = self.teacher.refuses(replace(request, base=False))
        return why or self.third.refuses(ScoreRequest(support=sampled(), temperature=request.temperature))

    def head(self, teacher_id: str | None = None) -> Any:
        """The teacher's output layer."""
        return self.teacher.head(teacher_id)

    def of(self, teacher_id: str | None) -> Teacher:
        """The teacher of those rows, without the base."""
        return self.teacher.of(teacher_id)

    def pop_requests(self) -> dict[str, float]:
        """The sums of both."""
        return summed([self.teacher.pop_requests(), self.third.pop_requests()])

    def after_step(self) -> None:
        """The teacher's; a base is fixed."""
        self.teacher.after_step()

    def jumped(self, by: Mapping[str, Tensor]) -> None:
        """The teacher's."""
        self.teacher.jumped(by)

    def state_dict(self) -> dict[str, Tensor]:
        """The teacher's, and the base's."""
        return {**self.teacher.state_dict(), **{BASE + name: one for name, one in self.third.state_dict().items()}}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore each one's part of what `state_dict` returned."""
        own = {name.removeprefix(BASE): one for name, one in state.items() if name.startswith(BASE)}
        self.third.load_state_dict(own)
        self.teacher.load_state_dict({name: one for name, one in state.items() if not name.startswith(BASE)})


def base_teacher(
    student: LanguageModel, base: LanguageModel | None, *, micro_batch_tokens: int, offload: bool = False
) -> LocalTeacher:
    """The scorer of a base model. None: the student with its adapter off.

    Raises ConfigError for a student without an adapter, which would be its own live base, and AlignmentError for a
    base with other tokens.
    """
    if base is not None:
        check_same_tokens(student.tokenizer, base.tokenizer, (student.name, base.name))
        assert student.vocabulary == base.vocabulary, "see vocabularies.on_common_tokens"
        return LocalTeacher(
            lm=base, micro_batch_tokens=micro_batch_tokens, student_device=student.device, offload=offload
        )
    if not student.adapters:
        raise ConfigError(
            f"The base is the student {student.name!r}, which has no adapter to switch off, so it would change with "
            "every step. Name a frozen model as the base, or train the student with LoRA."
        )
    return LocalTeacher(
        lm=student,
        micro_batch_tokens=micro_batch_tokens,
        student_device=student.device,
        base=True,
        is_student=True,
    )
