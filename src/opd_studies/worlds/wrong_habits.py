"""A made-up world of tables: prompts with one right response, and a teacher that is sure of a wrong last token on some.

A prompt has one right response of a fixed number of tokens out of `LETTERS`. A policy has a logit for every token of
every prefix of every prompt (or of every position, `Kind.separate`), so nothing is shared between prompts, and its
accuracy, the mass of the right responses, is exact. The teacher gives each right token of its prefixes `SURE`, but on a
share of the prompts it gives a wrong last token `HABIT` and the right one the rest; `train` takes another teacher, a
`Tutor`. The student begins with random logits that prefer the right tokens a little.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TypeAlias

import torch
from torch import Tensor

from opd.method import Method
from opd.pieces.memory import observed
from opd.pieces.packed import valid
from opd.pieces.signals import MeasuredPiece
from opd.types import Batch, Prompt, Rollout, Tokens

LETTERS = 4
PROMPTS, WRONG = 40, 0.3  # prompts, and the share of them on which the teacher has the habit
SURE, HABIT = 0.9, 0.7  # the teacher's probability of the right token, and of the wrong last one
GROUP, PER_STEP = 8, 10  # responses per prompt, and prompts per step
NOISE = 0.5  # deviation of the student's first logits


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """Tokens of a response, and what the student's first logits of right tokens have in addition to noise.

    `separate`: each token counts for itself. A policy has logits for each position, whatever the tokens before it, and
    the reward is the share of right tokens. Otherwise it has logits for each prefix, and the reward is 1 for the right
    response, and 0 for others.
    """

    tokens: int
    head_start: float
    separate: bool = False

    @property
    def prefixes(self) -> int:
        """The number of prefixes of a prompt, of 0 to `tokens` - 1 tokens; one for each length if `separate`."""
        return self.tokens if self.separate else (LETTERS**self.tokens - 1) // (LETTERS - 1)

    def places(self, tokens: Tensor) -> Tensor:
        """[B, T] -> the number of the prefix before each token, [B, T]."""
        return torch.arange(self.tokens).expand(tokens.shape) if self.separate else prefixes_of(tokens)


@dataclass(frozen=True, slots=True, kw_only=True)
class World:
    """`right` [X, T]; `habit` [X] bool; the teacher's log-probs [X, prefixes, LETTERS]."""

    kind: Kind
    right: Tensor
    habit: Tensor
    teacher: Tensor

    @property
    def prefixes(self) -> Tensor:
        """The numbers of the prefixes of the right responses, [X, T]."""
        return self.kind.places(self.right)


def prefixes_of(tokens: Tensor) -> Tensor:
    """[B, T] -> the number of the prefix before each token, in a tree of all prefixes, [B, T]."""
    places = [torch.zeros_like(tokens[:, 0])]
    for t in range(tokens.shape[1] - 1):
        places.append(places[-1] * LETTERS + 1 + tokens[:, t])
    return torch.stack(places, 1)


def world(kind: Kind, generator: torch.Generator) -> World:
    """New prompts, and their teacher."""
    right = torch.randint(LETTERS, (PROMPTS, kind.tokens), generator=generator)
    habit = torch.arange(PROMPTS) < WRONG * PROMPTS
    p = torch.full((PROMPTS, kind.prefixes, LETTERS), 1.0 / LETTERS)
    rows, places = torch.arange(PROMPTS), kind.places(right)
    for t in range(kind.tokens):
        p[rows, places[:, t]] = (1.0 - SURE) / (LETTERS - 1)
        p[rows, places[:, t], right[:, t]] = SURE
    last, wrong = places[habit, -1], (right[habit, -1] + 1) % LETTERS
    p[rows[habit], last] = (1.0 - SURE) / (LETTERS - 1)
    p[rows[habit], last, right[habit, -1]] = 1.0 - HABIT - (1.0 - SURE) * (LETTERS - 2) / (LETTERS - 1)
    p[rows[habit], last, wrong] = HABIT
    return World(kind=kind, right=right, habit=habit, teacher=p.log())


def beginner(given: World, generator: torch.Generator) -> Tensor:
    """The student's first logits, [X, prefixes, LETTERS]."""
    z = NOISE * torch.randn(given.teacher.shape, generator=generator)
    rows, places = torch.arange(PROMPTS), given.prefixes
    for t in range(given.kind.tokens):
        z[rows, places[:, t], given.right[:, t]] += given.kind.head_start
    return z


def accuracy(z: Tensor, given: World) -> dict[str, float]:
    """The exact mass of right responses: of all prompts, of those with the habit, and of the others.

    `tokens`: the mean probability of a right token after right ones.
    """
    logp = z.log_softmax(-1)
    rows = torch.arange(PROMPTS)[:, None]
    right = logp[rows, given.prefixes, given.right]
    mass = right.sum(1).exp()
    parts = {"all": mass, "habit": mass[given.habit], "others": mass[~given.habit], "tokens": right.exp().mean(1)}
    return {name: float(part.mean()) for name, part in parts.items()}


