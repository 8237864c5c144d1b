"""A made-up world of tables: where to click, as a number of three digits, and a teacher that sees about where it is.

Each prompt has a target between 0 and 999. A policy has a logit for every digit after every prefix of every prompt, and
what it does is exact: the probability that its number lies in the target's box, and the mean distance. The teacher's
number lies around the target with the deviation `Kind.blur`: with a large one it is sure of the first digit and knows
nothing of the last, as a model that sees a box in a picture. The student's numbers lie around a wrong place.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from opd.method import Method
from opd.types import Batch
from opd_studies.worlds.wrong_habits import GROUP, PER_STEP, at, rollouts_of, update

DIGITS, BASE = 3, 10
NUMBERS = BASE**DIGITS
PROMPTS = 40
BOX = 20  # half the width of the target's box
OFF, SPREAD, NOISE = 80.0, 120.0, 0.3  # of the student: deviation of its place, of its numbers, and of its logits


class Digits:
    """The tokenizer of the world: the id of a digit is its value."""

    def get_vocab(self) -> dict[str, int]:
        """The ten digits."""
        return {str(i): i for i in range(BASE)}

    def decode(self, ids: list[int]) -> str:
        """The digits of the ids."""
        return "".join(map(str, ids))


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """The deviation of the teacher's numbers."""

    blur: float


@dataclass(frozen=True, slots=True, kw_only=True)
class World:
    """`target` [X] int64; the teacher's log-probs [X, prefixes, 10]."""

    target: Tensor
    teacher: Tensor


def around(centre: Tensor, deviation: float) -> Tensor:
    """[X] -> log-probs of each digit after each prefix, [X, prefixes, 10], of numbers around the centres."""
    distance = torch.arange(NUMBERS)[None] - centre[:, None].float()
    logp = (-(distance**2) / (2.0 * deviation**2)).log_softmax(-1)
    nodes = [logp.reshape(len(centre), BASE**level, BASE, -1).logsumexp(-1).log_softmax(-1) for level in range(DIGITS)]
    return torch.cat(nodes, 1)


def prefixes_of(tokens: Tensor) -> Tensor:
    """[B, T] digits -> the number of the prefix before each, in the order of `around`, [B, T]."""
    places, first, value = list[Tensor](), 0, torch.zeros_like(tokens[:, 0])
    for t in range(tokens.shape[1]):
        places.append(first + value)
        first, value = first + BASE**t, value * BASE + tokens[:, t]
    return torch.stack(places, 1)


def numbers_of(z: Tensor) -> Tensor:
    """[X, prefixes, 10] logits -> the probability of each number, [X, 1000]."""
    logp, first = z.log_softmax(-1), 0
    whole = torch.zeros(len(z), 1)
    for level in range(DIGITS):
        nodes = logp[:, first : first + BASE**level]
        whole = (whole[:, :, None] + nodes).reshape(len(z), -1)
        first += BASE**level
    return whole.exp()


def exam(z: Tensor, given: World) -> dict[str, float]:
    """Exact: `inside`, the probability of a number in the box; `error`, the mean distance."""
    p = numbers_of(z)
    distance = (torch.arange(NUMBERS)[None] - given.target[:, None]).abs()
    return {
        "inside": float((p * (distance <= BOX)).sum(1).mean()),
        "error": float((p * distance).sum(1).mean()),
    }


def made(kind: Kind, generator: torch.Generator) -> tuple[World, Tensor]:
    """New prompts with their teacher, and the student's first logits."""
    target = torch.randint(50, NUMBERS - 50, (PROMPTS,), generator=generator)
    world = World(target=target, teacher=around(target, kind.blur))
    off = OFF * torch.randn(PROMPTS, generator=generator)
    z = around((target + off).clamp(0, NUMBERS - 1), SPREAD)
    return world, z.clamp(min=-12.0) + NOISE * torch.randn(z.shape, generator=generator)


def written(z: Tensor, given: World, generator: torch.Generator) -> tuple[Batch, Tensor]:
    """GROUP numbers for some prompts, with scores; the student's log-probs [B, T, 10] with gradient."""
    chosen = torch.randperm(PROMPTS, generator=generator)[:PER_STEP].repeat_interleave(GROUP)
    logp = z.log_softmax(-1)
    tokens = torch.zeros(len(chosen), DIGITS, dtype=torch.long)
    for t in range(DIGITS):
        p = logp.detach()[chosen, prefixes_of(tokens)[:, t]].exp()
        tokens[:, t] = torch.multinomial(p, 1, generator=generator)[:, 0]
    places = prefixes_of(tokens)
    student, teacher = logp[chosen[:, None], places], given.teacher[chosen[:, None], places]
    recorded, every = at(tokens, student.detach()), torch.ones_like(tokens, dtype=torch.bool)
    reward = torch.full((len(chosen),), torch.nan)
    batch = Batch(
        rollouts=rollouts_of(chosen, tokens, every, torch.zeros(DIGITS, dtype=torch.long), reward),
        response_ids=tokens,
        mask=every,
        sampler_logp=recorded,
        policy_logp=recorded,
        teacher_logp=at(tokens, teacher),
        teacher_support_logp=teacher,
        teacher_entropy=-(teacher.exp() * teacher).nan_to_num().sum(-1),
        reward=reward,
        group=torch.arange(PER_STEP).repeat_interleave(GROUP),
    )
    return batch, student


def train(
    method: Callable[[], Method], kind: Kind, seed: int, rate: float, *, steps: int, every: int
) -> dict[int, dict[str, float]]:
    """Train a beginner by a method; the exams by update. World and beginner depend on the seed alone."""
    drawn, sampled = torch.Generator().manual_seed(2 * seed), torch.Generator().manual_seed(2 * seed + 1)
    given, first = made(kind, drawn)
    z, tokenizer = first.requires_grad_(), Digits()
    learner: Any = method().with_tokenizer(tokenizer)
    optimiser = torch.optim.SGD([z], lr=rate, momentum=0.9)
    exams = {0: exam(z.detach(), given)}
    for step in range(1, steps + 1):
        batch, student = written(z, given, sampled)
        optimiser.zero_grad()
        update(learner, replace(batch, memory=learner.make_memory()), student)
        optimiser.step()
        if step % every == 0 or step == steps:
            exams[step] = exam(z.detach(), given)
    return exams
