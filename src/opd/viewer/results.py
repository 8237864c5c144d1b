"""Held-out numbers of a stage: a table with intervals, the teacher's lead recovered, and paired differences."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from opd.evaluation.results import ROWS, of_task
from opd.viewer.pairs import SCORED, Paired, paired, scores
from opd.viewer.read import StageView

DIVERGENCES = (("reverse_kl", "KL(p‖q), nats per token"), ("forward_kl", "KL(q‖p), nats per token"))


@dataclass(frozen=True, slots=True)
class Cell:
    """A number of the table as text, with its interval if it has one."""

    text: str
    interval: str = ""


@dataclass(frozen=True, slots=True)
class Point:
    """A mean reward and its interval, for a plot."""

    when: str
    label: str
    mean: float
    low: float | None
    high: float | None


@dataclass(slots=True)
class Setting:
    """What was measured in one sampling setting of a task."""

    title: str
    reward: str  # the reward's name
    correctness: bool
    share: bool = True  # all rewards of the stage lie in [0, 1], and are shown in per cent
    rows: list[tuple[str, list[Cell]]] = field(default_factory=list)
    points: list[Point] = field(default_factory=list)
    recovery: tuple[float, float | None, float | None] | None = None
    paired: Paired | None = None

    @property
    def caption(self) -> str:
        """What the plot shows."""
        intervals = any(point.low is not None for point in self.points)
        unit = ", per cent" if self.share else ""
        return f"{self.title}: {self.reward}{unit}{', with 95 % intervals' if intervals else ''}"

    @property
    def up(self) -> str:
        """What it is called when a response gains the reward: `wrong -> right` only if the reward declares it."""
        return "wrong \u2192 right" if self.correctness else f"{self.reward} 0 \u2192 1"

    @property
    def down(self) -> str:
        """What it is called when a response loses the reward."""
        return "right \u2192 wrong" if self.correctness else f"{self.reward} 1 \u2192 0"

    @property
    def scale(self) -> tuple[float, float]:
        """The ends of the plot's axis: 0 and 1 for shares, else round numbers around those of the points and 0."""
        ends = [0.0, *(x for one in self.points for x in (one.mean, one.low, one.high) if x is not None)]
        if self.share:
            return 0.0, 1.0
        rough = (max(ends) - min(ends) or 1.0) / 4
        step = next(
            nice for k in range(-9, 12) for nice in (10.0**k, 2 * 10.0**k, 5 * 10.0**k) if nice >= rough * 0.999
        )
        low = math.floor(min(ends) / step) * step
        return low, low + 4 * step * math.ceil((max(ends) - low) / (4 * step) - 1e-9)


def tasks_of(stage: StageView) -> dict[str | None, dict[str, Any]]:
    """The sections of `evaluate` by task, None for a stage without tasks."""
    tasks = stage.spec.get("tasks") or {}
    sections = {name: (task or {}).get("evaluate") for name, task in tasks.items()} if tasks else {}
    every = sections or {None: stage.spec.get("evaluate")}
    return {task: section or stage.spec.get("evaluate") or {} for task, section in every.items()}


def settings_of(stage: StageView, task: str | None) -> list[str]:
    """The sampling settings of a task, in the recipe's order."""
    return list((tasks_of(stage).get(task) or {}).get("sampling") or (stage.keys or {}).get("settings") or [])


def reward_of(stage: StageView, task: str | None) -> tuple[str, bool]:
    """(the reward's name, whether it declares that 1 means correct). The name is `reward` if nothing tells it."""
    declared = (stage.keys or {}).get("reward") or {}
    if task is not None and isinstance(declared.get(task), dict):
        declared = declared[task]
    own = stage.spec if task is None else (stage.spec.get("tasks") or {}).get(task) or {}
    section = (tasks_of(stage).get(task) or {}).get("reward") or own.get("reward") or {}
    name = (section.get("name") if isinstance(section, dict) else section) or declared.get("name") or "reward"
    same = declared.get("name") is None or name in str(declared["name"]).split(", ")  # of several tasks, all names
    return str(name), bool(declared.get("correctness")) and same


def evaluations(metrics: Sequence[Mapping[str, Any]], task: str | None) -> dict[str, list[tuple[int, dict[str, Any]]]]:
    """The evaluations of a task as (step, numbers without their prefix): of `student`, and of its `teacher`."""
    out: dict[str, list[tuple[int, dict[str, Any]]]] = {"student": [], "teacher": []}
    for row in of_task(metrics, task):
        own: dict[str, dict[str, Any]] = {"student": {}, "teacher": {}}
        for key, value in row.items():
            name = key.removeprefix("eval/")
            if key != "step":
                own["teacher" if name.startswith("teacher/") else "student"][name.removeprefix("teacher/")] = value
        for who, numbers in own.items():
            if numbers:
                out[who].append((int(row["step"]), numbers))
    return out


