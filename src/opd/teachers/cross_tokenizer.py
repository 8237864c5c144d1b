"""A teacher with a tokenizer of its own: it reads the text of a response in its own tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import torch
from torch import Tensor

from opd.alignment import Pair, Reading, pair_of, reread
from opd.errors import ConfigError
from opd.models import LanguageModel
from opd.score import Head
from opd.supports import full
from opd.teachers.local import LocalTeacher
from opd.types import Prompt, Rollout, Scores, Support, TeacherRule
from opd.units import Shared, Units


@dataclass(frozen=True, slots=True, kw_only=True)
class CrossTokenizerTeacher:
    """A `Teacher` around another one, whose tokens are not the student's.

    Its scores have a row for each student token all the same: the teacher's log-prob of a unit, shared out evenly among
    the unit's student tokens, so that sums over units and responses are what the teacher says of that text. Its
    entropy and its hidden state are those before the unit's first token. A token in no unit is not scored.
    """

    local: LocalTeacher
    pair: Pair

    @property
    def lm(self) -> LanguageModel:
        """The model that scores."""
        return self.local.lm

    @property
    def base(self) -> bool:
        """Whether an adapter is switched off while it scores."""
        return self.local.base

    def head(self, teacher_id: str | None = None) -> Head:
        """The output layer that goes with the hidden states, and which of its tokens are the student's too."""
        head = self.local.head(teacher_id)
        ids = torch.tensor(list(self.pair.shared.items()), device=head.weight.device)  # [K, 2]
        return replace(head, shared=Shared(student=ids[:, 0].contiguous(), teacher=ids[:, 1].contiguous()))

    @torch.no_grad()
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
        """Scores by the student's tokens; what is sampled is always scored, because units are made of it.

        Raises ConfigError for a support that is not of units.
        """
        assert not top_k, "a method that compares top tokens of two vocabularies is refused before this"
        if support.kind != "units":
            raise ConfigError(
                f"The support of this method is {support.kind!r}, of the student's tokens, and its teacher has another "
                "tokenizer. Give the method support=units()."
            )
        readings = [reread(rollout.response_ids.tolist(), self.pair) for rollout in rollouts]
        read = [i for i, reading in enumerate(readings) if reading.teacher_ids]
        asked = [replace(rollouts[i], response_ids=torch.tensor(readings[i].teacher_ids)) for i in read]
        found = (
            self.local.score(asked, [contexts[i] for i in read], full(), temperature, entropy=entropy) if read else []
        )
        of = dict(zip(read, found, strict=True))
        return [
            by_unit(reading, of[i], rollout, self.pair, support) if i in of else self._nothing(rollout, entropy)
            for i, (reading, rollout) in enumerate(zip(readings, rollouts, strict=True))
        ]

    def _nothing(self, rollout: Rollout, entropy: bool) -> Scores:
        """Scores of a response that shows the teacher nothing, special tokens of the student alone: none is scored."""
        n, device = len(rollout.response_ids), self.local.student_device
        unknown = torch.full((n,), torch.nan, device=device)
        columns = _Columns(n)
        return Scores(
            teacher_logp=unknown,
            teacher_hidden=torch.zeros(n, self.lm.head().weight.shape[1], device=device),
            teacher_entropy=unknown if entropy else None,
            scored=columns.scored.to(device),
            units=columns.units(torch.zeros(n, dtype=torch.long)).each(lambda field: field.to(device)),
        )

    def after_step(self) -> None:
        """The teacher is another model, and stays as it is."""
        self.local.after_step()

    def state_dict(self) -> dict[str, Tensor]:
        """What has to be saved of the teacher."""
        return self.local.state_dict()

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """What `state_dict` gave."""
        self.local.load_state_dict(state)


def by_unit(reading: Reading, scores: Scores, rollout: Rollout, pair: Pair, support: Support) -> Scores:
    """The teacher's scores of its own tokens [T'] as scores by the student's tokens [T].

    A unit with a token that is not trained is not compared, nor, without spans, one that is not one token of both.
    """
    assert scores.teacher_hidden is not None
    ids, logp = rollout.response_ids.tolist(), scores.teacher_logp.double().cpu()
    columns = _Columns(len(ids))
    first = torch.zeros(len(ids), dtype=torch.long)
    for unit in reading.units:
        at, tokens = unit.student, logp[unit.teacher.start : unit.teacher.stop]
        shared = pair.shares(unit, ids, reading.teacher_ids)
        compared = bool(rollout.trained[at.start : at.stop].all()) and (shared or support.span != "none")
        columns.put(at, tokens, shared=shared, compared=compared)
        first[at.start : at.stop] = unit.teacher.start
    device = scores.teacher_logp.device
    first = first.to(device)
    spread = scores.teacher_entropy
    return Scores(
        teacher_logp=columns.logp.float().to(device),
        teacher_hidden=scores.teacher_hidden[first],
        teacher_entropy=None if spread is None else spread[first],
        scored=columns.scored.to(device),
        units=columns.units(torch.tensor(reading.student_bytes)).each(lambda field: field.to(device)),
    )


class _Columns:
    """The fields of `Units` by student token, filled unit by unit; NaN where there is none."""

    def __init__(self, tokens: int) -> None:
        self.size = torch.zeros(tokens, dtype=torch.long)
        self.teacher_size = torch.zeros(tokens, dtype=torch.long)
        self.first = torch.full((tokens,), torch.nan, dtype=torch.double)
        self.rest = torch.full((tokens,), torch.nan, dtype=torch.double)
        self.logp = torch.full((tokens,), torch.nan, dtype=torch.double)
        self.shared, self.inside, self.scored = (torch.zeros(tokens, dtype=torch.bool) for _ in range(3))

    def put(self, at: range, logp: Tensor, *, shared: bool, compared: bool) -> None:
        """A unit of the student tokens `at`, and the log-probs of its teacher tokens."""
        where: Any = slice(at.start, at.stop)
        self.size[at.start] = len(at) if compared else 0
        self.teacher_size[where] = len(logp)
        self.first[where], self.rest[where] = logp[0], logp[1:].sum()
        self.logp[where] = logp.sum() / len(at)
        self.shared[where], self.inside[where], self.scored[where] = shared, compared, True

    def units(self, widths: Tensor) -> Units:
        """As a record."""
        return Units(
            size=self.size,
            teacher_size=self.teacher_size,
            first_logp=self.first.float(),
            rest_logp=self.rest.float(),
            shared=self.shared,
            inside=self.inside,
            bytes=widths,
        )


OneTeacher: TypeAlias = LocalTeacher | CrossTokenizerTeacher


def by_rule(rule: TeacherRule, student: LanguageModel, teacher: LocalTeacher | None) -> OneTeacher | None:
    """The teacher as the method's rule wants it: with tokens of its own, or as it is. Raises AlignmentError."""
    if teacher is None or rule.tokenizer == "students":
        return teacher
    return CrossTokenizerTeacher(local=teacher, pair=pair_of(student.tokenizer, teacher.lm.tokenizer))


def comparable(teacher: OneTeacher) -> LocalTeacher:
    """The teacher, where all its tokens are the student's. Raises ConfigError for one with tokens of its own."""
    if isinstance(teacher, LocalTeacher):
        return teacher
    raise ConfigError(
        f"{teacher.lm.name} is asked for its distribution at each of the student's tokens, and it reads the text in "
        "tokens of its own. Turn the comparison off (evaluate.kl, diagnostics.every), or use a teacher of the "
        "student's family and another method."
    )
