"""The share of the teacher's lead that a student has recovered, from the held-out responses of three measurements."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeAlias

from opd.maths.intervals import Recovery, gap_recovery

Rows: TypeAlias = Sequence[Mapping[str, Any]]  # of `samples.sample_rows`, with `task` and `sampling`


def recovered(
    before: Rows, teacher: Rows, after: Rows, task: str | None, samplings: Iterable[str]
) -> dict[str, Recovery]:
    """The gap recovery (`intervals.gap_recovery`, arXiv 2604.13016) of a task by sampling setting.

    Leaves out settings in which one of the three has no measurement or no reward, or in which the teacher is not ahead.
    """
    found: dict[str, Recovery] = {}
    for sampling in samplings:
        first, best, last = (_rewards(rows, task, sampling) for rows in (before, teacher, after))
        if not first or not first.keys() == best.keys() == last.keys():
            continue
        prompts = list(first)
        recovery = gap_recovery([first[i] for i in prompts], [best[i] for i in prompts], [last[i] for i in prompts])
        if recovery is not None:
            found[sampling] = recovery
    return found


def as_metrics(recoveries: Mapping[str, Recovery], task: str | None) -> dict[str, float]:
    """Metrics eval/[TASK/]SAMPLING/gap_recovery, as shares, with _low and _high if the interval is bounded."""
    metrics: dict[str, float] = {}
    for sampling, recovery in recoveries.items():
        name = "/".join(part for part in ("eval", task, sampling, "gap_recovery") if part is not None)
        metrics[name] = recovery.share
        if recovery.bounds is not None:
            metrics[f"{name}_low"], metrics[f"{name}_high"] = recovery.bounds
    return metrics


def _rewards(rows: Rows, task: str | None, sampling: str) -> dict[int, float]:
    """The mean reward of each prompt; empty without rewards."""
    found: dict[int, list[float]] = {}
    for row in rows:
        if row["task"] == task and row["sampling"] == sampling and row["reward"] is not None:
            found.setdefault(row["prompt_id"], []).append(row["reward"])
    return {prompt: sum(values) / len(values) for prompt, values in found.items()}
