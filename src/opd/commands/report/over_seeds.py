"""A comparison over seeds as tables in the terminal."""

from __future__ import annotations

import math

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from opd.maths.intervals import Interval
from opd.messages import visible
from opd.viewer.seeds import Line, OverSeeds
from opd.viewer.seeds import Table as Numbers


def print_over_seeds(found: OverSeeds, console: Console) -> None:
    """Print groups, tables, what the intervals cover, and what is not compared."""
    for group in found.groups:
        stage = [entry.stage for entry in found.entries if entry.group is group and found.between == "recipes"]
        seeds = f"seed{'s' if len(group.runs) > 1 else ''} {', '.join(map(str, group.runs))}"
        folders = ", ".join(str(run.path) for run in group.runs.values())
        line = f"{group.label}  {', '.join((group.name, *stage, seeds))}: {folders}"
        console.print(Text(visible(line)), soft_wrap=True)
    for table in found.tables:
        console.print(_table(table, found))
    if found.keys:
        console.print(keys_table(found.keys, [group.label for group in found.groups]))
    for line in (found.covers, *found.reasons):
        console.print(Text(visible(line)), soft_wrap=True)


def _table(one: Numbers, found: OverSeeds) -> Table:
    title = Text(f"{visible(one.title)}, held out")
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("", min_width=8, overflow="fold")
    pairings = one.pairings
    how = {"paired": "\npaired by seed", "Welch": "\nWelch"}.get(pairings[0], "") if len(pairings) == 1 else ""
    mixed = ["by seed"] if len(pairings) > 1 else []
    for head in ("seeds", "mean", *([f"minus {found.baseline.name}{how}"] if pairings else []), *mixed):
        table.add_column(Text(head), justify="right", no_wrap=True)
    for line in one.lines:
        cells = [str(len(line.values)), _interval(line.mean), _interval(line.difference, "+"), line.pairing or ""]
        table.add_row(Text(_name(line, found)), *map(Text, cells[: len(table.columns) - 1]))
    return table


def _name(line: Line, found: OverSeeds) -> str:
    """The row's name, of a recipe's row with the recipe's name."""
    return f"{line.entry.name}  {line.entry.group.name}" if found.between == "recipes" else line.entry.name


def _interval(one: Interval | None, sign: str = "") -> str:
    if one is None:
        return ""
    show = lambda x: f"{x:{sign}z.3f}"  # noqa: E731
    finite = math.isfinite(one.high - one.low)
    return show(one.mean) + (f" [{show(one.low)}, {show(one.high)}]" if finite else "")


def keys_table(keys: list[tuple[str, list[str]]], labels: list[str]) -> Table:
    """The keys that differ, at least one, with the value of each run or group."""
    table = Table(title="keys that differ", title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("key")
    for label in labels:
        table.add_column(Text(label))
    for key, values in keys:
        table.add_row(Text(key), *map(Text, values))
    return table
