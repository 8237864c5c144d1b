"""AdamW, its schedule and clipping, behind the one call that an `Update` makes."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from opd.parallel import full
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
        gradients = [p.grad for p in self.parameters.values() if p.grad is not None]
        norm = full(nn.utils.get_total_norm(gradients))
        nn.utils.clip_grads_with_norm_(self.parameters.values(), self.max_grad_norm, norm)
        return float(norm)

    def step(self) -> dict[str, float]:
        rate = float(self.schedule.get_last_lr()[0])
        self.adamw.step()
        self.schedule.step()
        self.adamw.zero_grad(set_to_none=True)
        return {"optim/learning_rate": rate}

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """AdamW's state, by its own name for it and by parameter: moments in shards like the parameters."""
        groups: dict[str, dict[str, Tensor]] = {}
        for name, parameter in self.parameters.items():
            for key, value in self.adamw.state[parameter].items():
                groups.setdefault(f"adamw.{key}", {})[name] = value
        return groups

    @property
    def updates(self) -> int:
        """How many there have been, as the schedule counts."""
        return int(self.schedule.last_epoch)

    def restore(self, tensors: Mapping[str, Mapping[str, Tensor]], updates: int) -> None:
        """Go on from what `tensors` and `updates` were; other groups of `tensors` are ignored."""
        for group, named in tensors.items():
            if group.startswith("adamw."):
                for name, value in named.items():
                    self.adamw.state[self.parameters[name]][group.removeprefix("adamw.")] = value
        self.schedule.last_epoch = updates
        rates = zip(self.schedule.base_lrs, self.schedule.lr_lambdas, self.adamw.param_groups, strict=True)
        for base, factor_at, group in rates:
            group["lr"] = base * factor_at(updates)
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
