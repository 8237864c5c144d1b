"""The figure of a study's numbers: settings as rows in groups, drawn from the table of its results."""

from __future__ import annotations

import itertools
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from opd.files import write_atomically
from opd_studies.page import report
from opd_studies.page.intervals import RC
from opd_studies.page.table import SHARE, Row, Shown, finding

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MEASURED, REFERENCE = "#1f2937", "#9ca3af"
ROW, WIDTH = 0.21, 8.2  # inches


def draw(of: Shown) -> Figure:
    """One panel per column, one row per setting, with its 95 % interval if it has one; start and teacher in grey.

    Intervals of shares are drawn from 0 to 1. Raises ConfigError when matplotlib is not installed.
    """
    report.check_drawing()
    from matplotlib.figure import Figure

    places = _places(of.rows)
    title = textwrap.fill(finding(of), 92)
    above = 0.42 + 0.17 * title.count("\n")
    height = ROW * (places[-1] + 1.4) + 0.5 + above
    figure = Figure(figsize=(WIDTH, height))
    figure.text(0.012, 1 - 0.1 / height, title, fontsize=10, fontweight="bold", va="top")
    left, gap = 0.33, 0.03
    wide = (0.985 - left - gap * (len(of.columns) - 1)) / len(of.columns)
    for i, column in enumerate(of.columns):
        low = 0.48 / height
        panel = figure.add_axes((left + i * (wide + gap), low, wide, 1 - above / height - low))
        _panel(panel, column, [(place, one, one.values[i]) for place, one in zip(places, of.rows, strict=True)])
        names = [f"{one.group}: {one.name}" if len(one.group) == 1 else one.name for one in of.rows]
        panel.set_yticks(places, [textwrap.shorten(name, 50, placeholder=" ...") for name in names] if i == 0 else [])
        panel.set_ylim(places[-1] + 0.7, -0.7)
    return figure


def _places(rows: Sequence[Row]) -> list[float]:
    """The rows' places, with a gap where the group changes."""
    steps = [1.0 if one.group == two.group else 1.6 for one, two in itertools.pairwise(rows)]
    return [0.0, *itertools.accumulate(steps)]


def _panel(panel: Any, column: str, rows: Sequence[tuple[float, Row, tuple[float, float, float] | None]]) -> None:
    share = SHARE.search(column) is not None
    for place, row, value in rows:
        panel.axhline(place, color="#eef0f3", linewidth=0.8, zorder=0)
        if value is None:
            continue
        mean, low, high = value
        colour = REFERENCE if row.reference else MEASURED
        ends = [max(low, 0.0), min(high, 1.0)] if share else [low, high]
        panel.plot(ends, [place, place], color=colour, linewidth=1.6, solid_capstyle="butt", zorder=1)
        panel.plot([mean], [place], "o", color=colour, markersize=4.5, zorder=2)
    if share:
        panel.set_xlim(-0.03, 1.03)
    panel.set_xlabel(f"{column}, share" if share and "share" not in column else column)
    panel.tick_params(axis="y", length=0)
    panel.spines["left"].set_visible(False)
    panel.margins(x=0.06)


def save(folder: Path, name: str, of: Shown) -> Path:
    """Write figures/studies/NAME_numbers.svg under `folder`; its path. Raises as `draw`, and RunError."""
    report.check_drawing()
    import matplotlib as mpl

    file = image(folder, name)
    style: dict[Any, Any] = {**RC, "svg.hashsalt": name}
    with mpl.rc_context(style):
        figure = draw(of)
        about: Any = {"Date": None, "Creator": None, "Title": finding(of)}
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(file, lambda part: figure.savefig(part, format="svg", metadata=about))
    return file


def image(folder: Path, name: str) -> Path:
    """The path of the figure of a study's numbers under `folder`."""
    return folder / "figures" / "studies" / f"{name}_numbers.svg"
