"""What a batch of phase A says about the step, at no further cost."""

from __future__ import annotations

from opd.method import Method
from opd.metrics import Metrics
from opd.statistics import repeat_ratio
from opd.types import Batch, Rollout, valid


def of(batch: Batch, method: Method, version: int) -> Metrics:
    """Lengths, endings, rewards and the sampled log-ratio; `version` is the number of updates behind the student.

    Where a filter chooses among responses, `rollout/kept_share` is the share of prompts with one that is trained.
    """
    metrics = Metrics()
    n = len(batch.rollouts)
    lengths = [len(rollout.response_ids) for rollout in batch.rollouts]
    metrics.mean("rollout/length", sum(lengths), n)
    metrics.max("rollout/length_max", max(lengths))
    metrics.mean("rollout/cut_share", sum(not rollout.finished for rollout in batch.rollouts), n)
    metrics.mean("rollout/repeat_ratio", sum(repeat_ratio(r.response_ids.tolist()) for r in batch.rollouts), n)
    metrics.sum("train/tokens", float(batch.mask.sum()))
    if "filtered" in method.needs():
        kept = batch.mask.any(1)
        metrics.mean("rollout/kept_share", float(kept.sum()), sum(rollout.sample == 0 for rollout in batch.rollouts))
    rewards = [rollout.reward for rollout in batch.rollouts if rollout.reward is not None]
    if rewards:
        metrics.mean("rollout/reward", sum(rewards), len(rewards))
    written = [rollout for rollout in batch.rollouts if rollout.sampler_logp is not None]
    if written:
        metrics.max("rollout/staleness_max", max(version - rollout.sampler_version for rollout in written))
    if len(written) == n:
        policy = valid(batch.policy_logp, batch.mask)
        metrics.mean("rollout/policy_nll", -policy.sum().item(), len(policy))
        if method.support.kind not in ("none", "full") and all(_drawn_at(r) == method.temperature for r in written):
            teacher = valid(batch.teacher_logp, batch.mask)
            metrics.mean("teacher/log_ratio", (teacher - policy).sum().item(), len(policy))
    metrics.merge(by_task(batch, method))
    return metrics


def by_task(batch: Batch, method: Method) -> Metrics:
    """task/NAME/... for every task of the step: reward, length and cut_share by response, log_ratio by token.

    The log-ratio, log q - log p of the sampled token, is left out where a response was not drawn at the temperature of
    the method; on a full support it comes with the loss, which has the teacher's probabilities.
    """
    metrics = Metrics()
    for i, rollout in enumerate(batch.rollouts):
        if rollout.prompt.task is None:
            continue
        name = f"task/{rollout.prompt.task}"
        metrics.mean(f"{name}/length", len(rollout.response_ids), 1)
        metrics.mean(f"{name}/cut_share", not rollout.finished, 1)
        if rollout.reward is not None:
            metrics.mean(f"{name}/reward", rollout.reward, 1)
        compared = method.support.kind not in ("none", "full") and _drawn_at(rollout) == method.temperature
        if compared and rollout.policy_logp is not None:
            ratio = valid(batch.teacher_logp[i] - batch.policy_logp[i], batch.mask[i])
            metrics.mean(f"{name}/log_ratio", ratio.sum().item(), len(ratio))
    return metrics


def _drawn_at(rollout: Rollout) -> float | None:
    """The temperature behind `policy_logp`: a log-ratio of two temperatures is no estimate of anything."""
    return None if rollout.sampling is None else rollout.sampling.temperature
