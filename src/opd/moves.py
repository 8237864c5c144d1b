"""What an `Update` of a method is handed: the optimiser, the weights, and a way to ask how good they are."""

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
from opd.evaluate import exact_divergence, rewarded_by_task
from opd.models import LanguageModel
from opd.needs import needs_of
from opd.optim import Optimiser
from opd.parallel import World
from opd.rewards import AnyReward
from opd.teachers.cross_tokenizer import OneTeacher, comparable
from opd.teachers.local import LocalTeacher
from opd.teachers.several import SeveralTeachers, shares_of
from opd.types import Context, Prompt, Rollout, Sampler

VALIDATION_STEP = 2**31 - 2  # no step of training draws with it: all candidates are asked with the same random numbers


@dataclass(slots=True, kw_only=True)
class Moves:
    """The `Optimisation` of a stage."""

    optimiser: Optimiser
    student: LanguageModel
    root: nn.Module
    teacher: OneTeacher | SeveralTeachers | None
    writer: Sampler  # the student
    prompts: Sequence[Prompt]  # of training, all
    rewards: Mapping[str | None, AnyReward | None]  # by task
    context: Context
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
        """One step of the optimiser; its metrics."""
        return self.optimiser.step()

    @torch.no_grad()
    def set(self, weights: Mapping[str, Tensor]) -> None:
        """Put `weights` in the place of those that they name."""
        for name, values in weights.items():
            self.optimiser.parameters[name].copy_(values)

    def jumped(self, by: Mapping[str, Tensor]) -> None:
        """The student has moved `by` outside of an optimiser's step: a teacher that follows it moves along."""
        if isinstance(self.teacher, LocalTeacher):
            self.teacher.moved(by)

    def validate(self, by: Literal["reward", "teacher_kl"], prompts: int) -> float:
        """Mean reward, or minus the exact reverse KL in nats a token, of responses to `prompts` training prompts.

        Which prompts those are, and all that is random in the responses, is the same at every call. Higher is better;
        weights that have overflowed, so that no response can be drawn, are worth -inf.
        """
        count = min(prompts, len(self.prompts))
        chosen = np.random.default_rng((self.seed, VALIDATION_STEP)).choice(len(self.prompts), count, replace=False)
        mine = [self.prompts[chosen[i]] for i in self.world.positions(range(count))]
        with self.world.gathered(self.root):
            written: list[Rollout] | None = None
            with suppress(NotFiniteError):
                written = self.writer(mine, seed=(self.seed, VALIDATION_STEP)) if mine else []
            if self.world.any(written is None) or written is None:
                return -math.inf
            if by == "reward":
                rewards = [one.reward or 0.0 for one in rewarded_by_task(self.rewards, written)]
                return self.world.sum(sum(rewards)) / self.world.sum(len(rewards))
            assert self.teacher is not None, "a method without a teacher is refused before this"
            if "reward" in needs_of(self.context):  # the teacher reads a verdict, or the right ones among its peers
                written = rewarded_by_task(self.rewards, written, self.world)
            rollouts = [one for part in self.world.gather(written) for one in part]
            total = tokens = 0.0
            for teacher, indices in shares_of(self.teacher, rollouts):
                asked = [rollouts[i] for i in indices]
                found = exact_divergence(
                    self.student,
                    comparable(teacher),
                    asked,
                    self.context,
                    micro_batch_tokens=self.micro_batch_tokens,
                    names=("reverse_kl",),
                    world=self.world,
                )
                weight = sum(len(one.response_ids) for one in asked)
                total, tokens = total + weight * found["reverse_kl"], tokens + weight
            return -total / tokens
