"""Goals of `evaluate.until`: numbers that metrics of an evaluation have to reach, by sampling setting.

until: {greedy: 0.7}                              the mean reward
until: {sampled: {environment/won: 0.5}}          a metric by its name in metrics.jsonl, behind eval/SETTING/
"""

from __future__ import annotations

from collections.abc import Mapping

from opd.errors import nearest
from opd.recipe.schema import EvaluateSection

# A smaller number of these is better, whatever the task, so that "at least" is no goal.
FAILURES = ("cut_share", "repeat_ratio", "empty_share", "rewards_failed", "rewards_timed_out")
FAILURES_OF_CONVERSATIONS = (
    *("tool_errors", "errors", "timeouts", "cut", "cleaned", "printed", "invalid_moves"),
    *("turn_limit", "token_limit", "stopped", "refused", "rewritten", "hung"),
)
_INTERVAL = ("", "_low", "_high")
_OF_ENVIRONMENT = "environment/"


def goals_of(evaluate: EvaluateSection) -> dict[str, dict[str, float]]:
    """`evaluate.until` by setting and metric: a number alone is of the reward."""
    return {name: one if isinstance(one, dict) else {"reward": one} for name, one in evaluate.until.items()}


def of_reward(metric: str) -> bool:
    """Whether the metric is of the responses' rewards."""
    return metric.startswith(("reward", "pass@"))


def no_goal(metric: str, setting: str, evaluate: EvaluateSection, *, environment: bool) -> str | None:
    """Why no evaluation with this setting has the metric as a goal; None where one may. Ends with the remedy.

    `environment`: whether the responses are conversations with one, whose own counts no one knows before they are led.
    """
    of_it = metric.removeprefix(_OF_ENVIRONMENT)
    if metric in FAILURES or (of_it != metric and of_it in FAILURES_OF_CONVERSATIONS):
        return "of which less is better, and a goal is reached by a number at least as large. Name another one."
    if of_it != metric:
        if environment:
            return None
        return "and the responses are no conversations with an environment. Set `environment`, or name another one."
    n = evaluate.sampling[setting].n
    names = [f"pass@{k}" for k in evaluate.pass_at if 1 < k <= n]
    known = [f"{name}{end}" for name in ("reward", *names) for end in _INTERVAL] + ["distinct_share", "length"]
    if metric in known:
        return None
    if metric.startswith("pass@"):
        return (
            f"and this setting samples {n} responses per prompt, with evaluate.pass_at {evaluate.pass_at}. Add its k "
            f"to evaluate.pass_at, with k from 2 to evaluate.sampling.{setting}.n."
        )
    return (
        f"which an evaluation does not have.{nearest(metric, known)} It has {', '.join(known)}"
        f"{' and environment/NAME' if environment else ''}."
    )


def remedy_of(metric: str) -> str:
    """What to do about a goal that an evaluation does not have."""
    if metric.startswith(_OF_ENVIRONMENT):
        return "Name one of these, or let the environment count it in every observation, also as 0."
    if metric.startswith("pass@"):
        return "Name one of these, or use a reward that is 0 or 1, of which alone there is a pass@k."
    return "Name one of these, or evaluate more than one prompt, without which there is no interval."


def not_measured(goals: Mapping[str, float], metrics: Mapping[str, float]) -> str | None:
    """The first goal that the evaluation of its setting should have and has not. Both are by metric.

    Not one of rewards where all failed, nor one of an environment to which no conversation came: these may still come.
    """
    came = any(metrics.get(f"{_OF_ENVIRONMENT}{name}") for name in ("done", "heard_tokens"))
    for name in goals:
        if name not in metrics and (came if name.startswith(_OF_ENVIRONMENT) else "reward" in metrics):
            return name
    return None
