"""The result of the probe as text and as JSON: a table of alignments, what was left out, and which teacher to take."""

from __future__ import annotations

import json
import textwrap
from dataclasses import dataclass
from typing import Any

from opd.evaluation.teacher_alignment import ALL, CONTROLS, RIGHT, SHARPER, WRONG, Alignment, Choice, Row, choice
from opd.maths.intervals import Interval

WIDTH = 120  # characters of a line

NOISY = 0.5  # a ceiling below it is said: the estimated ideal gradient is then mostly noise; ours


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """The sizes of the probe and what it found; `seconds` is how long it took."""

    recipe: str
    stage: str
    prompts: int
    responses: int  # per prompt
    right: float  # share of the responses
    nodes: int
    continuations: int
    visits: int  # per token
    tau: float
    form: str
    seed: int
    seconds: float
    alignment: Alignment

    @property
    def choice(self) -> Choice | None:
        return choice(self.alignment, self.form)


def as_text(report: Report) -> str:
    """The report as text."""
    found = report.alignment
    lines = [
        f"{report.recipe}, stage {report.stage}: {report.prompts} prompts, {report.responses} responses each, "
        f"{report.right:.0%} right",
        f"({report.nodes} nodes, {report.continuations:,} continuations, seed {report.seed}, {report.seconds:.0f} s)",
        "",
        *_wrapped(verdict(report)),
    ]
    if found.visits:
        lines += ["", *_table(report, [ALL, RIGHT, WRONG]), "", *_table(report, [g for g in found.visits if _depth(g)])]
    return "\n".join([*lines, "", *_wrapped(left_out(found))])


def verdict(report: Report) -> str:
    """Which teacher and context to take, and why."""
    best = report.choice
    if best is None and report.alignment.visits:
        return "Take none: at every node that was measured the teachers have the student's own probabilities."
    if best is None:
        return (
            "Take none: at no node does the next token change the probability of a right response, as far as the "
            "continuations show. Use prompts that the student sometimes solves."
        )
    noisy = report.alignment.ceiling[ALL] < NOISY
    more = (
        f" The ideal gradient itself is mostly noise at {report.visits} visits (ceiling "
        f"{_number(report.alignment.ceiling[ALL])}): give more --visits."
        if noisy
        else ""
    )
    if best.best is None:
        return (
            f"Take none: no gradient of {report.form} points to right responses more than that of a teacher that knows "
            f"nothing, 0 (the highest is {best.highest!r}: {best.cosine}). Try another teacher or context, or more "
            f"--prompts.{more}"
        )
    says = f"Take {best.best!r}: its gradient of {report.form} points most to right responses, {best.cosine}."
    if best.others:
        gaps = "; ".join(f"{name!r}: {gap}" for name, gap in best.others.items())
        tied = f", so {' and '.join(map(repr, best.tied))} may be as good" if best.tied else ""
        says += f" Its cosine minus that of the others, over prompts: {gaps}{tied}."
    says += f" Minus the control {SHARPER!r}, which needs no teacher: {best.over_sharper}"
    return f"{says}{', so the teacher may add nothing' if best.over_sharper.low <= 0 else ''}.{more}"


def left_out(found: Alignment) -> str:
    """What no mean counts."""
    lines = [f"Left out: {found.flat} visits of nodes where all tokens have the same measured reward"]
    lines += [
        f"{row.silent} of {row.of.name} ({row.of.form}), which agrees with the student there"
        for row in found.rows
        if row.silent
    ]
    return "; ".join(lines) + "."


def as_json(report: Report) -> str:
    """The report as JSON: sizes, every alignment with its interval, ceilings, and the choice."""
    names = ("recipe", "stage", "prompts", "responses", "right", "nodes", "continuations", "visits", "tau", "form")
    found, best = report.alignment, report.choice
    return json.dumps(
        {
            **{name: getattr(report, name) for name in (*names, "seed", "seconds")},
            "take": None if best is None else best.best,
            "verdict": verdict(report),
            "highest": None if best is None else best.highest,
            "over_sharper": None if best is None else best.over_sharper.numbers("mean"),
            "others": {} if best is None else {name: gap.numbers("mean") for name, gap in best.others.items()},
            "left_out": {"flat": found.flat},
            "visits_by_group": dict(found.visits),
            "ceiling": dict(found.ceiling),
            "alignment": [_row_numbers(row) for row in found.rows],
        },
        indent=2,
        allow_nan=False,
    )


def _row_numbers(row: Row) -> dict[str, Any]:
    return {
        "name": row.of.name,
        "form": row.of.form or None,
        "control": row.of.name in CONTROLS,
        "cosine": {group: interval.numbers("mean") for group, interval in row.cosine.items()},
        "together": None if row.together is None else row.together.numbers("mean"),
        "silent": row.silent,
    }


def _table(report: Report, groups: list[str]) -> list[str]:
    """A line per teacher, context and form, then the controls and the ceiling; a column per group."""
    found = report.alignment
    groups = [group for group in groups if group in found.visits]
    whole = ALL in groups
    head = ["cosine with the ideal gradient", "of", *(f"{g} ({found.visits[g]})" for g in groups)]
    rows = [[*head, "as one vector"] if whole else head]
    for row in found.rows:
        form = row.of.form or "control"
        cells = [row.of.name, form, *(_cell(row.cosine.get(group)) for group in groups)]
        rows.append([*cells, _cell(row.together)] if whole else cells)
    last = ["ceiling, by halves", "", *(_number(found.ceiling[group]) for group in groups)]
    rows.append([*last, ""] if whole else last)
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def _cell(interval: Interval | None) -> str:
    if interval is None:
        return "-"
    if interval.high - interval.low == float("inf"):
        return _number(interval.mean)
    return f"{_number(interval.mean)} [{_number(interval.low)}, {_number(interval.high)}]"


def _number(value: float) -> str:
    return f"{value:.2f}"


def _depth(group: str) -> bool:
    return group not in (ALL, RIGHT, WRONG)


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(text, WIDTH, break_long_words=False, break_on_hyphens=False)
