"""The held-out numbers of a stage as columns: student before, teacher, student after, and between. No torch here."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from opd.environments.protocol import SUMS

# What an evaluation measures in each sampling setting beside the reward: key, label, whether it is a share.
ROWS = (
    ("length", "tokens", False),
    ("cut_share", "cut at the limit", True),
    ("distinct_share", "distinct", True),
    ("repeat_ratio", "repetition", True),
    ("empty_share", "empty", True),
    ("rewards_failed", "without reward", False),
    ("rewards_timed_out", "reward timed out", False),
)


def of_task(metrics: Sequence[Mapping[str, Any]], task: str | None) -> list[dict[str, Any]]:
    """The evaluations of one task, with keys eval/... that leave its name out. `task` None: a stage without tasks."""
    prefix = "eval/" if task is None else f"eval/{task}/"
    rows: list[dict[str, Any]] = []
    for row in metrics:
        own = {f"eval/{key.removeprefix(prefix)}": value for key, value in row.items() if key.startswith(prefix)}
        rows += [{"step": row["step"], **own}] if own else []
    return rows


def environments_own(setting: str, names: Iterable[str]) -> list[str]:
    """The counts of an environment's own among numbers named SETTING/..., once each: `environment/won`."""
    start = f"{setting}/environment/"
    counts = dict.fromkeys(name.removeprefix(start) for name in names if name.startswith(start))
    return [f"environment/{name}" for name in counts if name not in SUMS]


def columns_of(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """Measurements by column name. The teacher's are in the row of step 0."""
    first, last = rows[0], rows[-1]
    columns: dict[str, dict[str, float]] = {}
    if first["step"] == 0:
        before = {k: v for k, v in first.items() if k.startswith("eval/") and not k.startswith("eval/teacher/")}
        taught = {k.replace("eval/teacher/", "eval/"): v for k, v in first.items() if k.startswith("eval/teacher/")}
        columns |= {name: c for name, c in (("before", before), ("teacher", taught)) if c}
    for row in rows:
        if row["step"] > 0:
            columns["after" if row is last else f"step {row['step']}"] = dict(row)
    return columns
