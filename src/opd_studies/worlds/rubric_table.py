"""A tabular policy rewarded by rubrics. Answers have a known quality, so a reward can be compared with it.

Two kinds of answers. Sorted digits: one answer is right, a right teacher always gives it, and equal texts count once.
Letters: a task wants letters that are hidden from the judge, and the teacher's texts differ, as long texts do.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from opd.loss.collate import collate
from opd.pieces.credit import group_reward
from opd.recipe.schema import JudgeSection
from opd.rewards.base import GroupReward
from opd.rewards.rubric import rubric
from opd.types import Prompt, Rollout, Scores
from opd_studies.worlds.graders import ALPHABET, DECISIVE, STATEMENTS


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """Numbers of tasks, answers per task, draws per group and updates; `salts`: judges with independent errors."""

    answers: Literal["digits", "letters"] = "digits"
    prompts: int = 64
    arms: int = 24
    group: int = 8
    texts: int = 4  # most texts of the teacher per task
    right: float = 0.6  # digits: probability that the teacher is right
    wanted: int = 4  # letters of twelve that a task wants
    held: float = 0.8  # probability that a text of the teacher has a wanted letter
    updates: int = 30
    learning_rate: float = 2.0
    salts: int = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Arms:
    """A task, all answers of the policy, and their quality in [0, 1]."""

    prompt: Prompt
    answers: list[str]
    quality: np.ndarray  # [arms]
    taught: float  # the mean quality of the teacher's texts


def played(
    table: Table, seed: int, options: Mapping[str, Any], grading: Mapping[str, Any], folder: Path
) -> dict[str, float]:
    """Train a policy by rubrics made with `options` by a judge of `grading`; also measure rewards of its first draws.

    quality: expected quality after training, in [0, 1]; quality before: of the untrained policy; quality of the texts:
    of the teacher. rank correlation: Spearman's, of reward and quality in groups of the untrained policy. variance of
    the advantage: over judges with independent errors, mean over the first draws.
    """
    rng = np.random.default_rng((seed, 0xA7))
    tasks = [arms_of(i, table, rng) for i in range(table.prompts)]
    rewards = [
        judged_by(options, {**grading, "answers": table.answers, "salt": salt}, folder / str(salt))
        for salt in range(table.salts)
    ]
    theta = np.zeros((table.prompts, table.arms))
    first = [rng.integers(0, table.arms, table.group) for _ in tasks]
    advantages = np.stack([advantage_of(tasks, first, reward)[1] for reward in rewards])  # [salts, prompts, group]
    scores = advantage_of(tasks, first, rewards[0])[0]
    correlations = [spearman(scores[i], task.quality[first[i]]) for i, task in enumerate(tasks)]
    for _ in range(table.updates):
        policy = np.exp(theta) / np.exp(theta).sum(1, keepdims=True)
        drawn = [rng.choice(table.arms, table.group, p=p) for p in policy]
        _, advantage = advantage_of(tasks, drawn, rewards[0])
        for i, arms in enumerate(drawn):
            for a, arm in zip(advantage[i], arms, strict=True):
                theta[i] -= table.learning_rate / table.group * a * policy[i]
                theta[i, arm] += table.learning_rate / table.group * a
    policy = np.exp(theta) / np.exp(theta).sum(1, keepdims=True)
    known = [one for one in correlations if one is not None]
    return {
        "quality": float(np.mean([(p * task.quality).sum() for p, task in zip(policy, tasks, strict=True)])),
        "quality before": float(np.mean([task.quality.mean() for task in tasks])),
        "quality of the texts": float(np.mean([task.taught for task in tasks])),
        "rank correlation": float(np.mean(known)),
        "variance of the advantage": float(advantages.var(0, ddof=1).mean()),
    }


def arms_of(number: int, table: Table, rng: np.random.Generator) -> Arms:
    """A task with its answers and the texts of a teacher that is sometimes wrong."""
    return (_digits if table.answers == "digits" else _letters)(number, table, rng)


def _digits(number: int, table: Table, rng: np.random.Generator) -> Arms:
    """Digits to sort: the right answer and wrong ones. A teacher's text is the right one, or from the better half."""
    task = "".join(map(str, rng.integers(0, 10, 5)))
    right = "".join(sorted(task))
    answers = [right]
    while len(answers) < table.arms:
        answer = list(right if rng.random() < 0.5 else task)
        for _ in range(rng.integers(1, 4)):
            i, j = rng.integers(0, 5, 2)
            if rng.random() < 0.6:
                answer[i], answer[j] = answer[j], answer[i]
            else:
                answer[i] = str(rng.integers(0, 10))
        if (text := "".join(answer)) not in answers:
            answers.append(text)
    quality = np.array([_sorted(task, one) for one in answers])
    texts: list[str] = []
    while len(texts) < table.texts:
        good = np.flatnonzero(quality >= np.median(quality))
        texts.append(right if rng.random() < table.right else answers[rng.choice(good)])
    prompt = Prompt(id=number, content=f"{task}>", metadata={"teacher_answers": texts})
    taught = float(np.mean([_sorted(task, text) for text in texts]))
    return Arms(prompt=prompt, answers=answers, quality=quality, taught=taught)


