"""Sampling from a transformers model in this process: a decode loop over its cache.

Why not `generate()`: every row's randomness has to come from (seed, step, prompt id, sample) alone, whatever else is
in the batch; the drawn token's log-prob, before and after truncation, and the student's top-K come from the same
logits; and rows that have ended leave the batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from opd.models import LanguageModel, evaluating
from opd.render import render_checked
from opd.samplers.draw import draw
from opd.supports import check_fits
from opd.types import Prompt, Rollout, Sampling

ROWS = 64  # rows decoded together; more is faster until the cache no longer fits


@dataclass(slots=True)
class _Row:
    """One response while it is written."""

    prompt: Prompt
    sample: int
    prompt_ids: list[int]
    uniforms: Tensor  # [max_completion_length] float64
    ids: list[int] = field(default_factory=list[int])
    sampler_logp: list[float] = field(default_factory=list[float])
    policy_logp: list[float] = field(default_factory=list[float])
    top_ids: list[Tensor] = field(default_factory=list[Tensor])
    finished: bool = False


@dataclass(slots=True, kw_only=True)
class TransformersSampler:
    """Writes responses with a model's current weights; a `Sampler`."""

    lm: LanguageModel
    sampling: Sampling
    max_prompt_length: int | None = None
    version: int = 0  # optimiser steps behind the weights, recorded in every rollout

    @torch.no_grad()
    def __call__(self, prompts: Sequence[Prompt], *, seed: tuple[int, int], student_top_k: int = 0) -> list[Rollout]:
        ids = render_checked(
            prompts,
            self.lm.tokenizer,
            max_prompt_length=self.max_prompt_length,
            template_options=self.lm.template_options,
        )
        check_fits(student_top_k, self.lm.vocabulary)
        rows = [
            _Row(prompt, sample, prompt_ids, uniforms_of(seed, prompt.id, sample, self.sampling.max_completion_length))
            for prompt, prompt_ids in zip(prompts, ids, strict=True)
            for sample in range(self.sampling.n)
        ]
        by_length = sorted(rows, key=lambda row: len(row.prompt_ids))
        with evaluating(self.lm.model):
            for start in range(0, len(rows), ROWS):
                self._decode(by_length[start : start + ROWS], student_top_k)
        return [self._rollout(row) for row in rows]

    def _decode(self, rows: list[_Row], student_top_k: int) -> None:
        lm, sampling = self.lm, self.sampling
        head = lm.head()
        input_ids, attention_mask, positions = left_padded([row.prompt_ids for row in rows], lm.device)
        cache: Any = None
        active = list(rows)
        for t in range(sampling.max_completion_length):
            lm.check_length(int(positions.max()) + 1, "Lower sampling.max_completion_length, or set max_prompt_length.")
            out = lm.forward(
                input_ids,
                attention_mask=attention_mask,
                position_ids=positions,
                past_key_values=cache,
                use_cache=True,
            )
            cache = out.past_key_values
            logits = head.logits(out.last_hidden_state[:, -1])
            uniforms = torch.stack([row.uniforms[t] for row in active]).to(lm.device)
            ids, sampler_logp, policy_logp = draw(
                logits, uniforms, temperature=sampling.temperature, top_p=sampling.top_p, top_k=sampling.top_k
            )
            top = logits.topk(student_top_k, dim=-1).indices.cpu() if student_top_k else None
            record = zip(active, ids.tolist(), sampler_logp.tolist(), policy_logp.tolist(), strict=True)
            for i, (row, token, mu, p) in enumerate(record):
                row.ids.append(token)
                row.sampler_logp.append(mu)
                row.policy_logp.append(p)
                if top is not None:
                    row.top_ids.append(top[i])
                row.finished = token in lm.stop_ids or self._stopped(row)
            keep = [i for i, row in enumerate(active) if not row.finished]
            if not keep:
                return
            if len(keep) < len(active):
                index = torch.tensor(keep, device=lm.device)
                cache.batch_select_indices(index)
                attention_mask, positions, ids = attention_mask[index], positions[index], ids[index]
                active = [active[i] for i in keep]
            input_ids = ids[:, None]
            positions = positions[:, -1:] + 1
            attention_mask = torch.cat([attention_mask, torch.ones_like(input_ids)], 1)

    def _stopped(self, row: _Row) -> bool:
        """Whether the text ends with a stop string; a token holds at least one byte, which bounds the look back."""
        stops = self.sampling.stop
        if not stops:
            return False
        tail = self.lm.tokenizer.decode(row.ids[-(max(len(s.encode()) for s in stops) + 4) :])
        return any(stop in tail for stop in stops)

    def _rollout(self, row: _Row) -> Rollout:
        ids = torch.tensor(row.ids)
        return Rollout(
            prompt=row.prompt,
            sample=row.sample,
            prompt_ids=tuple(row.prompt_ids),
            response_ids=ids,
            trained=torch.ones(len(row.ids), dtype=torch.bool),
            turn=torch.zeros(len(row.ids), dtype=torch.long),
            finished=row.finished,
            text=self.lm.tokenizer.decode(row.ids, skip_special_tokens=True),
            sampler_logp=torch.tensor(row.sampler_logp),
            policy_logp=torch.tensor(row.policy_logp),
            student_top_ids=torch.stack(row.top_ids) if row.top_ids else None,
            sampler_version=self.version,
            sampling=self.sampling,
        )


def uniforms_of(seed: tuple[int, int], prompt_id: int, sample: int, length: int) -> Tensor:
    """The random numbers of one response, [length] float64: a function of (seed, step), prompt and sample alone."""
    return torch.from_numpy(np.random.default_rng((*seed, prompt_id, sample)).random(length))


def left_padded(rows: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """(input_ids, attention_mask, position_ids), each [b, L], the rows' ends aligned."""
    longest = max(len(row) for row in rows)
    ids = torch.tensor([[0] * (longest - len(row)) + list(row) for row in rows], device=device)
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows], device=device)
    return ids, mask, (mask.cumsum(-1) - 1).clamp(min=0)
