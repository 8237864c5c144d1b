"""Responses with their per-token numbers as rows of a Parquet file."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from opd.types import Batch, Rollout


def sample_rows(rollouts: Sequence[Rollout], **columns: Any) -> list[dict[str, Any]]:
    """Rollouts as flat rows for a Parquet file."""
    return [
        {
            **columns,
            "task": r.prompt.task,
            "prompt_id": r.prompt.id,
            "sample": r.sample,
            "prompt": r.prompt.content if isinstance(r.prompt.content, str) else str(r.prompt.content[-1]["content"]),
            "response": r.text,
            "reward": r.reward,
            "finished": r.finished,
            "sampler_version": r.sampler_version,
            "response_ids": r.response_ids.tolist(),
            "sampler_logp": None if r.sampler_logp is None else r.sampler_logp.tolist(),
            "policy_logp": None if r.policy_logp is None else r.policy_logp.tolist(),
        }
        for r in rollouts
    ]


def rows_of(batch: Batch) -> list[dict[str, Any]]:
    """The step's responses with their per-token numbers."""
    rows = sample_rows(batch.rollouts)
    for i, row in enumerate(rows):
        t = len(batch.rollouts[i].response_ids)
        teacher_logp = batch.teacher_logp[i, :t]
        row["teacher_logp"] = None if bool(teacher_logp.isnan().any()) else teacher_logp.tolist()
        row["weight"] = None if batch.weight is None else batch.weight[i, :t].tolist()
        row["advantage"] = None if batch.advantage is None else batch.advantage[i, :t].tolist()
    return rows
