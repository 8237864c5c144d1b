"""The metrics of a step, combined over micro-batches and processes.

A metric is recorded as a mean, a sum, a maximum or a single value, so that the result does not depend on how the batch
was split. Other metrics, such as percentiles, are computed at the end of the step from the rows of all processes. Names
are `namespace/name`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Literal, TypeAlias

import numpy as np

Kind: TypeAlias = Literal["mean", "sum", "max", "value"]


Columns: TypeAlias = Mapping[str, np.ndarray]  # of equal length: a row is one token, or one response


Summary: TypeAlias = Callable[[Columns], dict[str, float]]


class Metrics:
    """The metrics of one step, from any number of micro-batches and processes."""

    def __init__(self) -> None:
        self._entries: dict[str, tuple[Kind, float, float]] = {}
        self._rows: dict[Summary, list[dict[str, np.ndarray]]] = {}

    def mean(self, name: str, total: float, count: float) -> None:
        """A weighted mean: sum of totals / sum of counts. Left out if the sum of counts is 0."""
        assert count >= 0, f"{name}: a mean over {count} things"
        self._add(name, "mean", float(total), float(count))

    def sum(self, name: str, value: float) -> None:
        """The sum of all values."""
        self._add(name, "sum", float(value))

    def max(self, name: str, value: float) -> None:
        """The largest value; NaN if any value is NaN."""
        self._add(name, "max", float(value))

    def value(self, name: str, value: float) -> None:
        """A scalar of the whole step, set once, by one process."""
        self._add(name, "value", float(value))

    def rows(self, summary: Summary, **columns: Sequence[float] | np.ndarray) -> None:
        """Rows for `summary`, which computes metrics by name from all rows of the step.

        `summary` gets the rows sorted, so that the result does not depend on their order or process. It must be a
        module-level function, because processes pickle it. It is not called without rows.
        """
        arrays = {name: np.asarray(column) for name, column in columns.items()}
        assert len({array.shape for array in arrays.values()}) == 1, "columns of one table have one length"
        self._rows.setdefault(summary, []).append(arrays)

    def merge(self, other: Metrics) -> None:
        """Add the numbers of another micro-batch or process."""
        for name, (kind, number, count) in other._entries.items():
            self._add(name, kind, number, count)
        for summary, tables in other._rows.items():
            self._rows.setdefault(summary, []).extend(tables)

    def under(self, prefix: str) -> Metrics:
        """The same numbers as `prefix` + name. For metrics without rows."""
        assert not self._rows, "a summary of rows names its own metrics"
        out = Metrics()
        out._entries = {prefix + name: entry for name, entry in self._entries.items()}
        return out

    def reduce(self) -> dict[str, float]:
        """One number per name, sorted by name."""
        numbers = {
            name: number / count if kind == "mean" else number
            for name, (kind, number, count) in self._entries.items()
            if kind != "mean" or count > 0
        }
        for summary, tables in self._rows.items():
            columns = _sorted_rows(tables)
            made = summary(columns) if len(next(iter(columns.values()))) else {}
            assert not made.keys() & numbers.keys(), f"recorded twice: {made.keys() & numbers.keys()}"
            numbers |= made
        return dict(sorted(numbers.items()))

    def _add(self, name: str, kind: Kind, number: float, count: float = 0.0) -> None:
        assert "/" in name.strip("/"), f"metric {name!r} is not named `namespace/name`"
        if name not in self._entries:
            self._entries[name] = (kind, number, count)
            return
        known, before, counted = self._entries[name]
        assert known == kind, f"metric {name!r} is a {known} and was also recorded as a {kind}"
        assert kind != "value", f"metric {name!r} is one value of the step and was set a second time"
        self._entries[name] = (kind, _combined(kind, before, number), counted + count)


def merged(parts: Iterable[Metrics]) -> Metrics:
    """The metrics of several processes, combined."""
    whole = Metrics()
    for part in parts:
        whole.merge(part)
    return whole


def _sorted_rows(tables: Sequence[Columns]) -> dict[str, np.ndarray]:
    """All rows of several tables, sorted by value, the first column first."""
    joined = {name: np.concatenate([table[name] for table in tables]) for name in tables[0]}
    order = np.lexsort(list(joined.values())[::-1])
    return {name: column[order] for name, column in joined.items()}


def _combined(kind: Kind, a: float, b: float) -> float:
    if kind in ("mean", "sum"):
        return a + b
    if math.isnan(a) or math.isnan(b):
        return math.nan
    return max(a, b)
