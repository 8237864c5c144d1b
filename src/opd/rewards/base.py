"""Rewards: by a function, by LLM judges, and for all tasks of a stage."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from numbers import Real
from pathlib import Path
from typing import Any, Literal, TypeAlias

from opd.errors import ConfigError, DataError, OPDError, TeacherError, TrainingError
from opd.models.language_model import LanguageModel
from opd.models.ticks import counted
from opd.parallel import ALONE
from opd.plugins import RAISED, np
from opd.recipe.schema import MAX_FAILED, JudgeSection
from opd.rewards.calls import Waiting, called
from opd.samplers.asked.cache import AnswerCache, CachedJudge
from opd.types import Gather, Prompt, Reward, Rollout

RewardFn: TypeAlias = Callable[[Prompt, str], float]  # (prompt, text of the response) -> a finite number

# (responses, judges by role) -> the responses with their rewards, or the reason why they have none. In a group either
# all responses have a reward or none has.
Judging: TypeAlias = Callable[[Sequence[Rollout], Mapping[str, CachedJudge]], list[Rollout]]


class TimedOut(float):
    """A reward whose computation was cut off at its time limit. It is trained on, and counted."""


TIMED_OUT = TimedOut(0.0)


@dataclass(frozen=True, slots=True)
class _Failure:
    """A call of a reward's function without a finite number: why, the remedy, and what the function raised."""

    why: str
    remedy: str
    error: BaseException | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class FunctionReward(Reward):
    """The reward of a function (prompt, text) -> float, called once per response.

    A call fails if the function raises, exits, returns no finite number, or takes longer than `timeout_s` seconds. With
    `on_error="stop"` that ends the run. With "drop" the response has no reward, is counted
    (`rollout/rewards_failed`), and the run ends if more than `max_failed` of a step's groups have such a response: a
    group of responses to one prompt without all of its rewards has no advantage.
    """

    name: str
    function: RewardFn
    needs: frozenset[str] = frozenset()
    undeclared: bool = False  # a user's function: it may read other columns than `needs`
    unreadable: Callable[[Prompt], str | None] | None = None  # why it cannot read a row, e.g. an answer; None: it can
    correctness: bool = False  # 1 means that the answer is right
    extract: Callable[[Prompt, str], str | None] | None = None  # the part of a text that it compares, for samples
    on_error: Literal["stop", "drop"] = "stop"
    max_failed: float = MAX_FAILED
    timeout_s: float | None = None

    def __call__(self, rollouts: Sequence[Rollout]) -> list[Rollout]:
        """Raises TrainingError if a call fails (the function's error is the cause), unless failures are dropped."""
        with Waiting() as waiting:
            return [self._rewarded(rollout, waiting) for rollout in counted("responses rewarded", rollouts)]

    def value(self, prompt: Prompt, text: str) -> float:
        """The reward of a text. Raises TrainingError if the call fails (the function's error is the cause)."""
        with Waiting() as waiting:
            found = self._called(prompt, text, waiting)
        if isinstance(found, _Failure):
            raise self._error(found) from found.error
        return float(found)

    def _rewarded(self, rollout: Rollout, waiting: Waiting) -> Rollout:
        """The rollout with its reward, or without if failures are dropped. Raises TrainingError if they are not."""
        found = self._called(rollout.prompt, rollout.last_text, waiting)
        if not isinstance(found, _Failure):
            return replace(rollout, reward=float(found), reward_failure="timed_out" if found is TIMED_OUT else None)
        if self.on_error == "drop":
            why = f"the reward {self.name!r} {found.why}"
            return replace(rollout, reward=None, unjudged=why, reward_failure="failed")
        raise self._error(found) from found.error

    def _called(self, prompt: Prompt, text: str, waiting: Waiting) -> float | _Failure:
        waiting.now(f"the reward {self.name!r} on prompt {prompt.id}")
        about = f"on prompt {prompt.id}, response {text[:200]!r}"
        try:
            value = called(lambda: self.function(prompt, text), self.timeout_s)
        except RAISED as error:  # a user's function may raise anything
            why = f"raised {type(error).__name__} {about}: {error}"
            return _Failure(why, "A reward must accept every text: correct it, or the row.", error)
        if not _is_finite(value):
            return _Failure(f"returned {shown(value)} ({type(value).__name__}) {about}", "Return a finite number.")
        return value

    def _error(self, failure: _Failure) -> TrainingError:
        return TrainingError(
            f"The reward {self.name!r} {failure.why}. {failure.remedy} Or leave such responses out and count them: "
            "`on_error: drop` of the reward."
        )

    def check_failures(self, rollouts: Sequence[Rollout], gather: Gather) -> None:
        """Raise TrainingError on every rank if more than `max_failed` of the step's groups lack a reward."""
        check_failed_share(self.name, rollouts, gather, self.max_failed, TrainingError)


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupReward(Reward):
    """The reward of LLM judges, for all responses to a prompt at once. A judge may fail.

    `asks` maps a role (judge, verifier, author) to the judge's section. Call `for_stage` before use. A group without
    rewards has no advantage and is counted. The run stops if more than `max_failed` of a step's groups have no rewards.
    Each rubric is built from the responses that it grades, so rewards before and after training are not comparable.
    """

    name: str
    needs: frozenset[str]
    asks: Mapping[str, JudgeSection] = field()
    comparable: bool = False
    max_failed: float
    judging: Judging
    judges: Mapping[str, CachedJudge] = field(default_factory=dict[str, CachedJudge])  # by role

    def for_stage(
        self,
        models: Mapping[str, LanguageModel],
        origins: Mapping[str, Mapping[str, Any]],
        folder: Path,
        rank: int,
    ) -> GroupReward:
        """The reward with its judges; `folder` keeps their answers. Raises RunError as `AnswerCache`."""
        from opd.samplers.asked.build import judge_of

        cache = AnswerCache(folder, rank)
        judges = {
            role: CachedJudge(judge=judge_of(section, models, origins), cache=cache, retries=section.retries)
            for role, section in self.asks.items()
        }
        return replace(self, judges=judges)

    def __call__(self, rollouts: Sequence[Rollout]) -> list[Rollout]:
        """Raises the judges' errors, and DataError for a row without a required text."""
        if not self.judges:
            raise ConfigError(
                f"The reward {self.name!r} needs judges, which only a stage of a run starts. Use it in a stage's "
                "`reward`, and evaluate with a reward that checks responses one by one."
            )
        return self.judging(rollouts, self.judges)

    def check_failures(self, rollouts: Sequence[Rollout], gather: Gather) -> None:
        """Raise TeacherError on every rank if more than `max_failed` of the step's groups have no reward."""
        check_failed_share(self.name, rollouts, gather, self.max_failed, TeacherError)

    def pop_requests(self) -> dict[str, float]:
        """The judges' counts (`CachedJudge.counts`) since the last call."""
        found = {f"{role}_{name}": n for role, judge in self.judges.items() for name, n in judge.counts.items()}
        for judge in self.judges.values():
            judge.counts.clear()
        return found