def written(z: Tensor, given: World, generator: torch.Generator) -> tuple[Batch, Tensor]:
    """GROUP responses to some prompts, with rewards and scores; the student's log-probs [B, T, LETTERS] with gradient.

    The scored support is the whole vocabulary.
    """
    chosen = torch.randperm(PROMPTS, generator=generator)[:PER_STEP].repeat_interleave(GROUP)
    logp = z.log_softmax(-1)
    tokens = torch.zeros(len(chosen), given.kind.tokens, dtype=torch.long)
    for t in range(given.kind.tokens):
        place = given.kind.places(tokens)[:, t]
        tokens[:, t] = torch.multinomial(logp.detach()[chosen, place].exp(), 1, generator=generator)[:, 0]
    places = given.kind.places(tokens)
    student, teacher = logp[chosen[:, None], places], given.teacher[chosen[:, None], places]
    recorded = at(tokens, student.detach())
    right = tokens == given.right[chosen]
    reward = right.float().mean(1) if given.kind.separate else right.all(1).float()
    every = torch.ones_like(tokens, dtype=torch.bool)
    batch = Batch(
        rollouts=rollouts_of(chosen, tokens, every, torch.zeros(given.kind.tokens, dtype=torch.long), reward),
        response_ids=tokens,
        mask=every,
        sampler_logp=recorded,
        policy_logp=recorded,
        teacher_logp=at(tokens, teacher),
        teacher_support_logp=teacher,
        reward=reward,
        group=torch.arange(PER_STEP).repeat_interleave(GROUP),
    )
    return batch, student


def at(tokens: Tensor, logp: Tensor) -> Tensor:
    """The log-probs of the sampled tokens: [B, T], [B, T, LETTERS] -> [B, T]."""
    return logp.gather(-1, tokens[..., None])[..., 0]


def rollouts_of(chosen: Tensor, tokens: Tensor, own: Tensor, turn: Tensor, reward: Tensor) -> tuple[Rollout, ...]:
    """Rollouts with the fields that a method reads: of the prompts `chosen` [B], GROUP in turn to each.

    `tokens` and `own`, those that are trained, are [B, T], `turn` [T], `reward` [B]. A hint has no words: a method
    looks whether there is one.
    """
    prompts = {x: Prompt(id=x, content="", privileged_context="") for x in set(chosen.tolist())}
    return tuple(
        Rollout(
            prompt=prompts[x],
            sample=i % GROUP,
            prompt_ids=(),
            response_ids=tokens[i],
            trained=own[i],
            turn=turn,
            finished=True,
            text="",
            reward=given,
        )
        for i, (x, given) in enumerate(zip(chosen.tolist(), reward.tolist(), strict=True))
    )


def update(method: Method, batch: Batch, student: Tensor) -> dict[str, float]:
    """Filter, credit, weight, signal and denominator of the method, and backward; metrics of its memory and signal.

    `batch` and `student` as from `written`.
    """
    batch = replace(batch, rollouts=tuple(method.filter(batch.rollouts)))
    batch = replace(batch, mask=torch.stack([rollout.trained for rollout in batch.rollouts]))
    logged = observed(batch, lambda value: [value])
    advantage, weight, denominator = method.credit(batch), method.weight(batch), method.normalise(batch)
    assert batch.teacher_support_logp is not None
    tokens = Tokens(
        student_logp=valid(at(batch.response_ids, student), batch.mask),
        sampler_logp=valid(batch.sampler_logp, batch.mask),
        teacher_logp=valid(batch.teacher_logp, batch.mask),
        advantage=valid(advantage, batch.mask),
        weight=valid(weight, batch.mask),
        student_support_logp=valid(student, batch.mask),
        teacher_support_logp=valid(batch.teacher_support_logp, batch.mask),
    )
    per_token = method.signal(tokens) * tokens.weight * valid(denominator.share, batch.mask)
    (per_token.sum() / denominator.count).backward()
    if isinstance(method.signal, MeasuredPiece):
        measured = method.signal.measure(tokens)
        logged |= {name: float(values.mean()) for name, values in measured.items() if len(values)}
    return logged


@dataclass(frozen=True, slots=True, kw_only=True)
class Course:
    """A training: accuracies by update, and the metrics of the method's memory and signal, one row per update."""

    exams: dict[int, dict[str, float]]
    logged: list[dict[str, float]]


# From a world and the student's first logits to a function, called before each update: the student's logits -> the
# teacher's log-probs, both [X, prefixes, LETTERS].
Tutor: TypeAlias = Callable[[World, Tensor, torch.Generator], Callable[[Tensor], Tensor]]


def train(
    made: Callable[[], Method],
    kind: Kind,
    seed: int,
    rate: float,
    *,
    steps: int,
    every: int,
    tutor: Tutor | None = None,
) -> Course:
    """Train a beginner by a method. World and beginner depend on the seed alone, so that methods can be compared.

    `tutor` gives a teacher that changes with the student; without one it is the world's own.
    """
    drawn, sampled = torch.Generator().manual_seed(2 * seed), torch.Generator().manual_seed(2 * seed + 1)
    given = world(kind, drawn)
    z, method = beginner(given, drawn).requires_grad_(), made()
    scores = None if tutor is None else tutor(given, z.detach().clone(), drawn)
    memory = method.make_memory()
    optimiser = torch.optim.Adam([z], lr=rate)
    exams = {0: accuracy(z.detach(), given)}
    logged: list[dict[str, float]] = []
    for step in range(1, steps + 1):
        if scores is not None:
            given = replace(given, teacher=scores(z.detach()))
        batch, student = written(z, given, sampled)
        optimiser.zero_grad()
        logged.append(update(method, replace(batch, memory=memory), student))
        optimiser.step()
        if step % every == 0 or step == steps:
            exams[step] = accuracy(z.detach(), given)
    return Course(exams=exams, logged=logged)
