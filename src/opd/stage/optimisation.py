"""The optimiser of a stage, and the interface to it that an `Update` receives: weights, jumps, validation."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from opd.errors import NotFiniteError
from opd.evaluation.divergence import exact_divergence
from opd.models.language_model import LanguageModel
from opd.parallel import World
from opd.pieces.needs import Input, needs_of
from opd.rewards.base import StageRewards
from opd.stage.optimisers import Optimiser
from opd.teachers.routed import routed
from opd.types import Context, Memory, Prompt, ReservedStep, Rollout, Sampler, Teacher


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
                weight = sum(len(one.own_ids) for one in theirs)
                total, tokens = total + weight * found["reverse_kl"], tokens + weight
            return -total / tokens
