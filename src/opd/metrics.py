"""Numbers of a step with the way they are put together, the lines they are kept in, and the one writer to trackers.

A metric is a mean, a sum, a maximum, a minimum or a single value, and says so when it is recorded: micro-batches and
processes then combine to the same number however the batch was split. What is none of these, such as a percentile, is
made at the end from rows that all of them hand in. Names are `namespace/name`.
"""

from __future__ import annotations

import importlib
import math
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np

from opd.errors import ConfigError, nearest

Kind: TypeAlias = Literal["mean", "sum", "max", "min", "value"]
Columns: TypeAlias = Mapping[str, np.ndarray]  # of equal length: a row is one token, or one response
Summary: TypeAlias = Callable[[Columns], dict[str, float]]


class Metrics:
    """Collects the numbers of one step, from any number of micro-batches and processes."""

    def __init__(self) -> None:
        self._entries: dict[str, tuple[Kind, float, float]] = {}
        self._rows: dict[Summary, list[dict[str, np.ndarray]]] = {}

    def mean(self, name: str, total: float, count: float) -> None:
        """A weighted mean: the sum of all totals over the sum of all counts. Left out while that count is 0."""
        assert count >= 0, f"{name}: a mean over {count} things"
        self._add(name, "mean", float(total), float(count))

    def sum(self, name: str, value: float) -> None:
        """The sum of all values."""
        self._add(name, "sum", float(value))

    def max(self, name: str, value: float) -> None:
        """The largest value; NaN wins, so that it is seen."""
        self._add(name, "max", float(value))

    def min(self, name: str, value: float) -> None:
        """The smallest value; NaN wins, so that it is seen."""
        self._add(name, "min", float(value))

    def value(self, name: str, value: float) -> None:
        """A scalar of the whole step, known in one place and set once."""
        self._add(name, "value", float(value))

    def rows(self, summary: Summary, **columns: Sequence[float] | np.ndarray) -> None:
        """Rows from which `summary` makes names and numbers once all rows of the step are there.

        It gets them sorted, so that what it makes does not depend on who had which. It is a function of a module:
        processes send it to each other. Nothing is made of no rows.
        """
        arrays = {name: np.asarray(column) for name, column in columns.items()}
        assert len({array.shape for array in arrays.values()}) == 1, "columns of one table have one length"
        self._rows.setdefault(summary, []).append(arrays)

    def merge(self, other: Metrics) -> None:
        """Take in another micro-batch's or process's numbers."""
        for name, (kind, number, count) in other._entries.items():
            self._add(name, kind, number, count)
        for summary, tables in other._rows.items():
            self._rows.setdefault(summary, []).extend(tables)

    def reduce(self) -> dict[str, float]:
        """One number a name, sorted by name."""
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
    """The numbers of several processes, put together."""
    whole = Metrics()
    for part in parts:
        whole.merge(part)
    return whole


def _sorted_rows(tables: Sequence[Columns]) -> dict[str, np.ndarray]:
    """All rows of several tables, in the order of their values, the first column first."""
    joined = {name: np.concatenate([table[name] for table in tables]) for name in tables[0]}
    order = np.lexsort(list(joined.values())[::-1])
    return {name: column[order] for name, column in joined.items()}


def _combined(kind: Kind, a: float, b: float) -> float:
    if kind in ("mean", "sum"):
        return a + b
    if math.isnan(a) or math.isnan(b):
        return math.nan
    return max(a, b) if kind == "max" else min(a, b)


@dataclass(frozen=True, slots=True)
class _Tracker:
    log: Callable[[str, int, Mapping[str, float]], None]
    close: Callable[[], None]


def check_report_to(report_to: Iterable[str]) -> None:
    """Fail before any weight is loaded if a tracker cannot be used. Does not open it.

    Raises:
        ConfigError: an unknown name, a name that comes twice, or a package that is not installed.
    """
    names = list(report_to)
    for name in names:
        if name not in _TRACKERS:
            raise ConfigError(f"report_to: {name!r} is unknown.{nearest(name, _TRACKERS)} Known: {sorted(_TRACKERS)}.")
        if names.count(name) > 1:
            raise ConfigError(f"report_to names {name!r} twice. Every point would be written twice; name it once.")
        module, _ = _TRACKERS[name]
        try:
            if importlib.import_module(module).__file__ is None:
                raise ImportError(f"only a folder named {name} without code is found")  # such as ./wandb, of past runs
        except ImportError as error:
            raise ConfigError(
                f"report_to: {name} cannot be imported ({error}). Install it with: pip install 'opd[report]' "
                f"or leave {name!r} out: metrics.jsonl is written in any case."
            ) from error


