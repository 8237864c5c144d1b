"""Sampling from a transformers model in this process: a decode loop over its cache.

Why not `generate()`: a row's randomness must depend only on (seed, step, prompt id, sample), not on the batch; the
sampled token's log-prob, before and after truncation, and the student's top-K come from the same logits; a prompt is
read once for all its responses; and finished rows leave the batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from opd.maths.largest import largest
from opd.messages import text_after
from opd.models.decoding import batches_of, begin
from opd.models.language_model import LanguageModel, evaluating
from opd.models.render import render_checked
from opd.models.ticks import Count, counting
from opd.pieces.supports import check_fits
from opd.samplers.draw import draw
from opd.samplers.prepack import prepacked
from opd.types import NOTHING_MORE, EarlyStop, Prompt, Record, Rollout, Sampler, Sampling

ROWS = 64  # rows decoded together; more is faster while the cache fits


@dataclass(slots=True)
class _Row:
    """One response during sampling."""

    prompt: Prompt
    sample: int
    prompt_ids: list[int]
    uniforms: Tensor  # [limit] float64
    limit: int  # tokens that it may write
    prefix: tuple[int, ...] = ()  # given first tokens of the response
    ids: list[int] = field(default_factory=list[int])
    sampler_logp: list[float] = field(default_factory=list[float])
    policy_logp: list[float] = field(default_factory=list[float])
    entropy: list[float] = field(default_factory=list[float])
    top_ids: list[Tensor] = field(default_factory=list[Tensor])
    finished: bool = False
    ended: bool = False  # finished, or told to stop

    @property
    def read(self) -> list[int]:
        """The tokens that the model reads before it writes."""
        return [*self.prompt_ids, *self.prefix]


@dataclass(slots=True, kw_only=True)
class TransformersSampler(Sampler):
    """Writes responses with a model's current weights; a `Sampler`."""

    lm: LanguageModel
    sampling: Sampling
    max_prompt_length: int | None = None
    limited_by: str = "sampling.max_completion_length"  # the setting that makes responses shorter
    first_sample: int = 0  # the number of the first response to each prompt
    version: int = 0  # the step of the weights, recorded in every rollout
    ends: frozenset[int] = field(init=False)  # end tokens that are no text, also where the tokenizer decodes them

    def __post_init__(self) -> None:
        self.ends = self.lm.stop_ids & self.lm.tokenizer.added_tokens_decoder.keys()

    @property
    def temperature(self) -> float:
        """The temperature of `policy_logp` and of recorded entropies."""
        return self.sampling.temperature or 1.0

    def sync(self, version: int) -> None:
        """Record the version; the weights are the student's own already."""
        self.version = version

    def __call__(
        self,
        prompts: Sequence[Prompt],
        *,
        seed: tuple[int, int],
        record: Record = NOTHING_MORE,
        stop: EarlyStop | None = None,
        prefixes: Sequence[Sequence[int]] | None = None,
    ) -> list[Rollout]:
        """`sampling.n` responses to each prompt, in order. `stop` may end responses during sampling.

        `prefixes`, one per prompt, are the first token ids of its responses. They are read without encoding them again.
        They are not trained, their log-probs are NaN, and the length limit does not count them.

        Raises DataError for a prompt or response that is too long, ConfigError for a top-k larger than the vocabulary.
        """
        ids = render_checked(
            prompts,
            self.lm.tokenizer,
            max_prompt_length=self.max_prompt_length,
            template_options=self.lm.template_options,
        )
        check_fits(record.top_k, self.lm.vocabulary)
        assert prefixes is None or record == NOTHING_MORE, "prefix tokens are not drawn, so they have no records"
        limit = self.sampling.max_completion_length
        rows = [
            _Row(prompt, sample, prompt_ids, uniforms_of(seed, prompt.id, sample, limit), limit, tuple(prefix))
            for prompt, prompt_ids, prefix in zip(prompts, ids, prefixes or [()] * len(prompts), strict=True)
            for sample in range(self.first_sample, self.first_sample + self.sampling.n)
        ]
        self._write_all(rows, record, stop)
        return [self._rollout(row) for row in rows]

    def extend(
        self,
        rollouts: Sequence[Rollout],
        turn: int,
        limits: Sequence[int],
        *,
        seed: tuple[int, int],
        record: Record = NOTHING_MORE,
        stop: EarlyStop | None = None,
    ) -> list[Rollout]:
        """The next turn of conversations, as rollouts of its tokens alone: see `environments.protocol.TakesTurns`."""
        check_fits(record.top_k, self.lm.vocabulary)
        rows = [
            _Row(
                one.prompt,
                one.sample,
                [*one.prompt_ids, *one.response_ids.tolist()],
                uniforms_of(seed, one.prompt.id, one.sample, limit, turn),
                limit,
            )
            for one, limit in zip(rollouts, limits, strict=True)
        ]
        self._write_all(rows, record, stop)
        return [self._rollout(row) for row in rows]

    def completed(self, rollouts: Sequence[Rollout], record: Record) -> list[Rollout]:
        """The rollouts: `extend` has recorded everything."""
        return list(rollouts)

    def _write_all(self, rows: Sequence[_Row], record: Record, stop: EarlyStop | None) -> None:
        # no_grad, not inference mode, in which autocast does not cache the weights that it casts.
        free = torch.no_grad() if self.lm.autocast else torch.inference_mode()
        model, counted = evaluating(self.lm.model), counting("responses", len(rows))
        with model, self.lm.casting_once(), prepacked(self.lm) as logits_of, free, counted as count:
            for batch in batches_of(self.lm, rows, [len(row.read) for row in rows], ROWS):
                self._decode(batch, logits_of, record, stop, count)
                count.add(len(batch))

    def _decode(
        self,
        rows: list[_Row],
        logits_of: Callable[[Tensor], Tensor],
        record: Record,
        stop: EarlyStop | None,
        count: Count,
    ) -> None:
        lm = self.lm
        known = lm.positions
        active, longest_limit = list(rows), max(row.limit for row in rows)
        decoder = begin(lm, [row.read for row in rows], more=longest_limit - 1)
        for t in range(longest_limit):
            ids = self._write(active, logits_of(decoder.hidden), t, record)
            count.add(tokens=len(active))
            if stop is not None and (t + 1) % stop.every == 0:
                self._end_early(stop, active)
            keep = [i for i, row in enumerate(active) if not row.ended and t + 1 < row.limit]
            if not keep:
                return
            if len(keep) < len(active):
                decoder.keep(keep)
                active, ids = [active[i] for i in keep], ids[keep]
            longest = len(active[-1].prompt_ids) + len(active[-1].prefix) + t + 1  # rows are in order of length
            if longest > known:
                lm.check_length(longest, f"Lower {self.limited_by}, or leave out the longest prompts.")
            decoder.read(ids[:, None])

    def _write(self, active: list[_Row], logits: Tensor, t: int, record: Record) -> Tensor:
        """Draw a token for every row and record it; the ids [b]."""
        sampling = self.sampling
        drawn = draw(
            logits,
            torch.stack([row.uniforms[t] for row in active]).to(logits.device),
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            entropy=record.entropy,
        )
        top = largest(logits, record.top_k)[1].cpu() if record.top_k else None
        values = [drawn.ids, drawn.sampler_logp, drawn.policy_logp, *([] if drawn.entropy is None else [drawn.entropy])]
        # One copy from a GPU, which waits for it. float64 is exact for every id.
        for i, (row, (token, mu, p, *entropy)) in enumerate(
            zip(active, torch.stack([value.double() for value in values], 1).tolist(), strict=True)
        ):
            row.ids.append(int(token))
            row.sampler_logp.append(mu)
            row.policy_logp.append(p)
            row.entropy += entropy
            if top is not None:
                row.top_ids.append(top[i])
            row.finished = row.ended = row.ids[-1] in self.lm.stop_ids or self._stopped(row)
        return drawn.ids

    def _end_early(self, stop: EarlyStop, active: list[_Row]) -> None:
        """End the unfinished responses that `stop` does not continue."""
        unfinished = [row for row in active if not row.ended]
        if not unfinished:
            return
        with torch.inference_mode(False), torch.no_grad():  # its results may be used with gradients later
            keeps = stop.keeps_going([self._rollout(row) for row in unfinished])
        for row, keeps_going in zip(unfinished, keeps, strict=True):
            row.ended = not keeps_going

    def _stopped(self, row: _Row) -> bool:
        """Whether the new text completes a stop string, which may begin in the given prefix.

        A token has at least one byte, which limits the tokens decoded.
        """
        stops = self.sampling.stop
        if not stops:
            return False
        back = max(len(s.encode()) for s in stops) + 4
        ids = [*row.prefix[-back:], *row.ids[-back:]][-back:]
        tail = self.lm.tokenizer.decode(ids)
        of_prefix = ids[: max(0, len(ids) - len(row.ids))]
        given = self.lm.tokenizer.decode(of_prefix) if of_prefix else ""
        return any(tail.count(stop) > given.count(stop) for stop in stops)

    def _rollout(self, row: _Row) -> Rollout:
        ids, given = [*row.prefix, *row.ids], len(row.prefix)
        spoken = ids[:-1] if ids and ids[-1] in self.ends else ids
        return Rollout(
            prompt=row.prompt,
            sample=row.sample,
            prompt_ids=tuple(row.prompt_ids),
            response_ids=torch.tensor(ids),
            trained=torch.arange(len(ids)) >= given,
            turn=torch.zeros(len(ids), dtype=torch.long),
            finished=row.finished,
            text=text_after(row.prompt_ids, spoken, self.lm.tokenizer),
            sampler_logp=torch.tensor([torch.nan] * given + row.sampler_logp),
            policy_logp=torch.tensor([torch.nan] * given + row.policy_logp),
            student_top_ids=torch.stack(row.top_ids) if row.top_ids else None,
            student_entropy=torch.tensor(row.entropy) if row.entropy else None,
            sampler_version=self.version,
            sampling=self.sampling,
        )


def uniforms_of(seed: tuple[int, int], prompt_id: int, sample: int, length: int, turn: int = 0) -> Tensor:
    """The random numbers of one response, [length] float64: a function of (seed, step), prompt and sample only.

    In a conversation each turn of the student has its own; those of the first turn are a response's.
    """
    later = (turn,) if turn else ()
    return torch.from_numpy(np.random.default_rng((*seed, prompt_id, sample, *later)).random(length))
