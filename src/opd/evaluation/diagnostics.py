"""Metrics of a step from its phase A batch, without extra cost, and in some steps a full comparison of the models.

docs/diagnostics.md has every name with its formula, the range reported in papers, and remedies. A metric that the
method's data does not allow is left out.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from opd.environments.conversations import talked
from opd.evaluation.buckets import Buckets, starting_at
from opd.evaluation.compare import compare
from opd.evaluation.learned import DIFFERS
from opd.loss.step import PhaseA
from opd.maths.by_place import add_by_place
from opd.maths.metrics import Columns, Metrics
from opd.maths.overlap import overlap_of_support
from opd.maths.statistics import auroc, effective_share, repeat_ratio, top_share
from opd.method import Method
from opd.models.language_model import LanguageModel
from opd.pieces.needs import Input, Reads, Trait
from opd.pieces.packed import valid
from opd.recipe.schema import StageSpec
from opd.teachers.routed import routed
from opd.types import Batch, Prompt, Rollout, Teacher, Units

PERCENTILES = (1, 5, 50, 95, 99)


def step_metrics(batch: Batch, method: Method, version: int, *, buckets: Buckets) -> Metrics:
    """Lengths, endings, rewards, and the teacher's scores of the sampled tokens.

    `version`: number of updates of the student so far. With a filter, `rollout/kept_share` is the share of prompts with
    a response that is trained. On a full support, metrics of the teacher's log-probs are reported only if the method
    reads them, so that writing a sample file changes no metric.
    """
    metrics = Metrics()
    n = len(batch.rollouts)
    lengths = [len(rollout.own_ids) for rollout in batch.rollouts]
    metrics.mean("rollout/length", sum(lengths), n)
    metrics.max("rollout/length_max", max(lengths))
    metrics.rows(_of_lengths, length=lengths)
    metrics.mean("rollout/cut_share", sum(not rollout.finished for rollout in batch.rollouts), n)
    metrics.mean("rollout/repeat_ratio", sum(repeat_ratio(r.own_ids.tolist()) for r in batch.rollouts), n)
    metrics.sum("train/tokens", float(batch.mask.sum()))
    if Trait.FILTERS in method.needs:
        kept = batch.mask.any(1)
        metrics.mean("rollout/kept_share", float(kept.sum()), sum(rollout.sample == 0 for rollout in batch.rollouts))
    rewards = [rollout.reward for rollout in batch.rollouts if rollout.reward is not None]
    if rewards:
        metrics.mean("rollout/reward", sum(rewards), len(rewards))
    if Input.GROUP in method.needs and rewards:
        differs = contrasts(batch)
        metrics.mean(DIFFERS, sum(differs), len(differs))
    metrics.merge(of_judges(batch))
    conversations = sum(rollout.talk is not None for rollout in batch.rollouts)
    for name, total in talked(batch.rollouts).items():
        metrics.mean(name, total, conversations)
    for failure, count in Counter(r.reward_failure for r in batch.rollouts if r.reward_failure is not None).items():
        metrics.sum(f"rollout/rewards_{failure}", count)
    written = [rollout for rollout in batch.rollouts if rollout.sampler_logp is not None]
    if written:
        metrics.max("rollout/staleness_max", max(version - rollout.sampler_version for rollout in written))
    if batch.support_mask is not None:
        ratio = overlap_of_support(method.support, valid(batch.support_mask, batch.mask))
        if ratio is not None:
            metrics.mean("support/overlap_ratio", ratio.sum().item(), len(ratio))
    if batch.units is not None:
        _units(metrics, batch, batch.units)
    if len(written) == n:
        policy = valid(batch.policy_logp, batch.mask)
        metrics.mean("rollout/policy_nll", -policy.sum().item(), len(policy))
        if all(_drawn_at(r) == method.temperature for r in written):
            _entropies(metrics, batch)
            full = method.support.kind == "full"
            if method.reads(Reads.TEACHER_LOGP) if full else method.support.kind != "none":
                _log_ratios(metrics, batch, buckets, full=full)
    metrics.merge(by_task(batch, method))
    return metrics


def contrasts(batch: Batch) -> list[bool]:
    """For each prompt of the batch, whether its responses have different rewards. One without a reward is left out."""
    rewards: dict[int, set[float]] = {}
    for rollout in batch.rollouts:
        found = rewards.setdefault(rollout.prompt.id, set())
        if rollout.reward is not None:
            found.add(rollout.reward)
    return [len(found) > 1 for found in rewards.values()]


def of_judges(batch: Batch) -> Metrics:
    """Metrics judge/...: numbers of the judges besides the reward, and the share of responses without a reward."""
    metrics = Metrics()
    for rollout in batch.rollouts:
        if rollout.reward_failure is None and (rollout.judged or rollout.unjudged is not None):
            metrics.mean("judge/failed_share", rollout.unjudged is not None, 1)
        for name, value in rollout.judged.items():
            metrics.mean(f"judge/{name}", value, 1)
    return metrics


def of_parts(method: Method, phase_a: PhaseA) -> Metrics:
    """Metrics part/NAME/... of rows that a part of the method trains, also of a part without rows.

    rows, tokens (trained), length, cut_share, reward, the support's masses from the loss, and what the source measured.
    """
    metrics = Metrics()
    for name in method.parts:
        phase = phase_a.parts.get(name)
        rollouts = () if phase is None else phase.batch.rollouts
        metrics.sum(f"part/{name}/rows", len(rollouts))
        metrics.sum(f"part/{name}/tokens", 0.0 if phase is None else float(phase.batch.mask.sum()))
        for rollout in rollouts:
            metrics.mean(f"part/{name}/length", len(rollout.own_ids), 1)
            metrics.mean(f"part/{name}/cut_share", not rollout.finished, 1)
            if rollout.reward is not None:
                metrics.mean(f"part/{name}/reward", rollout.reward, 1)
            for key, value in rollout.measured.items():
                metrics.mean(f"part/{name}/{key}", value, 1)
    return metrics


def _units(metrics: Metrics, batch: Batch, units: Units) -> None:
    """Metrics units/...: how much of the student's text has a signal if the teacher has its own tokenizer.

    Shares are of trained tokens and their bytes, including those that the teacher could not score.
    """
    trained = torch.zeros_like(batch.mask)
    for i, rollout in enumerate(batch.rollouts):
        trained[i, : len(rollout.trained)] = rollout.trained
    count, text = int(trained.sum()), int(units.bytes[trained].sum())
    metrics.mean("units/coverage", int(units.bytes[trained & units.inside].sum()), text)
    metrics.mean("units/shared_coverage", int(units.bytes[trained & units.inside & units.shared].sum()), text)
    metrics.mean("units/per_token", int((units.size > 0).sum()), count)
    metrics.mean("units/unscored_share", int((trained & ~batch.mask).sum()), count)
    metrics.mean("units/not_compared_share", int((batch.mask & ~units.inside).sum()), count)


def by_task(batch: Batch, method: Method) -> Metrics:
    """Metrics task/NAME/... of each task: reward, length and cut_share per response, log_ratio per token.

    The log-ratio, log q - log p of the sampled token, is left out if the response was sampled at another temperature
    than the method's. On a full support the loss reports it, because it has the teacher's probabilities.
    """
    metrics = Metrics()
    for i, rollout in enumerate(batch.rollouts):
        if rollout.prompt.task is None:
            continue
        name = f"task/{rollout.prompt.task}"
        metrics.mean(f"{name}/length", len(rollout.own_ids), 1)
        metrics.mean(f"{name}/cut_share", not rollout.finished, 1)
        if rollout.reward is not None:
            metrics.mean(f"{name}/reward", rollout.reward, 1)
        compared = method.support.kind not in ("none", "full") and _drawn_at(rollout) == method.temperature
        if compared and rollout.policy_logp is not None:
            ratio = valid(batch.teacher_logp[i] - batch.policy_logp[i], batch.mask[i])
            metrics.mean(f"{name}/log_ratio", ratio.sum().item(), len(ratio))
    return metrics


def compared(
    spec: StageSpec,
    method: Method,
    student: LanguageModel,
    teacher: Teacher,
    rollouts: Sequence[Rollout],
    contexts: Sequence[Prompt],
) -> Metrics:
    """Metrics compare/... of both models at every token of a step's responses."""
    metrics = Metrics()
    for one, rows in routed(teacher, rollouts):
        comparison = compare(
            student,
            one,
            [rollouts[i] for i in rows],
            [contexts[i] for i in rows],
            k=spec.diagnostics.k,
            temperature=method.temperature,
            micro_batch_tokens=spec.micro_batch_tokens,
        )
        metrics.merge(comparison.metrics(buckets_of(spec), prefix="compare/"))
    return metrics


