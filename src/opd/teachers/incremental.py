"""A teacher that reads along while responses are written: every token once, however often it is asked."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from opd.method import Method
from opd.models.forward import prefill
from opd.models.render import render
from opd.pieces.supports import sampled
from opd.teachers.cross_tokenizer import OneTeacher
from opd.teachers.local import LocalTeacher
from opd.teachers.routed import SeveralTeachers, shares_of
from opd.teachers.scoring import teacher_scores
from opd.types import Context, Rollout, Scores


def reading_along(
    method: Method, teacher: OneTeacher | SeveralTeachers
) -> Callable[[], Callable[[Sequence[Rollout]], list[Scores]]]:
    """Begins a reading: a function of unfinished responses, as they are so far, that gives what the method asks for."""

    def begin() -> Callable[[Sequence[Rollout]], list[Scores]]:
        """A reading with nothing read yet; each teacher of several has its own."""
        readers: dict[int, ReadsAlong] = {}

        def score(rollouts: Sequence[Rollout]) -> list[Scores]:
            found: dict[int, Scores] = {}
            for one, rows in shares_of(teacher, rollouts):
                assert isinstance(one, LocalTeacher), "top tokens of two vocabularies are refused before this"
                reader = readers.setdefault(
                    id(one),
                    ReadsAlong(teacher=one, context=method.context, temperature=method.temperature, top_k=method.top_k),
                )
                found |= dict(zip(rows, reader([rollouts[i] for i in rows]), strict=True))
            return [found[i] for i in range(len(rollouts))]

        return score

    return begin


@dataclass(slots=True, kw_only=True)
class ReadsAlong:
    """Scores of responses that grow from call to call, all by as many tokens, and of which some end.

    It holds the teacher's cache of those that it was asked about last, as much as the sampler holds of the student's.
    One that it does not know begins anew, with all that are asked about then. A context is that of the first time.
    """

    teacher: LocalTeacher
    context: Context
    temperature: float
    top_k: int
    places: dict[tuple[int, int], int] = field(default_factory=dict[tuple[int, int], int])  # of responses in the cache
    scores: list[Scores] = field(default_factory=list[Scores])  # of the tokens that were read, by place
    read: int = 0  # tokens of each response
    longest: int = 0  # tokens of a prompt
    state: tuple[Tensor, Any, Tensor | None, Tensor] | None = None  # as of `prefill`, further on

    @torch.no_grad()
    def __call__(self, rollouts: Sequence[Rollout]) -> list[Scores]:
        """The sampled tokens' log-probs, and `top_k` of the teacher's most likely tokens, at all tokens so far."""
        keys = [(rollout.prompt.id, rollout.sample) for rollout in rollouts]
        (length,) = {len(rollout.response_ids) for rollout in rollouts}
        lm = self.teacher.lm
        with self.teacher.asked() as head:
            if length <= self.read or not all(key in self.places for key in keys):
                self._begin(rollouts)
            else:  # a prompt that a step takes twice has the same responses twice: one place is enough
                self._keep([self.places[key] for key in keys])
            assert self.state is not None
            hidden, cache, mask, last = self.state
            lm.check_length(self.longest + length, "Lower sampling.max_completion_length.")
            ids = torch.stack([rollout.response_ids[self.read :] for rollout in rollouts]).to(hidden.device)  # [b, n]
            mask = None if mask is None else torch.cat([mask, torch.ones_like(ids)], 1)
            positions = last + torch.arange(1, ids.shape[1] + 1, device=ids.device)
            out = lm.forward(ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True)
            states = torch.cat([hidden[:, None], out.last_hidden_state[:, :-1]], 1)  # [b, n, H] predict `ids`
            flat = teacher_scores(
                head, states.flatten(0, 1), ids.flatten(), sampled(), self.temperature, top_k=self.top_k
            )
        self.state = out.last_hidden_state[:, -1], out.past_key_values, mask, positions[:, -1:]
        new = [_rows(flat, slice(i * ids.shape[1], (i + 1) * ids.shape[1])) for i in range(len(rollouts))]
        self.scores = [_behind(old, one) for old, one in zip(self.scores, new, strict=True)] if self.scores else new
        self.places, self.read = {key: i for i, key in enumerate(keys)}, length
        return self.scores

    def _begin(self, rollouts: Sequence[Rollout]) -> None:
        lm = self.teacher.lm
        prompts = [render(one, lm.tokenizer, lm.template_options) for one in self.context(rollouts)]
        self.state = prefill(lm, prompts)
        self.scores, self.read, self.longest = [], 0, max(map(len, prompts))

    def _keep(self, rows: list[int]) -> None:
        """Of the state and the scores those places alone."""
        assert self.state is not None
        hidden, cache, mask, last = self.state
        if rows == list(range(len(hidden))):
            return
        index = torch.tensor(rows, device=hidden.device)
        cache.batch_select_indices(index)
        self.scores = [self.scores[row] for row in rows]
        self.state = hidden[index], cache, None if mask is None else mask[index], last[index]


def _rows(scores: Scores, rows: slice) -> Scores:
    top, logp = scores.teacher_top_ids, scores.teacher_top_logp
    return Scores(
        teacher_logp=scores.teacher_logp[rows],
        teacher_top_ids=None if top is None else top[rows],
        teacher_top_logp=None if logp is None else logp[rows],
    )


def _behind(old: Scores, new: Scores) -> Scores:
    """Both, one after the other."""

    def joined(a: Tensor | None, b: Tensor | None) -> Tensor | None:
        return None if a is None or b is None else torch.cat([a, b])

    return replace(
        new,
        teacher_logp=torch.cat([old.teacher_logp, new.teacher_logp]),
        teacher_top_ids=joined(old.teacher_top_ids, new.teacher_top_ids),
        teacher_top_logp=joined(old.teacher_top_logp, new.teacher_top_logp),
    )
