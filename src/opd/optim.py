"""AdamW, its schedule and clipping, behind the one call that an `Update` makes."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from opd.recipe import OptimizerSection


@dataclass(slots=True)
class Optimiser:
    """The trained parameters and what moves them. `grad_norm` is that of the last `clip()`, before clipping."""

    parameters: dict[str, nn.Parameter]
    adamw: torch.optim.AdamW
    schedule: torch.optim.lr_scheduler.LambdaLR
    max_grad_norm: float

    def clip(self) -> float:
        """Scale the gradient down to `max_grad_norm`; returns the global norm that it had."""
        return float(nn.utils.clip_grad_norm_(self.parameters.values(), self.max_grad_norm))

    def step(self) -> dict[str, float]:
        rate = float(self.schedule.get_last_lr()[0])
        self.adamw.step()
        self.schedule.step()
        self.adamw.zero_grad(set_to_none=True)
        return {"optim/learning_rate": rate}

    def state_dict(self) -> dict[str, Any]:
        return {"adamw": self.adamw.state_dict(), "schedule": {"last_epoch": self.schedule.last_epoch}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.adamw.load_state_dict(state["adamw"])
        self.schedule.last_epoch = state["schedule"]["last_epoch"]
        # LambdaLR keeps the rate in the parameter groups, which the optimizer's state has just restored.
        self.schedule._last_lr = [group["lr"] for group in self.adamw.param_groups]


def build(parameters: dict[str, nn.Parameter], section: OptimizerSection, steps: int) -> Optimiser:
    """An Optimiser over named parameters for a stage of `steps` updates."""
    assert parameters, "a model with nothing to train is refused before this"
    adamw = torch.optim.AdamW(
        list(parameters.values()),
        lr=section.learning_rate,
        betas=section.betas,
        eps=section.eps,
        weight_decay=section.weight_decay,
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(adamw, factor(section, steps))
    return Optimiser(parameters, adamw, schedule, section.max_grad_norm)


def factor(section: OptimizerSection, steps: int) -> Callable[[int], float]:
    """Update number (from 0) -> factor on the learning rate: linear warm-up, then the schedule down to 0."""
    warmup = section.warmup_steps

    def at(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        progress = (step - warmup) / max(1, steps - warmup)
        if section.schedule == "linear":
            return max(0.0, 1.0 - progress)
        if section.schedule == "cosine":
            return 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress)))
        return 1.0

    return at
