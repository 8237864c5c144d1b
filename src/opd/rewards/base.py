"""A reward that asks somebody, about all responses to a prompt at once, and may get no answer."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from numbers import Real
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from opd.errors import ConfigError, TeacherError, TrainingError
from opd.method import Method
from opd.models.language_model import LanguageModel
from opd.parallel import ALONE, World
from opd.pieces.needs import columns_of
from opd.recipe.schema import JudgeSection
from opd.samplers.asked.build import judge_of
from opd.samplers.asked.cache import Asking, Kept
from opd.types import Gather, Prompt, Rollout

# The responses of a step with their rewards, or with why there is none; every response of a group has one, or none has.
Judging: TypeAlias = Callable[[Sequence[Rollout], Mapping[str, Asking]], list[Rollout]]


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupReward:
    """Asks the people in `asks`, by role, once it is bound to a stage; before that it can only be looked at.

    A group without a reward has no advantage, is counted, and ends the run where more than `max_failed` of a step's
    groups have none.
    """

    name: str
    needs: frozenset[str]  # columns
    asks: Mapping[str, JudgeSection]
    max_failed: float
    judging: Judging
    people: Mapping[str, Asking] = field(default_factory=dict[str, Asking])

    def bound(
        self,
        models: Mapping[str, LanguageModel],
        origins: Mapping[str, Mapping[str, Any]],
        folder: Path,
        rank: int,
    ) -> GroupReward:
        """Ready to ask: with the models that it asks, and what is kept in `folder`. Raises RunError as `Kept` does."""
        kept = Kept(folder, rank)
        people = {
            role: Asking(judge=judge_of(section, models, origins), kept=kept, retries=section.retries)
            for role, section in self.asks.items()
        }
        return replace(self, people=people)

    def __call__(self, rollouts: Sequence[Rollout]) -> list[Rollout]:
        """The rollouts with their rewards. Raises what the judges raise, and DataError for a row that lacks a text."""
        if not self.people:
            raise ConfigError(
                f"The reward {self.name!r} asks somebody, which only a stage of a run can lend it: use it in a stage's "
                "`reward`, and measure with a reward that checks a response by itself."
            )
        return self.judging(rollouts, self.people)


def check_judged(reward: GroupReward, rollouts: Sequence[Rollout], gather: Gather) -> None:
    """Stop, in every process, where too many of the step's groups have no reward. Raises TeacherError."""
    failed = {r.prompt.id: r.unjudged for r in rollouts if r.unjudged is not None}
    counts = gather((len(failed), len({r.prompt.id for r in rollouts}), next(iter(failed.items()), None)))
    missing, groups = (sum(part[i] for part in counts) for i in (0, 1))
    if groups == 0 or missing <= reward.max_failed * groups:
        return
    prompt, why = next(first for _, _, first in counts if first is not None)
    raise TeacherError(
        f"The reward {reward.name!r} got no answer for {missing} of this step's {groups} groups of responses, and "
        f"`max_failed` allows {reward.max_failed:.0%}. Of prompt {prompt}: {why}. The update was not made. What was "
        "answered is kept: correct what is wrong and start the same command again. With a larger `max_failed` it is "
        "another run, which needs another output_dir."
    )


def judge_requests(rewards: Mapping[str | None, Any], gather: Gather) -> dict[str, float]:
    """judge/ROLE_..., what was asked since the last call, of all processes; empty where nobody is asked.

    These are no metrics: a run that is started again finds on disk what it asked before.
    """
    found: dict[str, float] = {}
    for reward in rewards.values():
        if not isinstance(reward, GroupReward):
            continue
        mine = {f"judge/{role}_{name}": n for role, one in reward.people.items() for name, n in one.counts.items()}
        for one in reward.people.values():
            one.counts.clear()
        for part in gather(mine):
            for name, number in part.items():
                found[name] = found.get(name, 0.0) + number
    return found


def rewarded(reward: AnyReward | None, rollouts: Sequence[Rollout]) -> list[Rollout]:
    """The rollouts with their rewards, if there is one. Raises TrainingError when the reward does."""
    if reward is None:
        return list(rollouts)
    if isinstance(reward, GroupReward):
        return reward(rollouts)
    return [replace(r, reward=value) for r, value in zip(rollouts, score(reward, rollouts), strict=True)]


def rewarded_by_task(
    rewards: Mapping[str | None, AnyReward | None], rollouts: Sequence[Rollout], world: World = ALONE
) -> list[Rollout]:
    """The rollouts with the rewards of their prompts' tasks; a task without one leaves None.

    Raises as `rewarded`, and, in every process of `world`, as `group_rewards.check_judged`.
    """
    out = list(rollouts)
    for task, reward in rewards.items():
        rows = [i for i, rollout in enumerate(rollouts) if rollout.prompt.task == task]
        found = rewarded(reward, [rollouts[i] for i in rows])
        for i, one in zip(rows, found, strict=True):
            out[i] = one
        if isinstance(reward, GroupReward):
            check_judged(reward, found, world.gather)
    return out


RewardFn: TypeAlias = Callable[[Prompt, str], float]


AnyReward: TypeAlias = RewardFn | GroupReward


@dataclass(frozen=True, slots=True, kw_only=True)
class Reward:
    """A reward that knows its name, for messages, and the data columns that it reads."""

    name: str
    function: RewardFn
    needs: frozenset[str]

    def __call__(self, prompt: Prompt, response: str) -> float:
        return self.function(prompt, response)


def score(reward: RewardFn, rollouts: Sequence[Rollout]) -> list[float]:
    """The reward of each rollout's text. [B]

    Raises TrainingError when the reward raises (the original error is its cause) or its result is no finite number.
    """
    name = getattr(reward, "name", None) or getattr(reward, "__name__", type(reward).__name__)
    scores: list[float] = []
    for rollout in rollouts:
        about = f"on prompt {rollout.prompt.id}, response {rollout.text[:200]!r}"
        try:
            value = reward(rollout.prompt, rollout.text)
        except Exception as error:  # a user's function may raise anything
            raise TrainingError(
                f"The reward {name!r} raised {type(error).__name__} {about}: {error}. "
                "A reward answers every text: correct it, or the row."
            ) from error
        if not isinstance(value, (Real, np.bool_)) or not math.isfinite(value):
            raise TrainingError(
                f"The reward {name!r} returned {value!r:.80} ({type(value).__name__}) {about}. Return a finite number."
            )
        scores.append(float(value))
    return scores


def unread_answers(prompts: Sequence[Prompt], method: Method | None, *rewards: AnyReward | None) -> int:
    """How many prompts have an answer that neither the method nor any of the rewards looks at.

    A function of the user's own that declares no needs may look at everything.
    """
    given = [reward for reward in rewards if reward is not None]
    own = any(":" in getattr(reward, "name", ":") for reward in given)
    if own or "answer" in columns_of(*given) | (frozenset() if method is None else method.needs.columns):
        return 0
    return sum(prompt.answer is not None for prompt in prompts)


def unread_line(count: int, which: str) -> str:
    """What is said of `count` such rows; `which` is "training" or "held-out"."""
    return (
        f"{count} {which} rows have an `answer`, and nothing reads it: without a reward that does, no accuracy is "
        "measured"
    )
