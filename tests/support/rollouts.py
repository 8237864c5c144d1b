"""Rollouts for tests of what reads their texts."""

from __future__ import annotations

from typing import Any

import torch

from opd.types import Prompt, Rollout


def text_rollout(text: str, prompt: Prompt, *, tokens: int = 1, **fields: Any) -> Rollout:
    """A finished response of this text, with `tokens` tokens that have nothing to do with it."""
    ids = torch.arange(1, tokens + 1)
    return Rollout(
        prompt=prompt,
        **{"sample": 0, **fields},
        prompt_ids=(0,),
        response_ids=ids,
        trained=ids > 0,
        turn=ids * 0,
        finished=True,
        text=text,
    )
