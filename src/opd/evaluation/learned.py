"""Reasons in a stage's metrics why it may have learned little: lines for the end of the stage and its report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from opd.evaluation.thresholds import fired

DIFFERS = "rollout/reward_differs"  # share of a step's prompts whose responses have different rewards


def warnings_of(metrics: Sequence[Mapping[str, Any]]) -> list[str]:
    """All lines about the rows of a stage's `metrics.jsonl`."""
    rules = [one.sentence for one in fired(metrics)]
    return [*failed_rewards(metrics), *unmoved_reward(metrics), *skipped_updates(metrics), *rules]


def failed_rewards(metrics: Sequence[Mapping[str, Any]]) -> list[str]:
    """How many responses of training and evaluations have no reward, or one that was cut off; one line each."""
    lines: list[str] = []
    for what, says in (("rewards_failed", "failed"), ("rewards_timed_out", "ran out of time (0)")):
        keys = {key for row in metrics for key in row if key.endswith(f"/{what}")}
        count = sum(row[key] for row in metrics for key in keys if key in row)
        if count:
            lines.append(f"the reward {says} on {count:.0f} responses ({', '.join(sorted(keys))} in metrics.jsonl)")
    return lines


def unmoved_reward(metrics: Sequence[Mapping[str, Any]]) -> list[str]:
    """A line if a method compares responses by their rewards, and no prompt of the stage had two different ones.

    Every advantage from the reward was then 0: such a stage passes without an error and without effect (arXiv
    2605.12483: a teacher that reinforcement learning has not reached is the raw teacher).
    """
    compared = [row for row in metrics if DIFFERS in row]
    if not compared or any(row[DIFFERS] for row in compared):
        return []
    rewards = [row["rollout/reward"] for row in compared if "rollout/reward" in row]
    span = f" (the mean of a step was {min(rewards):g} to {max(rewards):g})" if rewards else ""
    return [
        f"the reward taught nothing: in all {len(compared)} steps the responses to each prompt had equal "
        f"rewards{span}, so every advantage from it was 0. Begin with a model that is sometimes right, use easier "
        "prompts, raise sampling.n, or check the reward"
    ]


def skipped_updates(metrics: Sequence[Mapping[str, Any]]) -> list[str]:
    """A line about steps in which a filter left nothing to train."""
    skipped = [row["train/update_skipped"] for row in metrics if "train/update_skipped" in row]
    if not any(skipped):
        return []
    return [
        f"{sum(skipped):.0f} of {len(skipped)} steps made no update, because no response passed the method's filter"
    ]
