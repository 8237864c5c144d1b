"""Evaluation on held-out prompts: rewards with intervals, lengths, and signs of collapse."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeAlias

from opd.maths.statistics import distinct_share, mean_interval, pass_at_k, repeat_ratio
from opd.models.language_model import LanguageModel
from opd.parallel import ALONE, World
from opd.rewards.base import rewarded
from opd.samplers.hf import TransformersSampler
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
    limited_by: str = "evaluate.sampling.{setting}.max_completion_length"  # named in errors about length


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
    return {
        name: TransformersSampler(
            lm=student,
            sampling=sampling,
            max_prompt_length=held_out.max_prompt_length,
            limited_by=held_out.limited_by.format(setting=name),
        )
        for name, sampling in held_out.sampling.items()
    }


def summary(rollouts: Sequence[Rollout], pass_at: Sequence[int] = (1,)) -> dict[str, float]:
    """Metrics of responses: reward avg@n with its 95 % interval over prompts, pass@k, length, collapse."""
    groups: dict[int, list[Rollout]] = {}
    for rollout in rollouts:
        groups.setdefault(rollout.prompt.id, []).append(rollout)
    n = len(rollouts)
    out = {
        "responses": float(n),
        "length": sum(len(r.response_ids) for r in rollouts) / n,
        "cut_share": sum(not r.finished for r in rollouts) / n,
        "repeat_ratio": sum(repeat_ratio(r.response_ids.tolist()) for r in rollouts) / n,
        "distinct_share": distinct_share([r.text for r in rollouts]),
        "empty_share": sum(not r.text.strip() for r in rollouts) / n,
    }
    rewards = [[r.reward for r in group if r.reward is not None] for group in groups.values()]
    if not all(rewards):
        return out
    binary = all(value in (0.0, 1.0) for group in rewards for value in group)
    interval = mean_interval([sum(group) / len(group) for group in rewards], binary=binary)
    out |= {"reward": interval.mean, "reward_low": interval.low, "reward_high": interval.high}
    if binary:
        for k in pass_at:
            if 1 < k <= min(map(len, rewards)):
                each = [pass_at_k(len(group), int(sum(group)), k) for group in rewards]
                out[f"pass@{k}"] = sum(each) / len(each)
    return out
