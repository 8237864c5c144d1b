"""A reward that asks somebody, about all responses to a prompt at once, and may get no answer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeAlias

from opd.errors import ConfigError, TeacherError
from opd.judges.asking import Asking, Kept
from opd.judges.build import judge_of
from opd.judges.section import JudgeSection
from opd.models import LanguageModel
from opd.types import Gather, Rollout

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


def asked(rewards: Mapping[str | None, Any], gather: Gather) -> dict[str, float]:
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
