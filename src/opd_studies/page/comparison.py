"""Comparisons of an ablation's settings: checks of claims, rows of a table, points and training curves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import TYPE_CHECKING, Any

from opd_studies.lab.ablation import SMOOTHED, START, TEACHER, Numbers
from opd_studies.page import report
from opd_studies.page.outcome import Check, differences, over_seeds, short

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Thresholds of `collapses` and `stable`. Accuracies are of responses sampled at temperature 1.
COLLAPSE = -0.1  # accuracy minus that of the student before


LEARNED = 0.0  # accuracy minus that of the student before


SIMILAR = 0.2  # nats of KL(student || teacher): a sixth of the initial KL in the studies of losses


def gap(numbers: Numbers, first: str, second: str, name: str = "sampled accuracy", **side: float) -> Check:
    """A check on the difference of `name` between two settings, paired by seed, against `above` or `below`."""
    interval = differences(numbers[first][name], numbers[second][name])
    return Check(what=f"{name}, {first} minus {second}", interval=interval, **side)


def collapses(end: Numbers, name: str) -> list[Check]:
    """Checks: much less accurate than the student before, and further from the teacher."""
    return [gap(end, name, START, below=COLLAPSE), gap(end, name, START, "KL", above=0.0)]


def stable(end: Numbers, first: str, second: str) -> list[Check]:
    """Checks: both more accurate than the student before, and equally near to the teacher."""
    learned = [gap(end, name, START, above=LEARNED) for name in (first, second)]
    return [*learned, gap(end, first, second, "KL", above=-SIMILAR, below=SIMILAR)]


def table(numbers: Numbers, columns: Sequence[str]) -> tuple[tuple[str, ...], ...]:
    """One row per setting: means over seeds, the first column with its 95 % interval; empty if not measured."""
    rows = [("setting", *columns)]
    for name, measured in numbers.items():
        cells: list[str] = []
        for column in columns:
            if column not in measured:
                cells.append("")
                continue
            one = over_seeds(measured[column])
            interval = f" [{short(one.low)}, {short(one.high)}]" if column == columns[0] else ""
            cells.append(short(one.mean) + interval)
        rows.append((name, *cells))
    return tuple(rows)


def draw(numbers: Numbers, panels: Mapping[str, str], height: float = 3.4) -> Figure:
    """One panel per entry of `panels` (measurement: axis label): a row per setting, as `points` draws it."""
    figure, axes = report.figure(len(panels), width=2.6, height=height)
    points(axes[0], numbers, panels)
    return figure


def points(axes: Sequence[Any], numbers: Numbers, panels: Mapping[str, str]) -> None:
    """Seeds as small points, their mean as a large one; settings that begin alike stand together.

    `axes`: one per entry of `panels`; the first one shows the settings' names. Start and teacher are grey.
    """
    names = list(numbers)
    places = _places(names)
    for panel, (what, label) in zip(axes, panels.items(), strict=True):
        for place, name in zip(places, names, strict=True):
            values = numbers[name].get(what)
            if values is None:
                continue
            colour = report.COLOURS[5] if name.partition(",")[0] in (START, TEACHER) else report.COLOURS[0]
            panel.axhline(place, color="#e5e7eb", linewidth=0.8, zorder=0)
            panel.plot(values, [place] * len(values), "o", color=colour, markersize=2.5, alpha=0.5)
            panel.plot([fmean(values)], [place], "o", color=colour, markersize=5.5)
        panel.set_xlabel(label)
        low, high = panel.get_xlim()
        panel.set_xlim(min(low, -0.04 * high), high)
        panel.set_ylim(places[-1] + 0.6, -0.6)
        panel.set_yticks(places, names if panel is axes[0] else [""] * len(names))


def _places(names: Sequence[str]) -> list[float]:
    """The rows' places: a gap where the part of the name before a comma changes."""
    places: list[float] = []
    for before, name in zip([None, *names], names, strict=False):
        near = before is None or before.partition(",")[0] == name.partition(",")[0]
        places.append((places[-1] if places else -1.0) + (1.0 if near or not places else 1.4))
    return places


def curves(panel: Any, curve: Mapping[str, Sequence[Sequence[float]]], names: Sequence[str], label: str) -> None:
    """Draw training accuracies [seeds][updates] by update: one line per setting, the mean over seeds."""
    for name, colour in zip(names, report.COLOURS, strict=False):
        by_seed = curve[name]
        steps = range(SMOOTHED, SMOOTHED + len(by_seed[0]))
        panel.plot(steps, [fmean(values) for values in zip(*by_seed, strict=True)], color=colour, label=name)
    panel.set(xlabel="update", ylabel=label, ylim=(-0.03, 1.03))
    panel.legend(fontsize=7)