def buckets_of(spec: StageSpec) -> Buckets:
    """The position buckets of a stage's metrics."""
    longest = max(task.sampling.max_completion_length for task in spec.by_task.values())
    return Buckets.over(spec.diagnostics.bucket, longest)


def _log_ratios(metrics: Metrics, batch: Batch, buckets: Buckets, *, full: bool) -> None:
    """Metrics of the step's log-ratios log q(y) - log p(y), per token and per response."""
    log_ratio = batch.teacher_logp - batch.policy_logp  # [B, T]
    values = valid(log_ratio, batch.mask)  # [N]
    count = len(values)
    step = batch.mask.nonzero()[:, 1]
    if not full:  # on a full support, phase B reports it from the update's own log-probs
        metrics.mean("teacher/log_ratio", values.sum().item(), count)
        add_by_place(metrics, "teacher/log_ratio", values, step)
    metrics.mean("teacher/negative_share", (values < 0).sum().item(), count)
    metrics.mean("teacher/win_rate", (values > 0).sum().item(), count)
    metrics.rows(_of_tokens, log_ratio=values.cpu().numpy())
    buckets.add_means(metrics, "teacher/log_ratio", values, step)
    if buckets.count > 1:
        start = buckets.of(step) * buckets.width
        metrics.rows(_of_buckets, start=start.int().cpu().numpy(), log_ratio=values.cpu().numpy())
    trained = batch.mask.any(1)
    lengths = batch.mask.sum(1)[trained]
    sums = log_ratio.masked_fill(~batch.mask, 0.0).double().sum(1)[trained]  # [B]
    metrics.mean("teacher/sequence_log_weight", sums.sum().item(), len(sums))
    metrics.rows(_of_sequences, log_weight=sums.cpu().numpy())
    judged = torch.tensor([r.reward is not None for r in batch.rollouts], device=trained.device)[trained]
    metrics.rows(
        _of_judged,
        log_ratio=(sums / lengths)[judged].cpu().numpy(),
        reward=batch.reward[trained][judged].double().cpu().numpy(),
    )


