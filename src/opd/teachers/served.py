"""A teacher on vLLM servers: the sampled token, the teacher's top k, and given tokens by position.

A server gives log-probs of single tokens, at temperature 1, and neither hidden states nor the whole distribution. Its
softmax is over all rows of its output layer; that of a teacher in this process leaves out rows without a token.

| support | requests per response |
|---|---|
| sampled token, teacher's top k | one: log-probs of the given token and of the k most likely |
| student's top k | one: log-probs of the given tokens, by position |
| union, intersection, symmetric difference | both |

A server without scores by position gets a larger top k instead. Tokens of the student's top k that are not in it have
no score: they are left out of the support, and counted (`teacher_ids_missing`).
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from opd.engines.capabilities import OTHER_MODEL, Capabilities, check_same
from opd.engines.replicas import Job, Replicas
from opd.engines.scoring import refusal, top_of
from opd.engines.server import Answer
from opd.engines.vllm import TopScores, completion_fields, parse_positions, parse_top, positions_fields
from opd.errors import DataError, TeacherError
from opd.models.processors import refuse_images
from opd.models.render import render
from opd.pieces.supports import support_tokens
from opd.teachers.written import ServedWriter
from opd.types import Context, Prompt, Rollout, Sampling, ScoreRequest, Scores, Support, Teacher

ABSENT = -1e4  # the log-prob of an entry that the support's mask leaves out; finite, because 0 times infinity is NaN


@dataclass(slots=True, kw_only=True)
class ServedTeacher(Teacher):
    """A `Teacher` on `replicas` of one model. `tokenizer` renders what it reads; its ids are the student's."""

    name: str
    replicas: Replicas
    capabilities: Capabilities
    tokenizer: Any
    template_options: dict[str, Any]
    device: torch.device  # the student's
    max_failed: float  # largest share of responses without scores
    missing: int = field(default=0, init=False)  # entries of supports without a score, since the last `pop_requests`
    entries: int = field(default=0, init=False)
    # Of the last two calls of `score_early`, which may come in another thread, by row and k.
    early: list[dict[Hashable, Answer[TopScores]]] = field(default_factory=list[Any], init=False)

    def refuses(self, request: ScoreRequest) -> str | None:
        """Why a server cannot compute `request`."""
        return refusal(request)

    def score(self, rollouts: Sequence[Rollout], contexts: Sequence[Prompt], request: ScoreRequest) -> list[Scores]:
        """Scores in the order of the rollouts. A response without an answer is not scored, so none of it is trained.

        Raises DataError for a row that is longer than the servers read, TeacherError if more than `max_failed` of the
        responses have no scores, or if a server has another model than at the start.
        """
        refuse_images(contexts, f"The served teacher {self.name!r}")
        rendered = [render(context, self.tokenizer, self.template_options) for context in contexts]
        return self.score_after(rendered, rollouts, request)

    def score_after(
        self, prompt_ids: Sequence[Sequence[int]], rollouts: Sequence[Rollout], request: ScoreRequest
    ) -> list[Scores]:
        """`score` after given ids, one sequence per rollout, which the servers read as they are."""
        rows = [_Row(ids, rollout, request) for ids, rollout in zip(prompt_ids, rollouts, strict=True)]
        self._check_lengths(rows)
        by_position = bool(request.support.student_top_k) and self.capabilities.positions
        k = top_of(request, by_position, len(self.tokenizer))
        tops = [] if k is None else self._tops(rows, k)
        by_ids = self._by_position(rows) if by_position else []
        check_same(self.replicas, self.capabilities, len(self.tokenizer))
        self._check_failures([*tops, *by_ids])
        return [
            self._scores(row, tops[i] if tops else None, by_ids[i] if by_ids else None, request)
            for i, row in enumerate(rows)
        ]

    def writer(self, student: Any, sampling: Sampling, context: Context, max_prompt_length: int | None) -> ServedWriter:
        """A writer of responses on the servers, for an evaluation."""
        return ServedWriter(
            name=self.name,
            replicas=self.replicas,
            model=self.capabilities.model,
            tokenizer=self.tokenizer,
            template_options=self.template_options,
            student=student,
            sampling=sampling,
            context=context,
            max_prompt_length=max_prompt_length,
        )

    def score_early(self, rollouts: Sequence[Rollout], contexts: Sequence[Prompt], request: ScoreRequest) -> None:
        """Request the scores that need no student: of the sampled token, and of the teacher's top k."""
        if request.support.student_top_k:
            return
        refuse_images(contexts, f"The served teacher {self.name!r}")
        rendered = [render(context, self.tokenizer, self.template_options) for context in contexts]
        rows = [_Row(ids, rollout, request) for ids, rollout in zip(rendered, rollouts, strict=True)]
        k = top_of(request, False, len(self.tokenizer))
        assert k is not None
        answers = self.replicas.answers([self._top_job(row, k) for row in rows])
        found = {row.key(k): one for row, one in zip(rows, answers, strict=True) if one.value is not None}
        self.early = [*self.early[-1:], found]

    def _tops(self, rows: Sequence[_Row], k: int) -> list[Answer[TopScores]]:
        """The answers that came early, and those of the other rows."""
        known = {key: answer for one in self.early for key, answer in one.items()}
        absent = [i for i, row in enumerate(rows) if row.key(k) not in known]
        answers = self.replicas.answers([self._top_job(rows[i], k) for i in absent])
        now = dict(zip(absent, answers, strict=True))
        return [now[i] if i in now else known[row.key(k)] for i, row in enumerate(rows)]

    def pop_requests(self) -> dict[str, float]:
        """Requests, bytes, entries of supports and those of them without a score, since the last call."""
        counts = {"ids": float(self.entries), "ids_missing": float(self.missing)}
        self.missing = self.entries = 0
        return {**self.replicas.counts.pop(), **counts}

    def state_dict(self) -> dict[str, Tensor]:
        """The log-probs of the fixed sequence, by which a later start recognises the model."""
        return {"control": torch.from_numpy(self.capabilities.control)}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Raise TeacherError if the servers have another model than when the stage was saved."""
        if "control" not in state:
            return
        apart = float((torch.from_numpy(self.capabilities.control) - state["control"].cpu()).abs().mean())
        if apart > OTHER_MODEL:
            raise TeacherError(
                f"The servers of the teacher {self.name!r} have another model than in the stage's last steps: the "
                f"log-probs of a fixed sequence differ by {apart:.3g} nats per token. Start them with that model; the "
                "same command then continues. For another teacher, use another output_dir=..."
            )

    def _top_job(self, row: _Row, k: int) -> Job[TopScores]:
        return Job(
            path="v1/completions",
            fields=completion_fields(self.capabilities.model, row.ids, k),
            read=parse_top(row.ids, row.start, k),
            tokens=len(row.ids) + 1,
            group=id(row),  # these scores do not use the cache of the prompt
        )

    def _by_position(self, rows: Sequence[_Row]) -> list[Answer[np.ndarray]]:
        """Scores by position. A request whose first scored token is in the server's cache is sent again without it."""
        found = self.replicas.answers([self._positions_job(row, cached=True) for row in rows])
        hidden = [i for i, one in enumerate(found) if one.value is not None and not one.value.size]
        self.replicas.counts.add(repeated=len(hidden))
        again = self.replicas.answers([self._positions_job(rows[i], cached=False) for i in hidden])
        for i, answer in zip(hidden, again, strict=True):
            found[i] = answer
        return found

    def _positions_job(self, row: _Row, *, cached: bool) -> Job[np.ndarray]:
        wanted = row.wanted
        return Job(
            path="inference/v1/generate",
            fields=positions_fields(self.capabilities.model, row.ids, row.start, wanted, cached=cached),
            read=parse_positions(wanted, cached=cached),
            tokens=len(row.ids) + 1,
            group=tuple(row.ids[: row.start]) if cached else id(row),
        )

    def _check_lengths(self, rows: Sequence[_Row]) -> None:
        longest = max((len(row.ids) for row in rows), default=0)
        if self.capabilities.longest is not None and longest >= self.capabilities.longest:
            raise DataError(
                f"The teacher {self.name!r} reads at most {self.capabilities.longest - 1} tokens, prompt and response, "
                f"and a row has {longest}. Start its server with a larger --max-model-len, lower "
                "max_completion_length, or shorten the teacher's context."
            )

    def _check_failures(self, answers: Sequence[Answer[Any]]) -> None:
        failed = [answer for answer in answers if answer.value is None]
        if len(failed) > self.max_failed * len(answers):
            raise TeacherError(
                f"The servers of the teacher {self.name!r} gave no scores for {len(failed)} of {len(answers)} requests "
                f"of a step (`max_failed`: {self.max_failed:g}). The last: {failed[-1].failure}. Start the servers "
                "again; the same command then continues."
            )

    def _scores(
        self, row: _Row, top: Answer[TopScores] | None, by_ids: Answer[np.ndarray] | None, request: ScoreRequest
    ) -> Scores:
        """The record of one response, from the answers about it; an empty one if an answer is absent."""
        if any(answer is not None and answer.value is None for answer in (top, by_ids)):
            scores = row.empty(request)
        else:
            values = top and top.value, by_ids and by_ids.value
            scores = self._found(row, row.known(*values), values[0], request)
        return replace(scores, **{name: value.to(self.device) for name, value in _tensors(scores).items()})

    def _found(self, row: _Row, known: _Known, top: TopScores | None, request: ScoreRequest) -> Scores:
        scores = Scores(teacher_logp=known.sampled)
        support = request.support
        top_ids = None if top is None else torch.from_numpy(top.top_ids)
        if request.top_k:
            assert top is not None
            assert top_ids is not None
            logp = torch.from_numpy(top.top_logp[:, : request.top_k])
            scores = replace(scores, teacher_top_ids=top_ids[:, : request.top_k], teacher_top_logp=logp)
        if support.kind != "top_k":
            return scores
        chosen, exists = row.support(support, top_ids)
        logp, found = known.of(chosen)
        self.entries += int(exists.sum())
        self.missing += int((exists & ~found).sum())
        return replace(scores, support_ids=chosen, support_mask=exists & found, teacher_support_logp=logp)


