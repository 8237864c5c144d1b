"""A made-up world of tables: agents that do tasks of several steps by calling a tool, and a teacher that loses its way.

A task has `STEPS` steps, each with one right call of `CALL` tokens out of `LETTERS`. The agent writes a call, which is
a turn, and the tool answers with one token: after a right call the next step begins, after a wrong one the agent tries
the same step again. It succeeds if all steps are done after at most `TURNS` turns. As long as nothing went wrong the
teacher gives the right tokens `SURE`. After one wrong call of the task it is sure of a wrong token in a share `LOST`[1]
of the places, after more in a share `LOST`[2]: it does not know how to go on from a student's mistakes.

A policy has a logit for every token of every place of every step. In the kind `carries` they are the same whatever went
wrong before, so that what the student learns after a mistake changes what it does without one; otherwise it has logits
of its own for each number of mistakes. The probability of success is exact.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from opd.method import Method
from opd.types import Batch
from opd_studies.worlds.wrong_habits import GROUP, PER_STEP, at, rollouts_of, update

LETTERS, CALL, STEPS = 4, 2, 4
TURNS = 6  # at most two mistakes
TASKS = 30
SURE = 0.9
LOST = (0.0, 0.3, 0.6)  # by the number of mistakes so far, the last one for more: the teacher's share of wrong places
HEAD_START, NOISE = 1.5, 0.5  # of the student's first logits: on right tokens, and the deviation
TOKENS = TURNS * (CALL + 1)  # of a response, with the tool's answers


@dataclass(frozen=True, slots=True, kw_only=True)
class World:
    """`right` [X, STEPS, CALL]; the teacher's log-probs [X, STEPS, mistakes, CALL, LETTERS]."""

    right: Tensor
    teacher: Tensor


def world(generator: torch.Generator) -> World:
    """New tasks and their teacher."""
    right = torch.randint(LETTERS, (TASKS, STEPS, CALL), generator=generator)
    shown = right[:, :, None].expand(TASKS, STEPS, len(LOST), CALL)
    lost = torch.rand(shown.shape, generator=generator) < torch.tensor(LOST)[:, None]
    shift = torch.randint(1, LETTERS, shown.shape, generator=generator)
    sure = torch.where(lost, (shown + shift) % LETTERS, shown)
    p = torch.full((*sure.shape, LETTERS), (1.0 - SURE) / (LETTERS - 1)).scatter(-1, sure[..., None], SURE)
    return World(right=right, teacher=p.log())


def beginner(given: World, carries: bool, generator: torch.Generator) -> Tensor:
    """The student's first logits, [X, STEPS, mistakes, CALL, LETTERS]; one number of mistakes if it `carries`."""
    z = NOISE * torch.randn((TASKS, STEPS, CALL, LETTERS), generator=generator)
    z.scatter_add_(-1, given.right[..., None], torch.full((*given.right.shape, 1), HEAD_START))
    return z[:, :, None].repeat(1, 1, 1 if carries else len(LOST), 1, 1)


def whole(z: Tensor) -> Tensor:
    """The logits for each number of mistakes, [X, STEPS, mistakes, CALL, LETTERS]."""
    return z.expand(TASKS, STEPS, len(LOST), CALL, LETTERS)


def success(z: Tensor, given: World) -> dict[str, float]:
    """Exact: the mean probability of success, `without`: of success without a mistake."""
    logp = whole(z).log_softmax(-1)
    right = given.right[:, :, None, :, None].expand(*logp.shape[:4], 1)
    p = logp.gather(-1, right)[..., 0].sum(-1).exp()  # [X, STEPS, mistakes]: of the right call
    reached = torch.zeros(TASKS, STEPS + 1, TURNS + 1, dtype=p.dtype)  # by steps done and mistakes made
    reached[:, 0, 0] = 1.0
    for turn in range(TURNS):
        for done in range(min(turn, STEPS - 1) + 1):
            mistakes = turn - done
            if mistakes > TURNS - STEPS:
                continue
            here, right_call = reached[:, done, mistakes], p[:, done, min(mistakes, len(LOST) - 1)]
            reached[:, done + 1, mistakes] = reached[:, done + 1, mistakes] + here * right_call
            reached[:, done, mistakes + 1] = reached[:, done, mistakes + 1] + here * (1.0 - right_call)
    ended = reached[:, STEPS]
    return {"all": float(ended.sum(1).mean()), "without": float(ended[:, 0].mean())}