def _entropies(metrics: Metrics, batch: Batch) -> None:
    """Means of the entropies that the method computed, and of the gap between them if it has both."""
    known: dict[str, Tensor | None] = {"student": batch.student_entropy, "teacher": batch.teacher_entropy}
    values = {name: valid(entropy, batch.mask) for name, entropy in known.items() if entropy is not None}
    for name, entropy in values.items():
        metrics.mean(f"{name}/entropy", entropy.sum().item(), len(entropy))
    if len(values) == 2:
        gap = (values["teacher"] - values["student"]).abs()
        metrics.mean("teacher/entropy_gap", gap.sum().item(), len(gap))


def _of_tokens(columns: Columns) -> dict[str, float]:
    """Percentiles of all tokens' log-ratios, and the share of positive reward in the top 5 % of tokens (2603.25562)."""
    log_ratio = columns["log_ratio"].astype(np.float64)
    places = np.quantile(log_ratio, [percentile / 100 for percentile in PERCENTILES])
    numbers = {f"teacher/log_ratio_p{p:02d}": float(v) for p, v in zip(PERCENTILES, places, strict=True)}
    held = top_share(log_ratio)
    return numbers if held is None else numbers | {"teacher/positive_reward_in_top_5_percent": held}


def _of_lengths(columns: Columns) -> dict[str, float]:
    """Percentiles of all responses' lengths."""
    places = np.quantile(columns["length"].astype(np.float64), [0.1, 0.5, 0.9])
    return {f"rollout/length_p{p}": float(v) for p, v in zip((10, 50, 90), places, strict=True)}


def _of_buckets(columns: Columns) -> dict[str, float]:
    """The 5th percentile of the log-ratios by position; it falls where the teacher is unreliable (2603.25562)."""
    return {
        f"teacher/log_ratio_p05/{starting_at(start)}": float(
            np.quantile(columns["log_ratio"][columns["start"] == start].astype(np.float64), 0.05)
        )
        for start in np.unique(columns["start"]).tolist()
    }


def _of_sequences(columns: Columns) -> dict[str, float]:
    """Effective sample share of the log-weights log q(response) - log p(response): 2605.11182, released report."""
    return {"teacher/effective_sample_share": effective_share(columns["log_weight"])}


def _of_judged(columns: Columns) -> dict[str, float]:
    """AUROC of the mean log-ratio for right against wrong, if rewards are 0 or 1 (2604.13016 section 6.2)."""
    reward = columns["reward"]
    area = auroc(columns["log_ratio"], reward == 1) if np.isin(reward, (0, 1)).all() else None
    return {} if area is None else {"teacher/reward_auroc": area}


def _drawn_at(rollout: Rollout) -> float | None:
    """The temperature of `policy_logp`; log-ratios need one temperature for both models."""
    return None if rollout.sampling is None else rollout.sampling.temperature
