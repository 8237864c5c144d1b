"""The curves of several runs over each other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from opd.viewer import pack
from opd.viewer.curves import axes_of, charts_of, compact, evaluated_of, series_of
from opd.viewer.read import StageView
from opd.viewer.results import reward_of, tasks_of


def overlaid(stages: Sequence[StageView], labels: Sequence[str]) -> tuple[dict[str, Any], bytes]:
    """The data of a comparison for the script, and the block of curves: a series is named by its run's number and key.

    Each chart has the first series of every run that has it.
    """
    lines, points = [series_of(stage) for stage in stages], [evaluated_of(stage) for stage in stages]
    charts = _charts(stages, labels, [a | b for a, b in zip(lines, points, strict=True)])
    used = {key for chart in charts for key in chart["lines"]}
    content = {
        "lines": compact({key: one for key, one in _numbered(lines).items() if key in used}),
        "points": compact(_numbered(points)),
        "axes": [axes_of(stage) for stage in stages],
    }
    first = stages[0]
    data: dict[str, Any] = {
        "name": first.name,
        "compared": True,
        "steps": [],
        "held": 0,
        "held_of": 0,
        "followed": 0,
        "position": None,
        "images": None,
        "teacher": any(stage.spec.get("teacher") or (stage.keys or {}).get("teacher") for stage in stages),
        "scored": None,
        "whens": [],
        "labels": {label: label for label in labels},
        "charts": charts,
        "made": max(stage.steps_done for stage in stages),
        "planned": max(int(stage.spec.get("steps") or 0) for stage in stages),
        "finished": all(stage.done is not None for stage in stages),
        "rewards": [[task, *reward_of(first, task)] for task in tasks_of(first)],
        "settings": [],
    }
    return data, pack.plain(content)


def _charts(
    stages: Sequence[StageView], labels: Sequence[str], known: Sequence[dict[str, Any]]
) -> list[dict[str, Any]]:
    """One chart for each title of any run; its series are lines first, then points, as a chart draws them."""
    found: dict[str, dict[str, list[tuple[int, dict[str, Any]]]]] = {}
    for n, stage in enumerate(stages):
        for chart in charts_of(stage, known[n]):
            kind = "points" if chart["points"] else "lines"
            found.setdefault(chart["title"], {"lines": [], "points": []})[kind].append((n, chart))
    charts: list[dict[str, Any]] = []
    for kinds in found.values():
        every = [*kinds["lines"], *kinds["points"]]
        measured = [(n, chart["intervals"][0]) for n, chart in kinds["points"] if chart.get("intervals")]
        charts.append(
            {
                **every[0][1],
                "title": every[0][1].get("first", every[0][1]["title"]),
                **{kind: [f"{n}/{chart[kind][0]}" for n, chart in own] for kind, own in kinds.items()},
                "level": None,
                "intervals": [[f"{n}/{end}" for end in ends] for n, ends in measured],
                "share": all(chart.get("share") for _, chart in every),
                "runs": [n for n, _ in every],
                "names": [labels[n] for n, _ in every],
            }
        )
    return charts


def _numbered(every: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The series of all runs, each key behind the number of its run."""
    return {f"{n}/{key}": one for n, own in enumerate(every) for key, one in own.items()}
