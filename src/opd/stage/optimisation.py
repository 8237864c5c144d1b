"""The optimiser of a stage, and the interface to it that an `Update` receives: weights, jumps, validation."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from opd.errors import NotFiniteError
from opd.evaluation.divergence import exact_divergence
from opd.models.language_model import LanguageModel
from opd.parallel import World, whole_tensor
from opd.pieces.needs import Input, needs_of
from opd.recipe.schema import OptimizerSection
from opd.rewards.base import StageRewards
from opd.teachers.routed import routed
from opd.types import Context, Memory, Prompt, ReservedStep, Rollout, Sampler, Teacher

FUSED_ON = ("cpu", "cuda")  # where torch has a fused AdamW, of the devices that runs use


@dataclass(slots=True, kw_only=True)
class StageOptimisation:
    """A stage's implementation of `opd.types.Optimisation`."""

    optimiser: Optimiser
    student: LanguageModel
    root: nn.Module
    teacher: Teacher
    sampler: Sampler  # of the student
    prompts: Sequence[Prompt]  # of training, all
    reward: StageRewards
    context: Context
    memory: Mapping[str, Memory]
    world: World
    seed: int
    micro_batch_tokens: int

    @property
    def updates(self) -> int:
        """Steps of the optimiser so far."""
        return self.optimiser.updates

    @property
    def parameters(self) -> Mapping[str, Tensor]:
        """The trained weights by name; sharded where the student is."""
        return self.optimiser.parameters

    def step(self) -> dict[str, float]:
        """Make one optimiser step; returns its metrics."""
        return self.optimiser.step()

    @torch.no_grad()
    def set(self, weights: Mapping[str, Tensor]) -> None:
        """Overwrite the trained weights of these names."""
        for name, values in weights.items():
            self.optimiser.parameters[name].copy_(values)

    def jumped(self, by: Mapping[str, Tensor]) -> None:
        """Apply the jump `by` of the student's weights to an EMA teacher."""
        self.teacher.jumped(by)

    def validate(self, by: Literal["reward", "teacher_kl"], prompts: int) -> float:
        """Mean reward, or minus the exact reverse KL in nats per token, of responses to `prompts` training prompts.

        Every call uses the same prompts and random numbers. Higher is better; -inf if the weights have overflowed, so
        that no response can be sampled, and if no response has a reward.
        """
        count, seed = min(prompts, len(self.prompts)), (self.seed, ReservedStep.VALIDATION)
        chosen = np.random.default_rng(seed).choice(len(self.prompts), count, replace=False)
        mine = [self.prompts[chosen[i]] for i in self.world.positions(range(count))]
        with self.world.gathered(self.root):
            written: list[Rollout] | None = None
            with suppress(NotFiniteError):
                self.sampler.sync(self.updates)
                written = self.sampler(mine, seed=(self.seed, ReservedStep.VALIDATION)) if mine else []
            if self.world.any(written is None) or written is None:
                return -math.inf
            if by == "reward":
                rewards = [one.reward for one in self.reward(written) if one.reward is not None]
                total, judged = self.world.sum(sum(rewards)), self.world.sum(len(rewards))
                return total / judged if judged else -math.inf
            if Input.REWARD in needs_of(self.context):  # the teacher reads a verdict or right responses
                written = self.reward(written)
            rollouts = [one for part in self.world.gather(written) for one in part]
            total = tokens = 0.0
            for teacher, indices in routed(self.teacher, rollouts):
                theirs = [rollouts[i] for i in indices]
                found = exact_divergence(
                    self.student,
                    teacher,
                    theirs,
                    self.context,
                    micro_batch_tokens=self.micro_batch_tokens,
                    names=("reverse_kl",),
                    world=self.world,
                )
                weight = sum(len(one.response_ids) for one in theirs)
                total, tokens = total + weight * found["reverse_kl"], tokens + weight
            return -total / tokens


@dataclass(slots=True)
class Optimiser:
    """The trained parameters, AdamW and its schedule."""

    parameters: dict[str, nn.Parameter]
    adamw: torch.optim.AdamW
    schedule: torch.optim.lr_scheduler.LambdaLR
    max_grad_norm: float

    def clip(self) -> float:
        """Scale the gradient down to `max_grad_norm`; returns its global norm before."""
        gradients = [p.grad for p in self.parameters.values() if p.grad is not None]
        norm = whole_tensor(nn.utils.get_total_norm(gradients))
        value = float(norm)
        if not value < self.max_grad_norm:  # also for NaN; a smaller gradient would be multiplied by 1
            nn.utils.clip_grads_with_norm_(self.parameters.values(), self.max_grad_norm, norm)
        return value

    def step(self) -> dict[str, float]:
        rate = float(self.schedule.get_last_lr()[0])
        self.adamw.step()
        self.schedule.step()
        self.adamw.zero_grad(set_to_none=True)
        return {"optim/learning_rate": rate}

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """AdamW's state, grouped by AdamW's key and then by parameter name; moments are sharded as the parameters."""
        groups: dict[str, dict[str, Tensor]] = {}
        for name, parameter in self.parameters.items():
            for key, value in self.adamw.state[parameter].items():
                groups.setdefault(f"adamw.{key}", {})[name] = value
        return groups

    @property
    def updates(self) -> int:
        """Number of updates so far, counted by the schedule."""
        return int(self.schedule.last_epoch)

    def restore(self, tensors: Mapping[str, Mapping[str, Tensor]], updates: int) -> None:
        """Continue from saved `tensors` and `updates`; groups of other owners in `tensors` are ignored."""
        for group, named in tensors.items():
            if group.startswith("adamw."):
                for name, value in named.items():
                    parameter = self.parameters[name]
                    # The fused step reads its own count on the parameter's device; checkpoints are read on the CPU.
                    self.adamw.state[parameter][group.removeprefix("adamw.")] = value.to(parameter.device)
        self.schedule.last_epoch = updates
        rates = zip(self.schedule.base_lrs, self.schedule.lr_lambdas, self.adamw.param_groups, strict=True)
        for base, factor_at, group in rates:
            group["lr"] = base * factor_at(updates)
        self.schedule._last_lr = [group["lr"] for group in self.adamw.param_groups]


def build(parameters: dict[str, nn.Parameter], section: OptimizerSection, steps: int) -> Optimiser:
    """An Optimiser over named parameters for a stage of `steps` updates."""
    assert parameters, "a model without trainable parameters is refused before this"
    # One pass over weight, gradient and both moments, instead of a dozen; on shards, each process updates its own.
    fused = all(parameter.device.type in FUSED_ON for parameter in parameters.values())
    adamw = torch.optim.AdamW(
        list(parameters.values()),
        lr=section.learning_rate,
        betas=section.betas,
        eps=section.eps,
        weight_decay=section.weight_decay,
        fused=fused,
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
