"""Several teachers on one row, each with a weight of its own and, if the context says so, a prompt of its own."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from opd.errors import ConfigError, TeacherError, nearest
from opd.models.language_model import LanguageModel
from opd.models.mixed_head import MixedHead
from opd.pieces.supports import full
from opd.teachers.local import LocalTeacher, student_top
from opd.teachers.scoring import parted, teacher_scores
from opd.types import Mixture, Prompt, Rollout, ScoreRequest, Scores, Teacher


@dataclass(frozen=True, slots=True, kw_only=True)
class MixedTeacher(Teacher):
    """A `Teacher` of K local teachers of the student's vocabulary, mixed by `MixedHead`.

    The weights of a row are its context's `teacher_weights`, divided by their sum. A teacher of weight 0 does not read
    the row. A row whose weights are all 0 is not scored, so none of its tokens is trained. The numbers of a token
    (log-prob, top-k, entropy) are those of the mean; for an `each` mixture of the arithmetic mean. The hidden states of
    all responses of a call are in memory, for every support.
    """

    teachers: Mapping[str, LocalTeacher]
    mixture: Mixture

    @property
    def name(self) -> str:
        """The names of all teachers."""
        return " + ".join(self.teachers)

    @property
    def lm(self) -> LanguageModel | None:
        """The model of the only teacher; several write no common response."""
        return next(iter(self.teachers.values())).lm if len(self.teachers) == 1 else None

    def head(self, teacher_id: str | None = None) -> MixedHead:
        """The output layers, for the states that `score` joined."""
        return MixedHead(heads=tuple(one.head() for one in self.teachers.values()), mixture=self.mixture)

    @torch.no_grad()
    def score(self, rollouts: Sequence[Rollout], contexts: Sequence[Prompt], request: ScoreRequest) -> list[Scores]:
        """Scores in the order of the rollouts. Raises TeacherError for weights that are no weights of its teachers."""
        weights = [weights_of(context, list(self.teachers)) for context in contexts]
        head, hidden = self.head(), self._states(rollouts, contexts, weights)
        device = hidden[0].device
        top = student_top(rollouts, request, device)
        ids = torch.cat([rollout.response_ids for rollout in rollouts]).to(device)
        lengths = [len(rollout.response_ids) for rollout in rollouts]
        found = parted(teacher_scores(head, torch.cat(hidden), ids, request, top), lengths)
        return [
            score if sum(row) else replace(score, scored=torch.zeros(length, dtype=torch.bool, device=device))
            for score, row, length in zip(found, weights, lengths, strict=True)
        ]

    def _states(
        self, rollouts: Sequence[Rollout], contexts: Sequence[Prompt], weights: Sequence[Sequence[float]]
    ) -> list[Tensor]:
        """By rollout, the joined states [T, sum H + K]; those of a teacher that did not read the row are zeros."""
        head = self.head()
        whole = ScoreRequest(support=full(), sampled=False)
        by_teacher: list[dict[int, Tensor]] = []
        for k, (name, teacher) in enumerate(self.teachers.items()):
            read = [i for i, row in enumerate(weights) if row[k] > 0]
            views = [contexts[i].views.get(name, contexts[i]) for i in read]
            scores = teacher.score([rollouts[i] for i in read], views, whole) if read else []
            states = [one.teacher_hidden for one in scores]
            by_teacher.append({i: state for i, state in zip(read, states, strict=True) if state is not None})
        joined: list[Tensor] = []
        for i, (rollout, row) in enumerate(zip(rollouts, weights, strict=True)):
            n = len(rollout.response_ids)
            layers = zip(by_teacher, head.heads, strict=True)
            states = [of[i] if i in of else layer.weight.new_zeros(n, layer.weight.shape[1]) for of, layer in layers]
            joined.append(
                head.join(states, torch.tensor([row], dtype=torch.float64).to(states[0].device).expand(n, -1))
            )
        return joined


def mixed_teacher(teachers: Mapping[str, Teacher], mixture: Mixture, where: str) -> MixedTeacher:
    """Several teachers of one row. Raises ConfigError, beginning with `where`, for one without weights here."""
    local = {name: teacher for name, teacher in teachers.items() if isinstance(teacher, LocalTeacher)}
    if missing := [name for name in teachers if name not in local]:
        raise ConfigError(
            f"{where}: the method mixes its teachers' output layers, and the teacher {missing[0]!r} has none "
            "in this process. Give a model with `path`."
        )
    return MixedTeacher(teachers=local, mixture=mixture)


def weights_of(context: Prompt, names: Sequence[str]) -> list[float]:
    """The weights of a row's teachers, which sum to 1, or are all 0.

    Raises TeacherError for another teacher's weight, and for one that is negative, infinite or NaN.
    """
    given = context.teacher_weights
    if not given:
        return [1.0 / len(names)] * len(names)
    if unknown := [name for name in given if name not in names]:
        raise TeacherError(
            f"The context of prompt {context.id} weighs the teacher {unknown[0]!r}, and the teachers are "
            f"{', '.join(names)}.{nearest(unknown[0], names)} A context's `teacher_weights` name the stage's teachers."
        )
    values = [given.get(name, 0.0) for name in names]
    if not all(0.0 <= value < math.inf for value in values):
        raise TeacherError(
            f"The context of prompt {context.id} has the teacher weights {dict(given)}. Weights are finite and not "
            "negative; 0 leaves a teacher out of the row."
        )
    total = math.fsum(values)
    return [value / total if total else 0.0 for value in values]