def written(z: Tensor, given: World, generator: torch.Generator) -> tuple[Batch, Tensor]:
    """GROUP responses to some tasks, with rewards and scores; the student's log-probs [B, T, LETTERS] with gradient.

    The reward is 1 for success. The tool's tokens, and those after the end of the task, are not trained.
    """
    chosen = torch.randperm(TASKS, generator=generator)[:PER_STEP].repeat_interleave(GROUP)
    rows, logp = len(chosen), whole(z).log_softmax(-1)
    tokens = torch.zeros(rows, TOKENS, dtype=torch.long)
    own = torch.zeros(rows, TOKENS, dtype=torch.bool)
    places = torch.zeros(rows, TOKENS, 3, dtype=torch.long)  # step, mistakes, place in the call
    done, mistakes = torch.zeros(rows, dtype=torch.long), torch.zeros(rows, dtype=torch.long)
    for turn in range(TURNS):
        goes_on, first = done < STEPS, turn * (CALL + 1)
        step, lost = done.clamp(max=STEPS - 1), mistakes.clamp(max=len(LOST) - 1)
        for place in range(CALL):
            p = logp.detach()[chosen, step, lost, place].exp()
            tokens[:, first + place] = torch.multinomial(p, 1, generator=generator)[:, 0]
            own[:, first + place] = goes_on
            places[:, first + place] = torch.stack([step, lost, torch.full_like(step, place)], 1)
        right = (tokens[:, first : first + CALL] == given.right[chosen, step]).all(1)
        done, mistakes = done + (goes_on & right), mistakes + (goes_on & ~right)
        tokens[:, first + CALL] = right  # the tool's answer
    index = (chosen[:, None], *places.unbind(-1))
    student, teacher = logp[index], given.teacher[index]
    recorded, reward = at(tokens, student.detach()), (done == STEPS).float()
    batch = Batch(
        rollouts=rollouts_of(chosen, tokens, own, torch.arange(TOKENS) // (CALL + 1), reward),
        response_ids=tokens,
        mask=own,
        sampler_logp=recorded,
        policy_logp=recorded,
        teacher_logp=at(tokens, teacher),
        teacher_support_logp=teacher,
        reward=reward,
        group=torch.arange(PER_STEP).repeat_interleave(GROUP),
    )
    return batch, student


def turns_after_a_mistake(batch: Batch) -> Tensor:
    """Own tokens of turns after the first wrong call, [B, T] bool. The tool answers 1 to a right call, 0 to a wrong."""
    answer = batch.response_ids[:, CALL :: CALL + 1]  # [B, TURNS]
    wrong = (answer == 0).cumsum(1)
    before = torch.cat([torch.zeros_like(wrong[:, :1]), wrong[:, :-1]], 1) > 0
    return before.repeat_interleave(CALL + 1, 1) & batch.mask


@dataclass(frozen=True, slots=True, kw_only=True)
class Course:
    """A training: probabilities of success by update, and the metrics of the method's memory, one row per update.

    `apart`: in the middle of the training, mean |log q - log p| of own tokens before and after the first mistake.
    """

    exams: dict[int, dict[str, float]]
    logged: list[dict[str, float]]
    apart: tuple[float, float]


def train(made: Callable[[], Method], carries: bool, seed: int, rate: float, *, steps: int, every: int) -> Course:
    """Train a beginner by a method. World and beginner depend on the seed alone, so that methods can be compared."""
    drawn, sampled = torch.Generator().manual_seed(2 * seed), torch.Generator().manual_seed(2 * seed + 1)
    given = world(drawn)
    z, method = beginner(given, carries, drawn).requires_grad_(), made()
    memory = method.make_memory()
    optimiser = torch.optim.Adam([z], lr=rate)
    exams, logged = {0: success(z.detach(), given)}, list[dict[str, float]]()
    apart: list[tuple[float, float]] = []
    for step in range(1, steps + 1):
        batch, student = written(z, given, sampled)
        size, after = (batch.teacher_logp - batch.policy_logp).abs(), turns_after_a_mistake(batch)
        apart.append((float(size[batch.mask & ~after].mean()), float(size[after].mean())))
        optimiser.zero_grad()
        logged.append(update(method, replace(batch, memory=memory), student))
        optimiser.step()
        if step % every == 0 or step == steps:
            exams[step] = success(z.detach(), given)
    return Course(exams=exams, logged=logged, apart=apart[len(apart) // 2])