class ReportWriter:
    """Sends metrics to trackers; with an empty `report_to` it does nothing and imports nothing.

    `folder` is the run's folder: TensorBoard's event files are written to `folder/tensorboard`, one TensorBoard run a
    stage; wandb's local files to `folder/wandb`; trackio keeps its own database (`TRACKIO_DIR`). wandb and trackio
    see `stage/namespace/name`. A resumed run continues the same wandb and trackio run; the steps since the last
    checkpoint are sent again, with the same numbers. With several processes, only one makes a writer.

    Raises:
        ConfigError: see `check_report_to`; also when wandb refuses to start (not logged in, no network).
    """

    def __init__(
        self,
        report_to: Iterable[str],
        *,
        folder: Path,
        name: str,
        project: str = "opd",
        config: Mapping[str, Any] | None = None,
    ) -> None:
        names = list(report_to)
        check_report_to(names)
        if names:
            folder.mkdir(parents=True, exist_ok=True)
        self._trackers = [_TRACKERS[tracker][1](folder, name, project, dict(config or {})) for tracker in names]

    def log(self, stage: str, step: int, metrics: Mapping[str, float]) -> None:
        """One point a metric, at this step of this stage."""
        for tracker in self._trackers:
            tracker.log(stage, step, metrics)

    def close(self) -> None:
        """Flush and finish; a second call does nothing."""
        trackers, self._trackers = self._trackers, []
        for tracker in trackers:
            tracker.close()


def _run_id(folder: Path) -> str:
    """A name that outlives this process: a resumed run goes on in the same curve, a new folder starts another."""
    file = folder / "report_id.txt"
    if not file.exists():
        file.write_text(uuid.uuid4().hex[:8] + "\n")
    return file.read_text().strip()


def _tensorboard(folder: Path, *_: Any) -> _Tracker:
    from torch.utils.tensorboard import SummaryWriter

    writers: dict[str, SummaryWriter] = {}

    def log(stage: str, step: int, metrics: Mapping[str, float]) -> None:
        if stage not in writers:
            # purge_step hides what an interrupted process wrote after the checkpoint that this one started from.
            writers[stage] = SummaryWriter(str(folder / "tensorboard" / stage), purge_step=step)
        for name, value in metrics.items():
            writers[stage].add_scalar(name, value, step)

    def close() -> None:
        for writer in writers.values():
            writer.close()

    return _Tracker(log, close)


def _wandb(folder: Path, name: str, project: str, config: dict[str, Any]) -> _Tracker:
    import wandb  # pyright: ignore[reportMissingImports]

    # A run that the caller opened is theirs: it is written to and left open.
    theirs = wandb.run
    home = str(folder.absolute())
    try:
        open_run = theirs or wandb.init(
            project=project, name=name, id=_run_id(folder), resume="allow", dir=home, config=config
        )
    except wandb.Error as error:
        raise ConfigError(
            f"report_to: wandb did not start a run ({error}). Log in with `wandb login`, set WANDB_MODE=offline to "
            "record on this machine only, or leave 'wandb' out of report_to."
        ) from error
    stages: set[str] = set()

    def log(stage: str, step: int, metrics: Mapping[str, float]) -> None:
        # wandb drops points whose `step=` is below an earlier one, as a second stage's and a resumed run's are;
        # an axis of its own for every stage has no such rule.
        if stage not in stages:
            open_run.define_metric(f"{stage}/step")
            open_run.define_metric(f"{stage}/*", step_metric=f"{stage}/step")
            stages.add(stage)
        open_run.log({f"{stage}/step": step, **{f"{stage}/{name}": value for name, value in metrics.items()}})

    def close() -> None:
        if theirs is None:
            open_run.finish()

    return _Tracker(log, close)


def _trackio(folder: Path, name: str, project: str, config: dict[str, Any]) -> _Tracker:
    import trackio  # pyright: ignore[reportMissingImports]

    # trackio knows a run by its name, so the name has to be this folder's own.
    open_run = trackio.init(project=project, name=f"{name}-{_run_id(folder)}", config=config, resume="allow")

    def log(stage: str, step: int, metrics: Mapping[str, float]) -> None:
        open_run.log({f"{stage}/{name}": value for name, value in metrics.items()}, step=step)

    return _Tracker(log, open_run.finish)


_TRACKERS: dict[str, tuple[str, Callable[[Path, str, str, dict[str, Any]], _Tracker]]] = {
    "tensorboard": ("torch.utils.tensorboard", _tensorboard),
    "wandb": ("wandb", _wandb),
    "trackio": ("trackio", _trackio),
}
