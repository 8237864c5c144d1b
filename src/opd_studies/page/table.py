"""What of a study's table is drawn: its settings in groups, its columns with intervals, and the highest number."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

NUMBER = r"-?\d+(?:\.\d+)?(?:e[+-]?\d+)?"
INTERVAL = re.compile(rf"({NUMBER}) \[({NUMBER}), ({NUMBER})\]")
SHARE = re.compile(r"accuracy|share|coverage|both|tasks")  # columns whose numbers are from 0 to 1
REFERENCES = ("start", "teacher", "base", "student before")  # rows to compare the others with
PANELS = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One setting: its group, its name, and its number and interval in each drawn column."""

    group: str
    name: str
    values: tuple[tuple[float, float, float] | None, ...]  # mean, low, high

    @property
    def reference(self) -> bool:
        """Whether the row is the student before, or a teacher."""
        return self.name.startswith(REFERENCES)


@dataclass(frozen=True, slots=True, kw_only=True)
class Shown:
    """The columns and rows of a table that are drawn."""

    columns: tuple[str, ...]
    rows: tuple[Row, ...]


def shown(table: Sequence[Sequence[str]]) -> Shown | None:
    """What of a table of settings is drawn: the columns with intervals, shares first, and the divergence.

    None for another table, and for one without intervals of a share.
    """
    if not table or table[0][0] != "setting":
        return None
    header, *rows = table
    labels = [i for i in range(len(header)) if not any(_value(one[i]) for one in rows if one[i])][:2]
    measured = [i for i in range(len(header)) if any(INTERVAL.fullmatch(one[i]) for one in rows)]
    measured.sort(key=lambda i: SHARE.search(header[i]) is None)
    if not measured or SHARE.search(header[measured[0]]) is None:
        return None
    columns = [*measured, *(i for i, name in enumerate(header) if name == "KL" and i not in measured)][:PANELS]
    rate = header.index("learning rate") if "learning rate" in header else None
    made: list[Row] = []
    for one in rows:
        group, name = _named([one[i] for i in labels], one[rate] if rate is not None else "")
        made.append(Row(group=group, name=name, values=tuple(_value(one[i]) for i in columns)))
    return Shown(columns=tuple(header[i] for i in columns), rows=tuple(made))


def _named(labels: list[str], rate: str) -> tuple[str, str]:
    """The group of a row, and its name in it."""
    more = f", rate {rate}" if rate else ""
    if len(labels) == 2:
        return labels[0], labels[1] + more
    group, colon, name = labels[0].partition(": ")
    if colon and len(group) < 12:
        return group, name + more
    return labels[0].partition(",")[0], labels[0] + more


def _value(cell: str) -> tuple[float, float, float] | None:
    """The number of a cell with its interval; of a number alone, the number three times."""
    if found := INTERVAL.fullmatch(cell):
        return float(found[1]), float(found[2]), float(found[3])
    if re.fullmatch(NUMBER, cell):
        return float(cell), float(cell), float(cell)
    return None


def finding(of: Shown) -> str:
    """What the first column shows: the setting with the highest number, in each group that has a name of one letter."""
    settings = [one for one in of.rows if not one.reference and one.values[0] is not None]
    groups = {one.group: [] for one in settings} if all(len(one.group) == 1 for one in of.rows) else {"": settings}
    for one in settings:
        if one.group in groups:
            groups[one.group].append(one)
    best = [(name, max(inside, key=lambda row: row.values[0] or (0.0,))) for name, inside in groups.items()]
    said = [f"{row.name} ({(row.values[0] or (0.0,))[0]:g}){f' in {name}' if name else ''}" for name, row in best]
    return f"Highest {of.columns[0]}: {', '.join(said)}"