@dataclass(frozen=True, slots=True, kw_only=True)
class WatchedReward(Reward):
    """A Reward that is only shown: a failure leaves all responses of a call without a reward and stops nothing."""

    inner: Reward
    name: str
    needs: frozenset[str]
    asks: Mapping[str, Any] = field()
    comparable: bool
    undeclared: bool = False

    def for_stage(
        self, models: Mapping[str, Any], origins: Mapping[str, Mapping[str, Any]], folder: Path, rank: int
    ) -> WatchedReward:
        return replace(self, inner=self.inner.for_stage(models, origins, folder, rank))

    def __call__(self, rollouts: Sequence[Rollout]) -> list[Rollout]:
        try:
            return rewarded(self.inner, rollouts)
        except RAISED as error:  # of a user's Reward, of a judge, or of this library about them
            why = f"{type(error).__name__}: {error}"
            return [replace(one, reward=None, unjudged=why, reward_failure="failed") for one in rollouts]

    def pop_requests(self) -> dict[str, float]:
        return self.inner.pop_requests()


def watched(reward: Reward) -> Reward:
    """The reward for showing alone: its failures are counted, and none stops a run."""
    if isinstance(reward, FunctionReward):
        return replace(reward, on_error="drop", max_failed=1.0)
    if isinstance(reward, WatchedReward):
        return reward
    return WatchedReward(
        inner=reward,
        name=reward.name,
        needs=reward.needs,
        asks=reward.asks,
        comparable=reward.comparable,
        undeclared=getattr(reward, "undeclared", False),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class StageRewards:
    """The rewards of a stage, called as one: each rollout goes to the reward of its prompt's task.

    `by_task` maps a task without a reward to None. Every process calls the same methods in the same order.
    """

    by_task: Mapping[str | None, Reward | None]
    gather: Gather = ALONE.gather

    def __call__(self, rollouts: Sequence[Rollout]) -> list[Rollout]:
        """The rollouts, in their order, with the rewards of their tasks.

        Raises as `rewarded`, and on every rank as `Reward.check_failures`.
        """
        out = list(rollouts)
        for task, reward in self.by_task.items():
            if reward is None:
                continue
            rows = [i for i, rollout in enumerate(rollouts) if rollout.prompt.task == task]
            found = rewarded(reward, [rollouts[i] for i in rows])
            for i, one in zip(rows, found, strict=True):
                out[i] = one
            reward.check_failures(found, self.gather)
        return out

    def extracted(self, rollout: Rollout) -> str | None:
        """The part of the response that its task's reward compared; None if that does not say."""
        return extracted(self.by_task.get(rollout.prompt.task), rollout.prompt, rollout.last_text)

    def pop_requests(self) -> dict[str, float]:
        """judge/ROLE_WHAT: requests to judges since the last call, summed over processes; empty without judges.

        They belong to the timings, not the metrics: a resumed run finds answers on disk and sends fewer requests.
        """
        asking = [reward for reward in self.by_task.values() if reward is not None and reward.asks]
        total: dict[str, float] = {}
        for reward in asking:
            for counts in self.gather(reward.pop_requests()):
                for name, number in counts.items():
                    total[f"judge/{name}"] = total.get(f"judge/{name}", 0.0) + number
        return total


def about(rewards: Sequence[Reward | None]) -> dict[str, Any] | None:
    """{"name", "correctness"} of the rewards of a stage's tasks, several names joined; None without a reward.

    `correctness`: 1 means that the answer is right. A reward of a user's own says so with an attribute of that name.
    """
    given = [reward for reward in rewards if reward is not None]
    if not given:
        return None
    names = dict.fromkeys(reward.name for reward in given)
    return {"name": ", ".join(names), "correctness": all(_means_right(reward) for reward in given)}


def extracted(reward: Reward | None, prompt: Prompt, text: str) -> str | None:
    """The part of a response that its reward compared; None for a reward that does not say."""
    inner = innermost(reward)
    if not isinstance(inner, FunctionReward) or inner.extract is None:
        return None
    return inner.extract(prompt, text)


def _means_right(reward: Reward) -> bool:
    return bool(getattr(innermost(reward), "correctness", False))


def innermost(reward: Any) -> Any:
    """The reward itself, or the one that it wraps."""
    while getattr(reward, "inner", None) is not None:
        reward = reward.inner
    return reward


def check_failed_share(
    name: str, rollouts: Sequence[Rollout], gather: Gather, max_failed: float, error: type[OPDError]
) -> None:
    """Raise `error` on every rank if more than `max_failed` of a step's groups have a response without a reward."""
    failed = {r.prompt.id: r.unjudged for r in rollouts if r.unjudged is not None}
    counts = gather((len(failed), len({r.prompt.id for r in rollouts}), next(iter(failed.items()), None)))
    missing, groups = (sum(part[i] for part in counts) for i in (0, 1))
    if groups == 0 or missing <= max_failed * groups:
        return
    prompt, why = next(first for _, _, first in counts if first is not None)
    raise error(
        f"The reward {name!r} got no answer for {missing} of this step's {groups} groups of responses, and "
        f"`max_failed` allows {max_failed:.0%}. For prompt {prompt}: {why}. The update was not made. The "
        "answers so far are kept: correct the cause and start the same command again, if need be with a larger "
        "`max_failed`."
    )


def rewarded(reward: Reward | None, rollouts: Sequence[Rollout]) -> list[Rollout]:
    """The rollouts with their rewards; unchanged without a reward.

    Raises the reward's errors, and TrainingError for a user's Reward that returns anything else.
    """
    if reward is None:
        return list(rollouts)
    found = list(reward(rollouts))
    wrong = [_described(one) for one in found if not _is_rewarded(one)]
    if wrong or len(found) != len(rollouts):
        raise TrainingError(
            f"The reward {reward.name!r} got {len(rollouts)} rollouts and returned {len(found)}"
            + (f", of which {len(wrong)} have no reward, e.g. {wrong[0]}" if wrong else "")
            + ". A Reward must return the given rollouts, in their order, each with a finite number, "
            "dataclasses.replace(rollout, reward=...), or with the reason why it has no reward, "
            "dataclasses.replace(rollout, unjudged=...)."
        )
    return found


def _is_rewarded(one: Any) -> bool:
    return isinstance(one, Rollout) and (one.unjudged is not None if one.reward is None else _is_finite(one.reward))


def _described(one: Any) -> str:
    if isinstance(one, Rollout):
        return f"one with reward={shown(one.reward)} and unjudged={shown(one.unjudged)}"
    return f"{shown(one)} ({type(one).__name__})"


def _is_finite(value: Any) -> bool:
    try:
        number = isinstance(value, Real)
        return (number or isinstance(value, np.bool_)) and math.isfinite(value)  # in this order: numpy loads when used
    except OverflowError:  # an integer that no float holds
        return False


def shown(value: Any) -> str:
    """The beginning of a value's text."""
    try:
        return f"{value!r:.80}"
    except Exception as error:  # of the object's own __repr__; of an integer with too many digits
        return f"a value that cannot be shown ({type(error).__name__})"


def unfit_to_measure(reward: Reward) -> str | None:
    """Why a reward cannot be used outside of training, as a clause; None if it can."""
    if not reward.comparable:
        return (
            "whose numbers before and after training cannot be compared: it declares `comparable = False` (`rubric` "
            "builds each rubric from the responses that it grades)"
        )
    return "which needs judges, and only the training of a stage starts them" if reward.asks else None


def check_readable(reward: Reward | None, prompts: Sequence[Prompt], where: str) -> None:
    """Raise DataError, beginning with `where`, if the reward cannot read some rows, e.g. their answers."""
    unreadable: Callable[[Prompt], str | None] | None = getattr(reward, "unreadable", None)
    if reward is None or unreadable is None:
        return
    found = [(prompt.id, why) for prompt in prompts if (why := unreadable(prompt)) is not None]
    if found:
        rows = ", ".join(str(key) for key, _ in found[:5]) + (", ..." if len(found) > 5 else "")
        raise DataError(
            f"{where}: the reward {reward.name!r} cannot read {len(found)} of {len(prompts)} rows (rows {rows}); of "
            f"row {found[0][0]}: {found[0][1]}. Correct these rows, leave them out, or choose another reward."
        )


def unscored_answers(prompts: Sequence[Prompt], columns: frozenset[str], *rewards: Reward | None) -> int:
    """The number of prompts with an `answer` that is neither in the method's `columns` nor read by a reward.

    0 with a user's function, which may read any column.
    """
    given = [reward for reward in rewards if reward is not None]
    if any(getattr(reward, "undeclared", False) for reward in given):
        return 0
    if "answer" in columns.union(*(reward.needs for reward in given)):
        return 0
    return sum(prompt.answer is not None for prompt in prompts)


def unscored_line(count: int, which: str) -> str:
    """The warning about `count` such rows; `which` is "training" or "held-out"."""
    return f"{count} {which} rows have an `answer`, but no reward or method reads it, so accuracy is not measured"
