"""Scores of responses during sampling: a local teacher reads every token once, however often it is called."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from opd.models.decoding import Decoder, begin
from opd.models.render import render
from opd.pieces.supports import sampled
from opd.teachers.local import LocalTeacher
from opd.teachers.routed import routed
from opd.teachers.scoring import parted, teacher_scores
from opd.types import Context, Rollout, Scorer, ScoreRequest, Scores, Teacher


def scoring_along(teacher: Teacher, context: Context, request: ScoreRequest) -> Callable[[], Scorer]:
    """A function that returns a new `Scorer`: unfinished responses -> their scores so far.

    A local teacher reads each token once; any other teacher scores the whole responses at each call.
    """

    def begin() -> Scorer:
        scorers: dict[int, Scorer] = {}  # by teacher

        def score(rollouts: Sequence[Rollout]) -> list[Scores]:
            found: dict[int, Scores] = {}
            for one, rows in routed(teacher, rollouts):
                scorer = scorers.setdefault(id(one), _scorer(one, context, request))
                found |= dict(zip(rows, scorer([rollouts[i] for i in rows]), strict=True))
            return [found[i] for i in range(len(rollouts))]

        return score

    return begin


def _scorer(teacher: Teacher, context: Context, request: ScoreRequest) -> Scorer:
    if isinstance(teacher, LocalTeacher) and teacher.lm.reading.shares:
        return IncrementalScorer(
            teacher=teacher, context=context, request=replace(request, support=sampled(), entropy=False)
        )
    return lambda rollouts: teacher.score(rollouts, context(rollouts), request)


@dataclass(slots=True, kw_only=True)
class IncrementalScorer:
    """Scores responses that grow by equally many tokens from call to call; some may end in between.

    Keeps the teacher's KV cache for the responses of the last call, as large as the sampler's cache of the student. A
    response that is not cached restarts the cache for all. A context is rendered once, when the cache starts. Responses
    of different lengths, conversations in a later turn, are scored as a whole.
    """

    teacher: LocalTeacher
    context: Context
    request: ScoreRequest
    places: dict[tuple[int, int], int] = field(default_factory=dict[tuple[int, int], int])  # of responses in the cache
    scores: list[Scores] = field(default_factory=list[Scores])  # of the tokens read so far, by place
    read: int = 0  # tokens read of each response
    longest: int = 0  # tokens of the longest prompt
    decoder: Decoder | None = None  # after `read` tokens

    @torch.no_grad()
    def __call__(self, rollouts: Sequence[Rollout]) -> list[Scores]:
        """The sampled tokens' log-probs and the teacher's `top_k` most likely tokens, at all tokens so far."""
        keys = [(rollout.prompt.id, rollout.sample) for rollout in rollouts]
        length, *others = {len(rollout.response_ids) for rollout in rollouts}
        if others:  # conversations in a later turn: they grow together no more
            return self.teacher.score(rollouts, self.context(rollouts), self.request)
        lm = self.teacher.lm
        with self.teacher.at_work() as head:
            if length <= self.read or not all(key in self.places for key in keys):
                self._begin(rollouts)
            else:  # a prompt that a step takes twice has equal responses: they share a place
                self._keep([self.places[key] for key in keys])
            assert self.decoder is not None
            lm.check_length(self.longest + length, "Lower sampling.max_completion_length.")
            hidden = self.decoder.hidden
            ids = torch.stack([rollout.response_ids[self.read :] for rollout in rollouts]).to(hidden.device)  # [b, n]
            states = torch.cat([hidden[:, None], self.decoder.read(ids)[:, :-1]], 1)  # [b, n, H] predict `ids`
            flat = teacher_scores(head, states.flatten(0, 1), ids.flatten(), self.request)
        new = parted(flat, [ids.shape[1]] * len(rollouts))
        self.scores = [_joined(old, one) for old, one in zip(self.scores, new, strict=True)] if self.scores else new
        self.places, self.read = {key: i for i, key in enumerate(keys)}, length
        return self.scores

    def _begin(self, rollouts: Sequence[Rollout]) -> None:
        lm = self.teacher.lm
        prompts = [render(one, lm.tokenizer, lm.template_options) for one in self.context(rollouts)]
        self.decoder = begin(lm, prompts)
        self.scores, self.read, self.longest = [], 0, max(map(len, prompts))

    def _keep(self, rows: list[int]) -> None:
        """Keep these places of the state and the scores; drop the others."""
        assert self.decoder is not None
        if rows != list(range(len(self.decoder.hidden))):
            self.scores = [self.scores[row] for row in rows]
        self.decoder.keep(rows)


def _joined(old: Scores, new: Scores) -> Scores:
    """`old` and `new`, concatenated."""

    def joined(a: Tensor | None, b: Tensor | None) -> Tensor | None:
        return None if a is None or b is None else torch.cat([a, b])

    return replace(
        new,
        teacher_logp=torch.cat([old.teacher_logp, new.teacher_logp]),
        teacher_top_ids=joined(old.teacher_top_ids, new.teacher_top_ids),
        teacher_top_logp=joined(old.teacher_top_logp, new.teacher_top_logp),
    )