def _sorted(task: str, answer: str) -> float:
    return float(np.mean([STATEMENTS[s](task, answer) for s in DECISIVE]))


def _letters(number: int, table: Table, rng: np.random.Generator) -> Arms:
    """Texts of letters, of which the task wants `wanted`. Each letter is in half of the answers.

    In the teacher's texts the wanted letters are more frequent; each other letter is in half of them.
    """
    wanted = rng.permutation(len(ALPHABET)) < table.wanted
    answers: list[str] = []
    while len(answers) < table.arms:
        if (text := _text(rng.random(len(ALPHABET)) < 0.5)) and text not in answers:
            answers.append(text)
    texts: list[str] = []
    while len(texts) < table.texts:
        if text := _text(rng.random(len(ALPHABET)) < np.where(wanted, table.held, 0.5)):
            texts.append(text)
    quality, taught = (
        np.array([np.mean([ALPHABET[i] in one for i in np.flatnonzero(wanted)]) for one in some])
        for some in (answers, texts)
    )
    prompt = Prompt(id=number, content=f"{number}>", metadata={"teacher_answers": texts})
    return Arms(prompt=prompt, answers=answers, quality=quality, taught=float(taught.mean()))


def _text(held: np.ndarray) -> str:
    return "".join(letter for letter, here in zip(ALPHABET, held, strict=True) if here)


def judged_by(options: Mapping[str, Any], grading: Mapping[str, Any], folder: Path) -> GroupReward:
    """The reward `rubric` with `graders.grader` as its judge."""
    judge = JudgeSection(function="opd_studies.worlds.graders:grader", options=dict(grading))
    return rubric(judge=judge, **options).for_stage({}, {}, folder, 0)


def advantage_of(tasks: list[Arms], drawn: list[np.ndarray], reward: GroupReward) -> tuple[np.ndarray, np.ndarray]:
    """Rewards and advantages of the drawn answers, [prompts, group] each."""
    rollouts = [
        rollout_of(task.prompt, i, task.answers[arm])
        for task, arms in zip(tasks, drawn, strict=True)
        for i, arm in enumerate(arms)
    ]
    rollouts = reward(rollouts)
    batch = collate(rollouts, [Scores(teacher_logp=torch.zeros(1)) for _ in rollouts], torch.device("cpu"))
    shape = (len(tasks), -1)
    advantage = group_reward()(batch)[:, 0]
    return batch.reward.double().numpy().reshape(shape), advantage.double().numpy().reshape(shape)


def rollout_of(prompt: Prompt, sample: int, text: str) -> Rollout:
    """An answer of the table as a response of one token."""
    one = torch.zeros(1, dtype=torch.long)
    return Rollout(
        prompt=prompt,
        sample=sample,
        prompt_ids=(0,),
        response_ids=one,
        trained=one == 0,
        turn=one,
        finished=True,
        text=text,
    )


def spearman(first: np.ndarray, second: np.ndarray) -> float | None:
    """Spearman's rank correlation, with mean ranks for ties; None if one side is constant."""
    a, b = (np.array([(one < v).sum() + ((one == v).sum() - 1) / 2 for v in one]) for one in (first, second))
    if a.std() == 0 or b.std() == 0:
        return None
    return float(np.corrcoef(a, b)[0, 1])
