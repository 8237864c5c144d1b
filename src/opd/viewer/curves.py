"""Curves of a stage: which charts there are, their points, and the level of the teacher."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from opd.viewer.pack import rounded
from opd.viewer.read import StageView
from opd.viewer.results import evaluations, reward_of, settings_of, tasks_of
from opd.viewer.thin import POINTS, evenly, m4

SECONDS = ("generate", "score", "train", "diagnose", "sync", "total")
OTHER_TIMINGS = ("tokens_per_second", "peak_memory_gib")
# `zero`: the axis holds 0; `share`: it is that of 0 to 1; `first`: the title where only the first line is drawn.
CHARTS: tuple[dict[str, Any], ...] = (
    {"title": "Loss", "lines": ["train/loss"]},
    {
        "title": "log q - log p: mean, 5 %, 95 %",
        "first": "log q - log p, mean",
        "lines": ["teacher/log_ratio", "teacher/log_ratio_p05", "teacher/log_ratio_p95"],
        "zero": True,
    },
    {"title": "Reward while training", "lines": ["rollout/reward"], "share": True},
    {"title": "Tokens of a response", "lines": ["rollout/length", "rollout/length_max"], "zero": True},
    {
        "title": "Cut at the limit, repetition (share)",
        "first": "Cut at the limit (share)",
        "lines": ["rollout/cut_share", "rollout/repeat_ratio"],
        "share": True,
    },
    {
        "title": "Student's -log p, entropies",
        "first": "Student's -log p",
        "lines": ["rollout/policy_nll", "student/entropy", "teacher/entropy"],
        "zero": True,
    },
    {
        "title": "Overlap of the top k, mass on it",
        "first": "Overlap of the top k",
        "lines": ["compare/overlap_ratio", "compare/teacher_mass_on_overlap", "support/teacher_mass"],
        "share": True,
    },
    {"title": "Gradient norm", "lines": ["optim/grad_norm"], "zero": True},
    {
        "title": "Seconds per step",
        "first": "Seconds to generate",
        "lines": ["seconds/generate", "seconds/score", "seconds/train"],
        "zero": True,
    },
)


def series_of(stage: StageView) -> dict[str, tuple[list[float], list[float]]]:
    """Every number of a stage's steps and seconds by name, as (steps, values), thinned."""
    found: dict[str, tuple[list[float], list[float]]] = {}
    for row in stage.metrics:
        for key, value in row.items():
            if key != "step" and not key.startswith("eval/"):
                _append(found, key, row["step"], value)
    for row in stage.timings:
        for key in SECONDS:
            _append(found, f"seconds/{key}", row["step"], row.get(key))
        for key in OTHER_TIMINGS:
            _append(found, key, row["step"], row.get(key))
    return {key: m4(*points) for key, points in found.items()}


def evaluated_of(stage: StageView) -> dict[str, tuple[list[float], list[float]]]:
    """Every held-out number of the student by name, as (steps, values)."""
    found: dict[str, tuple[list[float], list[float]]] = {}
    for task in tasks_of(stage):
        for step, numbers in evaluations(stage.metrics, task)["student"]:
            for key, value in numbers.items():
                _append(found, "/".join(part for part in ("eval", task, key) if part), step, value)
    return found


def levels_of(stage: StageView) -> dict[str, float]:
    """The teacher's held-out numbers, by the names of the student's."""
    found: dict[str, float] = {}
    for task in tasks_of(stage):
        for _, numbers in evaluations(stage.metrics, task)["teacher"][:1]:
            found |= {"/".join(part for part in ("eval", task, key) if part): value for key, value in numbers.items()}
    return found


def charts_of(stage: StageView, known: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The charts of a stage, in one order; lines of which `known` has no point are left out."""
    levels, charts = levels_of(stage), list[dict[str, Any]]()
    for task in tasks_of(stage):
        reward, _ = reward_of(stage, task)
        for setting in settings_of(stage, task):
            key = "/".join(part for part in ("eval", task, setting, "reward") if part)
            title = " ".join(part for part in (f"{reward}, held out:", task, setting) if part)
            chart = {"title": title, "points": [key], "intervals": [[f"{key}_low", f"{key}_high"]]}
            values = [y for y in (known[key][1] if key in known else []) if y is not None]
            charts.append({**chart, "level": levels.get(key), "share": all(0 <= y <= 1 for y in values)})
        keys = ["/".join(part for part in ("eval", task, kl) if part) for kl in ("reverse_kl", "forward_kl")]
        title = " ".join(part for part in ("Divergence, nats per token:", task) if part).removesuffix(":")
        first = title.replace("Divergence", "KL(p\u2016q)")
        charts.append({"title": title, "first": first, "points": keys, "lines": ["compare/reverse_kl"], "zero": True})
    charts += [dict(chart) for chart in CHARTS]
    for chart in charts:
        for kind in ("lines", "points"):
            chart[kind] = [key for key in chart.get(kind, []) if key in known]
        if chart["title"] == "Reward while training":
            chart["share"] = all(0 <= y <= 1 for key in chart["lines"] for y in known[key][1])
    return [chart for chart in charts if chart["lines"] or chart["points"]]


def axes_of(stage: StageView) -> dict[str, Any]:
    """Other places than steps on the horizontal axis: (steps, trained tokens so far) and (steps, minutes so far)."""
    out: dict[str, Any] = {}
    for name, rows, key, unit in (
        ("tokens", stage.metrics, "train/tokens", 1),
        ("minutes", stage.timings, "total", 60),
    ):
        steps, totals, total = [0], [0.0], 0.0
        for row in rows:
            if row["step"] > 0 and key in row:
                total += row[key] / unit
                steps.append(row["step"])
                totals.append(total)
        if total > 0:
            chosen = evenly(len(steps), POINTS // 4)
            out[name] = [[steps[i] for i in chosen], [rounded(totals[i]) for i in chosen]]
    return out


def compact(series: Mapping[str, tuple[Sequence[float], Sequence[float]]]) -> dict[str, Any]:
    """Series whose places are stored once: {"x": lists of steps, "y": name -> [which list, values]}."""
    places: dict[tuple[float, ...], int] = {}
    ys: dict[str, list[Any]] = {}
    for name, (xs, values) in series.items():
        ys[name] = [places.setdefault(tuple(xs), len(places)), [rounded(value) for value in values]]
    return {"x": [list(xs) for xs in places], "y": ys}


def _append(found: dict[str, tuple[list[float], list[float]]], key: str, step: Any, value: Any) -> None:
    if isinstance(value, int | float) and math.isfinite(value):
        xs, ys = found.setdefault(key, ([], []))
        xs.append(step)
        ys.append(value)
