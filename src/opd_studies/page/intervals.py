"""The figure of a study's claims: each measured interval beside the threshold of its claim. Drawn from the results."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from opd.files import write_atomically
from opd_studies.page import report
from opd_studies.page.outcome import Check, Finding, State, short

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# A colour and a marker of each state, the same in every study; dark on white, and apart for colour-blind readers.
MARKS: dict[State, tuple[str, str]] = {
    "holds": ("#1b6ca8", "o"),
    "contradicted": ("#c2410c", "s"),
    "undecided": ("#6b7280", "D"),
}
CLAIM = "#dbe7f3"  # the side of the threshold on which the claim is
WIDTH, ROW, LINE = 8.2, 0.34, 0.16  # inches: of the figure, of a check, of a line of text
LABEL, TITLE = 46, 100  # characters of a line
RC = {"svg.fonttype": "none", "font.size": 8, "axes.spines.top": False, "axes.spines.right": False}


def draw(findings: Sequence[Finding], title: str) -> Figure:
    """One panel per claim, one row per check: mean and 95 % interval, and the claim's side of its threshold.

    `title` is the study's finding. Raises ConfigError when matplotlib is not installed.
    """
    report.check_drawing()
    from matplotlib.figure import Figure

    heads = [_head(one) for one in findings]
    rows = [_rows(one) for one in findings]
    tall = [
        len(inside) * ROW + max(0, max(label.count("\n") for label, _ in inside) - 1) * LINE * len(inside)
        for inside in rows
    ]
    extra = [0.45 + LINE * (head.count("\n") + 1) for head in heads]
    top = textwrap.fill(title.replace("`", ""), TITLE - 8)
    above = 0.92 + LINE * (top.count("\n") + 1)
    figure = Figure(figsize=(WIDTH, sum(tall) + sum(extra) + above))
    figure.text(0.012, 1 - 0.12 / figure.get_figheight(), top, fontsize=10, fontweight="bold", va="top")
    _legend(figure, above)
    y = figure.get_figheight() - above
    for head, inside, height, space in zip(heads, rows, tall, extra, strict=True):
        y -= height + space - 0.38
        panel = figure.add_axes((0.345, y / figure.get_figheight(), 0.635, height / figure.get_figheight()))
        _panel(panel, inside)
        figure.text(
            0.012, (y + height + 0.05) / figure.get_figheight(), head, fontsize=8.5, fontweight="bold", va="bottom"
        )
        y -= 0.38
    return figure


def save(folder: Path, name: str, findings: Sequence[Finding], title: str) -> Path:
    """Write figures/studies/NAME_claims.svg under `folder`; its path. Raises as `draw`, and RunError."""
    report.check_drawing()
    import matplotlib as mpl

    file = image(folder, name)
    style: dict[Any, Any] = {**RC, "svg.hashsalt": name}
    with mpl.rc_context(style):
        figure = draw(findings, title)
        about: Any = {"Date": None, "Creator": None, "Title": title}
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(file, lambda part: figure.savefig(part, format="svg", metadata=about))
    return file


def image(folder: Path, name: str) -> Path:
    """The path of the figure of a study's claims under `folder`."""
    return folder / "figures" / "studies" / f"{name}_claims.svg"


def _head(one: Finding) -> str:
    return textwrap.fill(f"{one.claim}: {one.verdict}", TITLE)


def _rows(one: Finding) -> list[tuple[str, Check]]:
    """The checks with their labels; the setting is named if there are two."""
    named = [(f"{setting}: " if one.second else "", check) for setting, checks in _settings(one) for check in checks]
    return [(textwrap.fill(f"{setting}{check.what}", LABEL), check) for setting, check in named]


def _settings(one: Finding) -> list[tuple[str, tuple[Check, ...]]]:
    return [("A", one.checks), ("B", one.second)]


def _panel(panel: Any, rows: Sequence[tuple[str, Check]]) -> None:
    low, high = _range([check for _, check in rows])
    for place, (_, check) in enumerate(rows):
        colour, marker = MARKS[check.state]
        left = low if check.above is None else check.above
        right = high if check.below is None else check.below
        panel.barh(place, right - left, 0.72, left=left, color=CLAIM, zorder=0)
        for bound in (check.above, check.below):
            if bound is not None:
                panel.plot([bound, bound], [place - 0.36, place + 0.36], color="#1f2937", linewidth=1, zorder=1)
        found = check.interval
        if math.isnan(found.low) or math.isnan(found.high):
            continue
        panel.plot([found.low, found.high], [place, place], color=colour, linewidth=2, solid_capstyle="butt", zorder=2)
        panel.plot([found.mean], [place], marker, color=colour, markersize=5, zorder=3)
        panel.annotate(
            f"{short(found.mean)}",
            (found.mean, place),
            xytext=(0, 5),
            textcoords="offset points",
            ha="center",
            fontsize=6.5,
        )
    panel.set_xlim(low, high)
    panel.set_ylim(len(rows) - 0.5, -0.62)
    panel.set_yticks(range(len(rows)), [label for label, _ in rows], fontsize=7.5)
    panel.tick_params(axis="y", length=0)
    panel.spines["left"].set_visible(False)


def _range(checks: Sequence[Check]) -> tuple[float, float]:
    """Where a panel begins and ends: around all intervals and thresholds, with a margin on both sides."""
    values = [
        value
        for check in checks
        for value in (check.interval.low, check.interval.high, check.interval.mean, check.above, check.below)
        if value is not None and math.isfinite(value)
    ]
    low, high = min([*values, 0.0]), max([*values, 0.0])
    margin = 0.08 * (high - low or 1.0)
    return low - margin, high + margin


def _legend(figure: Figure, above: float) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    handles: list[Any] = [
        Line2D([], [], color=colour, marker=marker, linewidth=2, markersize=5, label=name)
        for name, (colour, marker) in MARKS.items()
    ]
    handles.append(Patch(color=CLAIM, label="where the claim holds; line: its threshold"))
    place = 1 - (above - 0.6) / figure.get_figheight()
    figure.legend(
        handles=handles,
        loc="upper left",
        bbox_to_anchor=(0.003, place),
        ncols=4,
        title="mean and 95 % interval over seeds, by what they say of the claim",
        title_fontsize=7.5,
        alignment="left",
        frameon=False,
        fontsize=7.5,
        columnspacing=1.2,
        handletextpad=0.5,
    )
