"""A made-up world in which thinking pays: evidence for the right answer grows with every "wait".

A problem has one right answer of `ANSWERS`. Before each token the model sees the sum of n + 1 noisy observations after
n waits: e_n[k] = sum_m (SIGNAL 1[k right] + noise). It writes "wait" or an answer, which ends the response; a "wait" as
the last token gives no answer. Its logits are

    answer k: sharpness_n e_n[k]        wait: patience_n

The parameters are the same for all problems, so answers cannot be memorised: two for each n, or three in all for a
`shared` model: sharpness_n = sharpness, patience_n = patience - hurry n. A teacher that reads the solution is the same
model with `KNOWLEDGE` added to the logit of the right answer. This alone makes waiting less likely and early answers
more likely: the shortcut is an effect, not an assumption.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from opd.method import Method
from opd.pieces import normalise
from opd.pieces.memory import observed
from opd.pieces.packed import valid
from opd.types import Batch, Prompt, Rollout, Tokens

ANSWERS, SIGNAL, KNOWLEDGE = 8, 0.8, 4.0


LONGEST = 8  # tokens of a response


WAIT = ANSWERS  # the token


PROBLEMS, GROUP = 16, 8  # problems per step, and responses per problem


HELD_OUT = 2000


@dataclass(frozen=True, slots=True, kw_only=True)
class Problems:
    """`evidence` [X, LONGEST, ANSWERS] before each token, and the right answer [X]."""

    evidence: Tensor
    right: Tensor

    def repeated(self, times: int) -> Problems:
        return Problems(
            evidence=self.evidence.repeat_interleave(times, 0), right=self.right.repeat_interleave(times, 0)
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Examined:
    """Accuracy and length: exact over responses, mean over held-out problems."""

    accuracy: float  # share
    length: float  # tokens


def problems(count: int, generator: torch.Generator) -> Problems:
    """New problems."""
    right = torch.randint(ANSWERS, (count,), generator=generator)
    seen = torch.randn(count, LONGEST, ANSWERS, generator=generator)
    seen += SIGNAL * torch.nn.functional.one_hot(right, ANSWERS)[:, None]
    return Problems(evidence=seen.cumsum(1), right=right)


def beginner(shared: bool) -> Tensor:
    """Initial parameters, [3] if shared, else [2, LONGEST]: waits about half of the time, half trusts the evidence."""
    if shared:
        return torch.tensor([0.5 * SIGNAL, 2.5, 0.0])
    return torch.stack([torch.full((LONGEST,), 0.5 * SIGNAL), torch.full((LONGEST,), 2.5)])


def log_probs(model: Tensor, given: Problems, *, knows: bool = False) -> Tensor:
    """[X, LONGEST, ANSWERS + 1] of every token; `knows`: the teacher that reads the solution."""
    if model.dim() == 1:
        sharpness, patience = model[0].expand(LONGEST), model[1] - model[2] * torch.arange(LONGEST)
    else:
        sharpness, patience = model
    answers = sharpness[:, None] * given.evidence
    if knows:
        answers = answers + KNOWLEDGE * torch.nn.functional.one_hot(given.right, ANSWERS)[:, None]
    waits = patience.expand(len(answers), LONGEST)
    return torch.cat([answers, waits[..., None]], -1).log_softmax(-1)


def examined(model: Tensor, given: Problems) -> Examined:
    """Exact accuracy and length."""
    p = log_probs(model, given).exp()
    reached = torch.cat([torch.ones_like(p[:, :1, WAIT]), p[:, :-1, WAIT].cumprod(1)], 1)  # [X, LONGEST]
    right = p.gather(2, given.right[:, None, None].expand(-1, LONGEST, 1))[..., 0]
    return Examined(accuracy=float((reached * right).sum(1).mean()), length=float(reached.sum(1).mean()))


def written(model: Tensor, given: Problems, generator: torch.Generator) -> tuple[Batch, Tensor]:
    """GROUP responses per problem with rewards and the teacher's scores; the student's log-probs [N] with gradient."""
    shown = given.repeated(GROUP)
    student, teacher = log_probs(model, shown), log_probs(model.detach(), shown, knows=True)
    tokens = torch.multinomial(student.detach().exp().flatten(0, 1), 1, generator=generator).view(-1, LONGEST)
    mask = torch.cat([torch.ones_like(tokens[:, :1]), (tokens[:, :-1] == WAIT).cumprod(1)], 1).bool()
    last = tokens.gather(1, mask.sum(1, keepdim=True) - 1)[:, 0]
    chosen = student.gather(2, tokens[..., None])[..., 0]
    reward = (last == shown.right).float()
    batch = Batch(
        rollouts=tuple(_rollout(i, rewarded) for i, rewarded in enumerate(reward.tolist())),
        response_ids=tokens,
        mask=mask,
        sampler_logp=chosen.detach(),
        policy_logp=chosen.detach(),
        teacher_logp=teacher.gather(2, tokens[..., None])[..., 0],
        reward=reward,
        group=torch.arange(len(given.right)).repeat_interleave(GROUP),
        teacher_entropy=-(teacher.exp() * teacher).sum(-1),
    )
    return batch, valid(chosen, mask)


def _rollout(place: int, reward: float) -> Rollout:
    """A rollout with the fields that a method reads: its prompt with a solution, and its reward."""
    nothing = torch.zeros(0, dtype=torch.long)
    return Rollout(
        prompt=Prompt(id=place // GROUP, content="", privileged_context="the solution"),
        sample=place % GROUP,
        prompt_ids=(),
        response_ids=nothing,
        trained=nothing.bool(),
        turn=nothing,
        finished=True,
        text="the solution",
        reward=reward,
    )


def update(method: Method, batch: Batch, student_logp: Tensor) -> dict[str, float]:
    """Backward of one step's loss by the method's pieces; returns the metrics of the method's memory."""
    logged = observed(batch, lambda value: [value])
    denominator = normalise.per("sequence")(batch)
    tokens = Tokens(
        student_logp=student_logp,
        sampler_logp=valid(batch.sampler_logp, batch.mask),
        teacher_logp=valid(batch.teacher_logp, batch.mask),
        advantage=valid(method.credit(batch), batch.mask),
        weight=torch.ones_like(student_logp),
    )
    loss = (method.signal(tokens) * valid(denominator.share, batch.mask)).sum() / denominator.count
    loss.backward()
    return logged


Made = Callable[[], Method]


@dataclass(frozen=True, slots=True, kw_only=True)
class Course:
    """A training: exams by update, and the metrics of the method's memory, one row per update."""

    exams: dict[int, Examined]
    logged: list[dict[str, float]]


def train(made: Made, seed: int, rate: float, *, shared: bool, steps: int, every: int) -> Course:
    """Train a beginner by a method. The problems depend on the seed alone, so that methods can be compared."""
    drawn, sampled = torch.Generator().manual_seed(2 * seed), torch.Generator().manual_seed(2 * seed + 1)
    held_out = problems(HELD_OUT, drawn)
    model, method = beginner(shared).requires_grad_(), made()
    memory = method.make_memory()
    optimiser = torch.optim.Adam([model], lr=rate)
    exams = {0: examined(model.detach(), held_out)}
    logged: list[dict[str, float]] = []
    for step in range(1, steps + 1):
        batch, student_logp = written(model, problems(PROBLEMS, drawn), sampled)
        batch = replace(batch, memory=memory)
        optimiser.zero_grad()
        logged.append(update(method, batch, student_logp))
        optimiser.step()
        if step % every == 0 or step == steps:
            exams[step] = examined(model.detach(), held_out)
    return Course(exams=exams, logged=logged)
