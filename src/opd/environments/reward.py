"""The reward of conversations: what the environment gave, in all turns together, and the recipe's reward."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from opd.rewards.base import rewarded
from opd.types import Gather, Prompt, Reward, Rollout


@dataclass(frozen=True, slots=True, kw_only=True)
class EnvironmentReward(Reward):
    """The sum of a conversation's rewards, plus that of the `other`, which reads the student's last turn."""

    name: str
    other: Reward | None
    asks: Mapping[str, Any] = field()
    undeclared: bool = True  # an environment may read any column

    @property
    def needs(self) -> frozenset[str]:  # type: ignore[override]
        """The columns that the other reward reads."""
        return frozenset() if self.other is None else self.other.needs

    @property
    def comparable(self) -> bool:  # type: ignore[override]
        """Whether rewards before and after training can be compared."""
        return self.other is None or self.other.comparable

    @property
    def unreadable(self) -> Callable[[Prompt], str | None] | None:
        """Why the other reward cannot read a row."""
        return getattr(self.other, "unreadable", None)

    def __call__(self, rollouts: Sequence[Rollout]) -> list[Rollout]:
        """Raises as the other reward. A response that is no conversation has no reward of the environment."""
        found = rewarded(self.other, rollouts)
        out: list[Rollout] = []
        for one in found:
            given = [] if one.talk is None else [value for value in one.talk.turn_rewards if value is not None]
            own = one.reward if self.other is not None else 0.0
            out.append(one if own is None else replace(one, reward=own + sum(given)))
        return out

    def for_stage(
        self, models: Mapping[str, Any], origins: Mapping[str, Mapping[str, Any]], folder: Path, rank: int
    ) -> EnvironmentReward:
        """With the judges of the other reward."""
        return self if self.other is None else replace(self, other=self.other.for_stage(models, origins, folder, rank))

    def check_failures(self, rollouts: Sequence[Rollout], gather: Gather) -> None:
        """As the other reward."""
        if self.other is not None:
            self.other.check_failures(rollouts, gather)

    def pop_requests(self) -> dict[str, float]:
        """Those of the other reward."""
        return {} if self.other is None else self.other.pop_requests()


def with_environment(reward: Reward | None, name: str) -> EnvironmentReward:
    """The environment's reward, added to the recipe's."""
    title = f"environment {name}" if reward is None else f"{reward.name} + environment {name}"
    return EnvironmentReward(name=title, other=reward, asks={} if reward is None else reward.asks)