def _tensors(scores: Scores) -> dict[str, Tensor]:
    return {name: value for name in scores.__dataclass_fields__ if isinstance(value := getattr(scores, name), Tensor)}


@dataclass(frozen=True, slots=True)
class _Known:
    """The log-probs that the answers about one response gave: of `ids` [T, M], and of the sampled tokens [T]."""

    ids: Tensor
    logp: Tensor
    sampled: Tensor

    def of(self, chosen: Tensor) -> tuple[Tensor, Tensor]:
        """(log-probs [T, K] of the tokens `chosen`, which of them are known); ABSENT where not."""
        same = chosen[:, :, None] == self.ids[:, None, :]
        found, place = same.any(-1), same.int().argmax(-1)
        return self.logp.gather(1, place).masked_fill(~found, ABSENT), found


class _Row:
    """One response with its context: the tokens of its requests."""

    def __init__(self, context: Sequence[int], rollout: Rollout, request: ScoreRequest) -> None:
        self.response = rollout.response_ids.cpu()
        self.ids = [*context, *self.response.tolist()]
        self.start = len(context)
        k = request.support.student_top_k
        assert not k or rollout.student_top_ids is not None, "the support reads the student's top-k"
        self.student_top = None if rollout.student_top_ids is None or not k else rollout.student_top_ids[:, :k].cpu()

    def key(self, k: int) -> Hashable:
        """What a request for the top k of this row depends on."""
        return (k, self.start, tuple(self.ids))

    @property
    def wanted(self) -> np.ndarray:
        """The tokens whose log-probs a request by position names, [T, k + 1]: the student's top k, the sampled one."""
        assert self.student_top is not None
        return torch.cat([self.student_top, self.response[:, None]], 1).numpy()

    def known(self, top: TopScores | None, by_ids: np.ndarray | None) -> _Known:
        """What the answers say."""
        ids, logp = [], []
        if by_ids is not None:
            ids.append(torch.from_numpy(self.wanted))
            logp.append(torch.from_numpy(by_ids))
        if top is not None:
            ids += [torch.from_numpy(top.top_ids), self.response[:, None]]
            logp += [torch.from_numpy(top.top_logp), torch.from_numpy(top.logp)[:, None]]
        return _Known(torch.cat(ids, 1), torch.cat(logp, 1), logp[-1][:, -1])

    def support(self, support: Support, top_ids: Tensor | None) -> tuple[Tensor, Tensor]:
        """The support's tokens and which of them exist, [T, K]."""
        teacher_top = None if top_ids is None or support.by == "student" else top_ids[:, : support.k]
        return support_tokens(
            support, student_top=self.student_top, teacher_top=teacher_top, sampled=self.response[:, None]
        )

    def empty(self, request: ScoreRequest) -> Scores:
        """The record of a response without answers: no token is scored."""
        n, k = len(self.response), request.top_k
        scores = Scores(
            teacher_logp=torch.full((n,), torch.nan),
            scored=torch.zeros(n, dtype=torch.bool),
            teacher_top_ids=torch.zeros(n, k, dtype=torch.int64) if k else None,
            teacher_top_logp=torch.full((n, k), ABSENT) if k else None,
        )
        if request.support.kind != "top_k":
            return scores
        nothing = torch.zeros(n, request.support.k, dtype=torch.int64)
        chosen, exists = self.support(request.support, nothing)
        return replace(
            scores,
            support_ids=chosen,
            support_mask=torch.zeros_like(exists),
            teacher_support_logp=torch.full(chosen.shape, ABSENT),
        )
