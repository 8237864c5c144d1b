"""Held-out prompts: rewards with intervals, lengths, signs of collapse, and the exact divergence from the teacher."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from opd.collate import attach, collate, split
from opd.contexts import same_prompt
from opd.data import load_prompts, spec_of
from opd.divergences import DIVERGENCES
from opd.errors import ConfigError
from opd.group_rewards import GroupReward, check_judged
from opd.loading import load_model
from opd.loss import hidden_of
from opd.methods.reverse_kl import reverse_kl
from opd.model_paths import resolved_path
from opd.models import LanguageModel, evaluating
from opd.needs import needs_of
from opd.parallel import ALONE, World
from opd.recipe import DataSection, ModelSpec, SamplingSection, parse_section
from opd.rewards import AnyReward, RewardFn, load_reward, score
from opd.samplers.hf import TransformersSampler
from opd.score import paired_log_probs
from opd.statistics import distinct_share, mean_interval, pass_at_k, repeat_ratio
from opd.teachers.local import LocalTeacher, teacher_for
from opd.types import Batch, Context, Prompt, Rollout, Sampler, Sampling, TeacherRule
from opd.unread import unread_answers, unread_line

# Held-out sampling must not repeat the training seeds: it lives at its own "step", the same one at every evaluation,
# so that before and after differ by the weights alone.
EVALUATION_STEP = 2**31 - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldOut:
    """What is measured, and how."""

    prompts: Sequence[Prompt]
    sampling: Mapping[str, Sampling]
    reward: RewardFn | None
    seed: int
    pass_at: Sequence[int] = (1,)
    max_prompt_length: int | None = None
    limited_by: str = "evaluate.sampling.{setting}.max_completion_length"  # what a user sets for shorter responses


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurement:
    """`metrics` by name (`eval/<sampling>/<what>`), and the responses behind them by sampling."""

    metrics: dict[str, float]
    rollouts: dict[str, list[Rollout]]


def measure(held_out: HeldOut, samplers: Mapping[str, Sampler], world: World = ALONE) -> Measurement:
    """Sample every held-out prompt with each setting and summarise; every process samples some, and has all."""
    metrics: dict[str, float] = {}
    rollouts: dict[str, list[Rollout]] = {}
    positions = world.positions(range(len(held_out.prompts)))
    prompts = [held_out.prompts[i] for i in positions]
    for name, sampler in samplers.items():
        mine = rewarded(held_out.reward, sampler(prompts, seed=(held_out.seed, EVALUATION_STEP))) if prompts else []
        written = rollouts[name] = world.in_order(positions, mine)
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


def summary(rollouts: Sequence[Rollout], pass_at: Sequence[int] = (1,)) -> dict[str, float]:
    """Numbers about responses: reward avg@n with its 95 % interval over prompts, pass@k, length, collapse."""
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


def exact_divergence(
    student: LanguageModel,
    teacher: LocalTeacher,
    rollouts: Sequence[Rollout],
    context: Context,
    *,
    micro_batch_tokens: int,
    names: Sequence[str] = ("reverse_kl", "forward_kl"),
    world: World = ALONE,
) -> dict[str, float]:
    """Exact divergences between student and teacher per token of `rollouts`, in nats, over the whole vocabulary.

    All processes have the same rollouts; each looks at some of them.
    """
    # A prompt's responses stay together: a context may look at all of them.
    mine = [rollouts[i] for i in world.positions([rollout.prompt.id for rollout in rollouts])]
    totals, count = dict.fromkeys(names, 0.0), 0.0
    if mine:
        totals, count = _divergence_sums(student, teacher, mine, context, micro_batch_tokens, names)
    count = world.sum(count)
    return {name: world.sum(total) / count for name, total in totals.items()}


@torch.no_grad()
def _divergence_sums(
    student: LanguageModel,
    teacher: LocalTeacher,
    rollouts: Sequence[Rollout],
    context: Context,
    micro_batch_tokens: int,
    names: Sequence[str],
) -> tuple[dict[str, float], float]:
    """(sums over tokens by name, number of tokens)."""
    method = reverse_kl(average="token")
    scores = teacher.score(rollouts, context(rollouts), method.support, method.temperature, sampled=False)
    batch = attach(collate(rollouts, scores, student.device), method)
    denominator = method.normalise(batch)
    student_head, teacher_head = student.head(), teacher.head()
    totals = dict.fromkeys(names, 0.0)
    with evaluating(student.model):
        for micro in split(batch, denominator, micro_batch_tokens):
            hidden_NH = hidden_of(student, micro)
            assert micro.teacher_hidden is not None
            for pair in paired_log_probs(student_head, hidden_NH, teacher_head, micro.teacher_hidden):
                for name in names:
                    totals[name] += DIVERGENCES[name](*pair).sum().item()
    return totals, denominator.count


def sample_rows(rollouts: Sequence[Rollout], **columns: Any) -> list[dict[str, Any]]:
    """Rollouts as flat rows for a Parquet file."""
    return [
        {
            **columns,
            "task": r.prompt.task,
            "prompt_id": r.prompt.id,
            "sample": r.sample,
            "prompt": r.prompt.content if isinstance(r.prompt.content, str) else str(r.prompt.content[-1]["content"]),
            "response": r.text,
            "reward": r.reward,
            "finished": r.finished,
            "sampler_version": r.sampler_version,
            "response_ids": r.response_ids.tolist(),
            "sampler_logp": None if r.sampler_logp is None else r.sampler_logp.tolist(),
            "policy_logp": None if r.policy_logp is None else r.policy_logp.tolist(),
        }
        for r in rollouts
    ]


def evaluate_model(
    model: str,
    *,
    data: Mapping[str, Any],
    reward: Mapping[str, Any] | None = None,
    sampling: Mapping[str, Any] | None = None,
    teacher: str | None = None,
    seed: int = 0,
    micro_batch_tokens: int = 4096,
    say: Callable[[str], None] | None = None,
) -> dict[str, float]:
    """`opd eval`: a model by path on held-out prompts; with `teacher`, also the exact divergence from it.

    `data`, `reward` and `sampling` are sections of a recipe. `say` gets what `opd check` would say of the data. Raises
    the kinds of `opd.errors`.
    """
    section = parse_section(SamplingSection, sampling or {}, "sampling")
    settings = Sampling(**{**section.model_dump(), "stop": tuple(section.stop)})
    judged_by = None if reward is None else load_reward(**reward)
    if isinstance(judged_by, GroupReward):
        raise ConfigError(
            f"The reward {judged_by.name!r} makes its yardstick from the responses that it grades, and compares "
            "them with each other. Measure with a reward that checks a response by itself."
        )
    data_section = parse_section(DataSection, data, "data")
    prompts = load_prompts(
        spec_of(data_section.model_dump()), require=[] if judged_by is None else sorted(needs_of(judged_by))
    )
    for path, name, where in ((model, "model", "opd eval MODEL"), (teacher, "teacher", "opd eval --teacher")):
        if path is not None:
            resolved_path(ModelSpec(path=path), name, where)  # before anything is loaded and sampled
    if say is not None and (count := unread_answers(prompts, None, judged_by)):
        say(unread_line(count, "held-out"))
    lm = load_model(ModelSpec(path=model), name="model", where="opd eval MODEL")
    held_out = HeldOut(
        prompts=prompts,
        sampling={"sampled": settings},
        reward=judged_by,
        seed=seed,
        pass_at=[k for k in (1, 2, 4, 8, 16, 32, 64) if k <= settings.n],
        limited_by="--max-completion-length",
    )
    measured = measure(held_out, student_samplers(held_out, lm))
    metrics = {key.removeprefix("eval/sampled/"): value for key, value in measured.metrics.items()}
    if teacher is not None:
        other = load_model(ModelSpec(path=teacher), name="teacher", where="opd eval --teacher")
        scorer = teacher_for(TeacherRule(kind="external"), lm, other, micro_batch_tokens=micro_batch_tokens)
        assert scorer is not None
        metrics |= exact_divergence(
            lm, scorer, measured.rollouts["sampled"], same_prompt(), micro_batch_tokens=micro_batch_tokens
        )
    return metrics


def rows_of(batch: Batch) -> list[dict[str, Any]]:
    """The step's responses with their per-token numbers."""
    rows = sample_rows(batch.rollouts)
    for i, row in enumerate(rows):
        t = len(batch.rollouts[i].response_ids)
        teacher_logp = batch.teacher_logp[i, :t]
        row["teacher_logp"] = None if bool(teacher_logp.isnan().any()) else teacher_logp.tolist()
        row["weight"] = None if batch.weight is None else batch.weight[i, :t].tolist()
        row["advantage"] = None if batch.advantage is None else batch.advantage[i, :t].tolist()
    return rows
