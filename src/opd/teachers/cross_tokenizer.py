"""A teacher with another tokenizer, which reads the text of a response in its own tokens."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from opd.errors import ConfigError
from opd.models.alignment import TeacherTokens, TokenizerPair, pair_of, retokenise
from opd.models.head import Head
from opd.models.language_model import LanguageModel
from opd.pieces.supports import full
from opd.teachers.local import LocalTeacher, local_teacher
from opd.types import NoTeacher, Prompt, Rollout, ScoreRequest, Scores, Shared, Support, Teacher, TeacherRule, Units


@dataclass(frozen=True, slots=True, kw_only=True)
class CrossTokenizerTeacher(Teacher):
    """A `Teacher` that wraps a local teacher with another tokenizer.

    Its scores have one row per student token: the teacher's log-prob of the token's unit, divided evenly among the
    unit's student tokens, so that sums over units and responses are the teacher's log-probs of the text. Entropy and
    hidden state are those before the unit's first token. A token outside all units is not scored.
    """

    local: LocalTeacher
    pair: TokenizerPair

    @property
    def lm(self) -> LanguageModel:
        """The model that scores."""
        return self.local.lm

    @property
    def name(self) -> str:
        """The model's name in the recipe."""
        return self.local.name

    def refuses(self, request: ScoreRequest) -> str | None:
        """Why it cannot compute `request`: it scores only units, without top tokens of the student's vocabulary."""
        if request.top_k:
            return "the method compares the most likely tokens of both models, but the teacher has another tokenizer"
        if request.support.kind != "units":
            return (
                f"the support {request.support.kind!r} has the student's tokens, but the teacher has another "
                "tokenizer. Give the method support=units()"
            )
        return None

    def head(self, teacher_id: str | None = None) -> Head:
        """The output layer for the hidden states, with the tokens that the student shares."""
        head = self.local.head(teacher_id)
        ids = torch.tensor(list(self.pair.shared.items()), device=head.weight.device)  # [K, 2]
        return replace(head, shared=Shared(student=ids[:, 0].contiguous(), teacher=ids[:, 1].contiguous()))

    @torch.no_grad()
    def score(self, rollouts: Sequence[Rollout], contexts: Sequence[Prompt], request: ScoreRequest) -> list[Scores]:
        """Scores by the student's tokens. The sampled tokens are always scored, because units consist of them.

        Raises ConfigError for a support other than units.
        """
        if why := self.refuses(request):
            raise ConfigError(f"The teacher {self.name!r} cannot score this: {why}.")
        support, entropy = request.support, request.entropy
        whole = replace(request, support=full(), sampled=True)
        retokenised = [retokenise(rollout.response_ids.tolist(), self.pair) for rollout in rollouts]
        read = [i for i, tokens in enumerate(retokenised) if tokens.teacher_ids]
        theirs = [replace(rollouts[i], response_ids=torch.tensor(retokenised[i].teacher_ids)) for i in read]
        found = self.local.score(theirs, [contexts[i] for i in read], whole) if read else []
        of = dict(zip(read, found, strict=True))
        return [
            by_unit(tokens, of[i], rollout, self.pair, support) if i in of else self._unscored(rollout, entropy)
            for i, (tokens, rollout) in enumerate(zip(retokenised, rollouts, strict=True))
        ]

    def _unscored(self, rollout: Rollout, entropy: bool) -> Scores:
        """Scores of a response without teacher tokens (only special tokens of the student): no token is scored."""
        n, device = len(rollout.response_ids), self.local.student_device
        unknown = torch.full((n,), torch.nan, device=device)
        columns = _Columns(n)
        return Scores(
            teacher_logp=unknown,
            teacher_hidden=torch.zeros(n, self.lm.head().weight.shape[1], device=device),
            teacher_entropy=unknown if entropy else None,
            scored=torch.tensor(columns.scored, device=device),
            units=columns.units([0] * n, device),
        )

    def after_step(self) -> None:
        """Passes the call on to the local teacher."""
        self.local.after_step()

    def state_dict(self) -> dict[str, Tensor]:
        """The tensors that a checkpoint saves."""
        return self.local.state_dict()

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore what `state_dict` returned."""
        self.local.load_state_dict(state)


def by_unit(tokens: TeacherTokens, scores: Scores, rollout: Rollout, pair: TokenizerPair, support: Support) -> Scores:
    """The teacher's scores of its own tokens [T'] as scores by the student's tokens [T].

    A unit with an untrained token is not compared. Without spans, only units that are one token of both are compared.
    """
    assert scores.teacher_hidden is not None
    ids, logp = rollout.response_ids.tolist(), scores.teacher_logp.tolist()
    trained, columns = rollout.trained.tolist(), _Columns(len(ids))
    first = [0] * len(ids)
    for unit in tokens.units:
        at, unit_logp = unit.student, logp[unit.teacher.start : unit.teacher.stop]
        shared = pair.shares(unit, ids, tokens.teacher_ids)
        compared = all(trained[at.start : at.stop]) and (shared or support.span != "none")
        columns.put(at, unit_logp, shared=shared, compared=compared)
        first[at.start : at.stop] = [unit.teacher.start] * len(at)
    device, spread = scores.teacher_logp.device, scores.teacher_entropy
    before = torch.tensor(first, device=device)
    return Scores(
        teacher_logp=torch.tensor(columns.logp, device=device),
        teacher_hidden=scores.teacher_hidden[before],
        teacher_entropy=None if spread is None else spread[before],
        scored=torch.tensor(columns.scored, device=device),
        units=columns.units(tokens.student_bytes, device),
    )


class _Columns:
    """The fields of `Units` by student token, filled unit by unit; NaN outside units. Lists, because they are short."""

    def __init__(self, tokens: int) -> None:
        self.size, self.teacher_size = [0] * tokens, [0] * tokens
        self.first, self.rest, self.logp = ([math.nan] * tokens for _ in range(3))
        self.shared, self.inside, self.scored = ([False] * tokens for _ in range(3))

    def put(self, at: range, logp: Sequence[float], *, shared: bool, compared: bool) -> None:
        """Add a unit of the student tokens `at`, with the log-probs of its teacher tokens."""
        if compared:
            self.size[at.start] = len(at)
        rest = math.fsum(logp[1:])
        for token in at:
            self.teacher_size[token] = len(logp)
            self.first[token], self.rest[token] = logp[0], rest
            self.logp[token] = (logp[0] + rest) / len(at)
            self.shared[token], self.inside[token], self.scored[token] = shared, compared, True

    def units(self, widths: Sequence[int], device: torch.device) -> Units:
        """The fields as a `Units` record."""
        return Units(
            size=torch.tensor(self.size, device=device),
            teacher_size=torch.tensor(self.teacher_size, device=device),
            first_logp=torch.tensor(self.first, device=device),
            rest_logp=torch.tensor(self.rest, device=device),
            shared=torch.tensor(self.shared, device=device),
            inside=torch.tensor(self.inside, device=device),
            bytes=torch.tensor(widths, device=device),
        )


def teacher_by_rule(
    rule: TeacherRule,
    student: LanguageModel,
    external: LanguageModel | None,
    *,
    micro_batch_tokens: int,
    offload: bool = False,
    chat: bool = False,
) -> Teacher:
    """The teacher of a method's rule: none, local, or with another tokenizer. Raises ConfigError, AlignmentError.

    `chat`: responses are turns of a conversation (see `alignment.pair_of`).
    """
    if rule.kind == "none":
        return NoTeacher()
    local = local_teacher(rule, student, external, micro_batch_tokens=micro_batch_tokens, offload=offload)
    return by_rule(rule, student, local, chat=chat)


def _written(lm: LanguageModel, token: int) -> bool:
    """Whether the model can write the token: it is below V, and not one of images."""
    return token < lm.vocabulary and token not in lm.unwritten


def by_rule(rule: TeacherRule, student: LanguageModel, local: LocalTeacher, *, chat: bool = False) -> Teacher:
    """The local teacher, wrapped if the method's rule allows another tokenizer."""
    if rule.tokenizer == "students":
        return local
    options = (student.template_options, local.lm.template_options)
    pair = pair_of(student.tokenizer, local.lm.tokenizer, chat=chat, options=options)
    both = {i: its for i, its in pair.shared.items() if _written(student, i) and _written(local.lm, its)}
    pair = replace(pair, shared=both)
    return CrossTokenizerTeacher(local=local, pair=pair)
