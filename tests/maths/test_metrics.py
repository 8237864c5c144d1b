"""Metrics combine to the same number however a batch is split."""

from __future__ import annotations

import math
import pickle
import re
from collections.abc import Callable
from typing import Any

import pytest

from opd.maths.metrics import Metrics, merged


def test_metrics_mean_equals_totals_over_counts():
    metrics = Metrics()
    metrics.mean("train/loss", 10.0, 4)
    metrics.mean("train/loss", 2.0, 8)
    assert metrics.reduce() == {"train/loss": 1.0}  # a mean of means would be 1.375


def test_metrics_reduce_gives_every_kind_with_sorted_names():
    metrics = Metrics()
    for value in (3.0, 1.0, 2.0):
        metrics.sum("z/sum", value)
        metrics.max("b/max", value)
    metrics.value("optim/learning_rate", 1e-5)
    reduced = metrics.reduce()
    assert reduced == {"b/max": 3.0, "optim/learning_rate": 1e-5, "z/sum": 6.0}
    assert list(reduced) == sorted(reduced)


def test_metrics_merge_equals_recording_in_one():
    numbers = [(1.5, 2.0), (-4.0, 3.0), (0.5, 1.0), (8.0, 5.0)]
    whole, parts = Metrics(), [Metrics(), Metrics(), Metrics()]
    for i, (total, count) in enumerate(numbers):
        for metrics in (whole, parts[i % 2]):
            metrics.mean("a/mean", total, count)
            metrics.sum("a/sum", total)
            metrics.max("a/max", total)
    parts[0].value("a/value", 7.0)
    whole.value("a/value", 7.0)
    merged = Metrics()
    for part in parts:
        merged.merge(part)
    assert merged.reduce() == whole.reduce()
    assert parts[1].reduce()["a/sum"] == 4.0  # merging leaves the part alone


def test_metrics_mean_is_absent_when_count_is_zero():
    metrics = Metrics()
    metrics.mean("support/mass", 0.0, 0)
    assert metrics.reduce() == {}
    metrics.mean("support/mass", 3.0, 2)
    assert metrics.reduce() == {"support/mass": 1.5}


def spread_of(columns):
    return {"a/spread": float(columns["x"].max() - columns["x"].min()), "a/first": float(columns["y"][0])}


def test_metrics_rows_are_summarised_after_merge():
    whole, parts = Metrics(), [Metrics(), Metrics(), Metrics()]
    rows = [(3.0, 1.0), (1.0, 2.0), (7.0, 0.0), (1.0, -5.0)]
    whole.rows(spread_of, x=[x for x, _ in rows], y=[y for _, y in rows])
    for i, (x, y) in enumerate(reversed(rows)):
        parts[i % 2].rows(spread_of, x=[x], y=[y])
    for part in parts:
        part.mean("a/mean", 1.0, 1)
    together = merged(pickle.loads(pickle.dumps(parts))).reduce()
    # Rows are sorted by their columns in turn: the first one is (1, -5).
    assert together == {"a/first": -5.0, "a/mean": 1.0, "a/spread": 6.0}
    assert {name: together[name] for name in whole.reduce()} == whole.reduce()
    assert list(together) == sorted(together)


def test_metrics_rows_give_no_number_when_empty():
    metrics = Metrics()
    metrics.rows(spread_of, x=[], y=[])
    assert metrics.reduce() == {}
    metrics.rows(spread_of, x=[1.0], y=[2.0])
    assert metrics.reduce() == {"a/first": 2.0, "a/spread": 0.0}


def test_metrics_rows_raise_assertion_when_misused():
    metrics = Metrics()
    with pytest.raises(AssertionError, match="columns of one table have one length"):
        metrics.rows(spread_of, x=[1.0], y=[])
    metrics.rows(spread_of, x=[1.0], y=[1.0])
    metrics.sum("a/first", 1.0)
    with pytest.raises(AssertionError, match=r"recorded twice: {'a/first'}"):
        metrics.reduce()


@pytest.mark.parametrize("order", [(math.nan, 1.0), (1.0, math.nan)])
def test_metrics_max_keeps_nan(order):
    metrics = Metrics()
    for value in order:
        metrics.max("a/max", value)
    assert all(math.isnan(value) for value in metrics.reduce().values())


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (lambda m: (m.sum("a/b", 1), m.max("a/b", 1)), "metric 'a/b' is a sum and was also recorded as a max"),
        (
            lambda m: (m.value("a/b", 1), m.value("a/b", 1)),
            "metric 'a/b' is one value of the step and was set a second",
        ),
        (lambda m: m.sum("loss", 1), "metric 'loss' is not named `namespace/name`"),
        (lambda m: m.sum("/loss", 1), "metric '/loss' is not named"),
        (lambda m: m.mean("a/b", 1, -1), "a/b: a mean over -1 things"),
    ],
)
def test_metrics_raise_assertion_when_misused(record: Callable[[Metrics], Any], message: str):
    with pytest.raises(AssertionError, match=re.escape(message)):
        record(Metrics())


def test_metrics_merge_raises_assertion_when_value_is_set_twice():
    left, right = Metrics(), Metrics()
    left.value("a/b", 1)
    right.value("a/b", 1)
    with pytest.raises(AssertionError, match="set a second time"):
        left.merge(right)