def columns_of(stage: StageView, task: str | None) -> dict[str, dict[str, Any]]:
    """The numbers by column: before, teacher, after; `after` only of an evaluation after the first step."""
    found = evaluations(stage.metrics, task)
    columns: dict[str, dict[str, Any]] = {}
    if found["student"] and found["student"][0][0] == 0:
        columns["before"] = found["student"][0][1]
    if found["teacher"]:
        columns["teacher"] = found["teacher"][0][1]
    if found["student"] and found["student"][-1][0] > 0:
        columns["after"] = found["student"][-1][1]
    return columns


def whens_of(stage: StageView) -> list[str]:
    """The columns that any task has: before, teacher, after."""
    found = {when for task in tasks_of(stage) for when in columns_of(stage, task)}
    return [when for when in ("before", "teacher", "after") if when in found]


def labels_of(stage: StageView) -> dict[str, str]:
    """What the columns are called: the last one is `after` once the stage has finished, else its step."""
    steps = [step for task in tasks_of(stage) for step, _ in evaluations(stage.metrics, task)["student"]]
    last = max(steps, default=0)
    return {"before": "before", "teacher": "teacher", "after": "after" if stage.done else f"step {last}"}


def settings(stage: StageView) -> list[Setting]:
    """What was measured in each task and sampling setting, in the recipe's order."""
    labels, out, whens = labels_of(stage), list[Setting](), whens_of(stage)
    before, after = _files(stage)
    rewards = [x for held in (before, after) for own in held.values() for group in own.values() for x in group]
    share = all(0 <= x <= 1 for x in (*rewards, *_means(stage)))
    for task in tasks_of(stage):
        found = columns_of(stage, task)
        columns = {when: found.get(when, {}) for when in whens}
        for name in settings_of(stage, task):
            reward, correctness = reward_of(stage, task)
            one = Setting(name if task is None else f"{task}, {name}", reward, correctness, share)
            _fill(one, columns, f"{name}/", labels, pass_at=(tasks_of(stage)[task].get("pass_at") or []))
            if (task, name) in before and (task, name) in after:
                one.paired = paired(before[task, name], after[task, name])
            if one.rows:
                out.append(one)
    return out


def divergences(stage: StageView) -> list[tuple[str, list[Cell]]]:
    """Rows of the exact divergences on the student's own responses, which are of a task and no setting."""
    rows: list[tuple[str, list[Cell]]] = []
    for task in tasks_of(stage):
        columns = columns_of(stage, task)
        for key, label in DIVERGENCES:
            cells = [cell(columns.get(when, {}), key, digits=3) for when in whens_of(stage)]
            if any(one.text for one in cells):
                rows.append((label if task is None else f"{task}: {label}", cells))
    return rows


def _files(stage: StageView) -> tuple[dict[Any, Any], dict[Any, Any]]:
    """The rewards of the held-out prompts before and after training."""
    whens = stage.whens
    last = [when for when in whens if when.startswith("step_")]
    if "before" not in whens or not last:
        return {}, {}
    return scores(stage.held_out("before", SCORED)), scores(stage.held_out(last[-1], SCORED))


def _means(stage: StageView) -> list[float]:
    """Every mean reward of the stage's evaluations, the teacher's too."""
    return [
        value
        for task in tasks_of(stage)
        for numbers in columns_of(stage, task).values()
        for key, value in numbers.items()
        if key.endswith("/reward")
    ]


def _fill(
    one: Setting,
    columns: Mapping[str, Mapping[str, Any]],
    prefix: str,
    labels: Mapping[str, str],
    pass_at: Sequence[int],
) -> None:
    """Rows, points and recovery of a setting from the numbers of its columns."""
    asked = [("reward", one.reward, one.share), *((f"pass@{k}", f"pass@{k}", True) for k in pass_at if k != 1), *ROWS]
    for key, label, in_percent in asked:
        cells = [
            cell(numbers, prefix + key, share=in_percent, digits=2 if key == "reward" else 1)
            for numbers in columns.values()
        ]
        if any(found.text for found in cells):
            one.rows.append((label, cells))
    for when, numbers in columns.items():
        if f"{prefix}reward" in numbers:
            ends = [numbers.get(f"{prefix}reward_{end}") for end in ("low", "high")]
            one.points.append(Point(when, labels[when], numbers[f"{prefix}reward"], *ends))
    after = columns.get("after", {})
    if f"{prefix}gap_recovery" in after:
        low, high = (after.get(f"{prefix}gap_recovery_{end}") for end in ("low", "high"))
        one.recovery = (after[f"{prefix}gap_recovery"], low, high)


def cell(numbers: Mapping[str, Any], key: str, *, share: bool = False, digits: int = 1) -> Cell:
    """A number as text, a share in per cent, with its interval; empty if it was not measured."""
    if key not in numbers:
        return Cell("")
    show = (lambda x: f"{x:.0%}") if share else (lambda x: f"{x:.{digits}f}")
    low, high = numbers.get(f"{key}_low"), numbers.get(f"{key}_high")
    return Cell(show(numbers[key]), "" if low is None or high is None else f"{show(low)} to {show(high)}")
