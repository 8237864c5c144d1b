"""Evaluation on held-out prompts: rewards with intervals, lengths, and signs of collapse."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol, TypeAlias

from opd.environments.conversations import Rules, in_conversations, talked
from opd.maths.intervals import SHARE, bounds_of, mean_interval
from opd.maths.statistics import distinct_share, pass_at_k, repeat_ratio
from opd.models.language_model import LanguageModel
from opd.parallel import ALONE, World
from opd.rewards.base import rewarded
from opd.types import Prompt, ReservedStep, Reward, Rollout, Sampler, Sampling, Writer


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldOut:
    """An evaluation: prompts, sampling settings and reward."""

    prompts: Sequence[Prompt]
    sampling: Mapping[str, Sampling]
    reward: Reward | None
    seed: int
    pass_at: Sequence[int] = (1,)
    max_prompt_length: int | None = None
    rules: Rules | None = None  # of conversations with an environment
    limited_by: str = "evaluate.sampling.{setting}.max_completion_length"  # named in errors about length


class Drawn(Protocol):
    """A sampling setting, of a recipe or of a sampler."""

    @property
    def temperature(self) -> float: ...


def kl_setting(sampling: Mapping[str, Drawn]) -> str:
    """The setting whose responses a divergence is measured on: the first with temperature > 0, else the first.

    A divergence is an expectation over responses that the student samples.
    """
    return next((name for name, one in sampling.items() if one.temperature > 0), next(iter(sampling)))


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurement:
    """`metrics` by name (`eval/<sampling>/<what>`), and their responses by sampling setting."""

    metrics: dict[str, float]
    rollouts: dict[str, list[Rollout]]


Sampled: TypeAlias = Callable[[], list[Rollout]]


def measure(
    held_out: HeldOut,
    writers: Mapping[str, Writer],
    world: World = ALONE,
    around: Callable[[str, Sampled], list[Rollout]] = lambda _, sampled: sampled(),
) -> Measurement:
    """Sample responses to every held-out prompt with each setting and summarise them.

    Processes share the prompts; each returns all responses. `around` is called with each setting's name and the
    function that samples, and returns the responses.
    """
    metrics: dict[str, float] = {}
    rollouts: dict[str, list[Rollout]] = {}
    positions = world.positions(range(len(held_out.prompts)))
    prompts = [held_out.prompts[i] for i in positions]

    def sampled(writer: Writer) -> list[Rollout]:
        mine = writer(prompts, seed=(held_out.seed, ReservedStep.EVALUATION)) if prompts else []
        return world.in_order(positions, rewarded(held_out.reward, mine) if prompts else [])

    for name, writer in writers.items():
        written = rollouts[name] = around(name, partial(sampled, writer))
        metrics |= {f"eval/{name}/{key}": value for key, value in summary(written, held_out.pass_at).items()}
    return Measurement(metrics=metrics, rollouts=rollouts)


def student_samplers(held_out: HeldOut, student: LanguageModel) -> dict[str, Sampler]:
    """The student's samplers of held-out prompts by setting, in conversations where there is an environment.

    Raises ConfigError as `in_conversations`.
    """
    from opd.samplers.hf import TransformersSampler

    found: dict[str, Sampler] = {}
    for name, sampling in held_out.sampling.items():
        inner = TransformersSampler(
            lm=student,
            sampling=sampling,
            max_prompt_length=held_out.max_prompt_length,
            limited_by=held_out.limited_by.format(setting=name),
        )
        found[name] = in_conversations(inner, student, sampling, held_out.rules, held_out.max_prompt_length)
    return found


def summary(rollouts: Sequence[Rollout], pass_at: Sequence[int] = (1,)) -> dict[str, float]:
    """Metrics of responses: reward avg@n and pass@k with 95 % intervals over prompts, length, collapse.

    The reward is over the prompts of which all responses have one: `rewards_failed` counts responses without.
    """
    groups: dict[int, list[Rollout]] = {}
    for rollout in rollouts:
        groups.setdefault(rollout.prompt.id, []).append(rollout)
    n = len(rollouts)
    out = {
        "responses": float(n),
        "length": sum(len(r.own_ids) for r in rollouts) / n,
        "cut_share": sum(not r.finished for r in rollouts) / n,
        "repeat_ratio": sum(repeat_ratio(r.own_ids.tolist()) for r in rollouts) / n,
        "distinct_share": distinct_share([r.text for r in rollouts]),
        "empty_share": sum(not r.text.strip() for r in rollouts) / n,
    }
    out |= {key: total / n for key, total in talked(rollouts).items()}
    for failure, count in Counter(r.reward_failure for r in rollouts if r.reward_failure is not None).items():
        out[f"rewards_{failure}"] = float(count)
    complete = [group for group in groups.values() if all(r.reward_failure != "failed" for r in group)]
    rewards = [[r.reward for r in group if r.reward is not None] for group in complete]
    if not rewards or not all(rewards):
        return out
    values = [value for group in rewards for value in group]
    means = [sum(group) / len(group) for group in rewards]
    out |= mean_interval(means, bounds_of(values)).numbers("reward")
    if all(value in (0.0, 1.0) for value in values):
        for k in pass_at:
            if 1 < k <= min(map(len, rewards)):
                each = [pass_at_k(len(group), int(sum(group)), k) for group in rewards]
                out |= mean_interval(each, SHARE).numbers(f"pass@{k}")
    return out
