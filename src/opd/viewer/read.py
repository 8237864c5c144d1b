"""A run's folder as plain data: recipe, stages, metrics, and tables of responses of which only some rows are read.

Files of runs at work, of earlier versions and of killed processes are read, too: a half-written last line is left for
the next reading, a damaged line is counted, and a column or a file that is absent is None.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from opd.errors import RunError
from opd.stage.claim import HOLDER

SAMPLES = re.compile(r"step_(\d{6,})\.parquet")
HELD_OUT = re.compile(r"held_out_(\w+)\.parquet")


@dataclass(slots=True)
class LineReader:
    """New complete lines of a file of JSON objects, from where the last reading ended.

    `starts` counts how often the reading began at the first byte: again when a resumed run has replaced the file by a
    shorter one. `damaged` counts complete lines that are no JSON object.
    """

    path: Path
    offset: int = 0
    starts: int = 1
    damaged: int = 0
    _file: int | None = None  # the inode, which changes when the file is replaced

    def read(self) -> list[dict[str, Any]]:
        """The lines that were completed since the last call, in order; all of them if `starts` has grown.

        A missing file has no lines. Raises RunError if the file cannot be read.
        """
        try:
            with self.path.open("rb") as file:
                status = self.path.stat()
                if status.st_size < self.offset or (self._file not in (None, status.st_ino) and self.offset):
                    self.offset, self.damaged = 0, 0
                    self.starts += 1
                self._file = status.st_ino
                file.seek(self.offset)
                data = file.read()
        except FileNotFoundError:
            return []
        except OSError as error:
            raise _unreadable(self.path, error) from error
        whole = data[: data.rfind(b"\n") + 1]
        self.offset += len(whole)
        rows = [_object(line) for line in whole.splitlines()]
        self.damaged += sum(row is None for row in rows)
        return [row for row in rows if row is not None]


@dataclass(frozen=True, slots=True)
class Columns:
    """Some rows of a Parquet file, kept as Arrow columns. `names` are the columns that the file has."""

    table: pa.Table
    names: tuple[str, ...]
    metadata: dict[str, Any] = field(default_factory=dict)  # {"format": 2, "library": ..., "reward": ...}
    stage: Path | None = None  # the folder of the stage that wrote it

    def __len__(self) -> int:
        return self.table.num_rows

    def has(self, name: str) -> bool:
        """Whether the column was read and holds a value in any row."""
        return name in self.table.column_names and self.table[name].null_count < len(self)

    def values(self, name: str) -> list[Any]:
        """One Python value per row, None for null and for a column that is absent."""
        return self.table[name].to_pylist() if name in self.table.column_names else [None] * len(self)

    def value(self, name: str, row: int) -> Any:
        """A row's value as Python's; None for null and for a column that is absent."""
        return self.table[name][row].as_py() if name in self.table.column_names else None

    def numbers(self, name: str, row: int) -> np.ndarray | None:
        """A row's list of numbers, [T] float64 with NaN for null; None for null and for a column that is absent."""
        if name not in self.table.column_names or not (one := self.table[name][row]).is_valid:
            return None
        return as_numbers(one.values)

    def lengths(self, name: str) -> np.ndarray:
        """The lengths of the lists of a column, [rows] int64; 0 for null and for a column that is absent."""
        if name not in self.table.column_names:
            return np.zeros(len(self), dtype=np.int64)
        offsets = [np.diff(as_numbers(chunk.offsets)) for chunk in self.table[name].chunks]
        return np.concatenate([np.zeros(0, dtype=np.int64), *offsets]).astype(np.int64)

    def take(self, rows: Sequence[int]) -> Columns:
        """The rows at these places, in this order."""
        return replace(self, table=self.table.take(pa.array(list(rows), type=pa.int64())))


def as_numbers(array: pa.Array) -> np.ndarray:
    """An Arrow array of numbers or booleans as float64, NaN for null. `to_numpy` would import pandas: a second."""
    validity, data = array.buffers()
    first, end = array.offset, array.offset + len(array)
    if pa.types.is_boolean(array.type):
        values = _bits(data, end)[first:].astype(np.float64)
    else:
        values = (
            np.frombuffer(data, array.type.to_pandas_dtype(), end)[first:].astype(np.float64) if end else np.zeros(0)
        )
    if array.null_count:
        values[_bits(validity, end)[first:] == 0] = np.nan
    return values


def _bits(buffer: Any, count: int) -> np.ndarray:
    """The first bits of a buffer, [count]."""
    return np.unpackbits(np.frombuffer(buffer, np.uint8), count=count, bitorder="little")


def read_columns(
    file: Path, columns: Sequence[str] | None = None, rows: Sequence[int] | None = None, stage: Path | None = None
) -> Columns | None:
    """Some columns (default: all) and rows (default: all) of a Parquet file of a stage; None for a missing file.

    Columns that the file does not have are left out. Raises RunError if the file cannot be read.
    """
    try:
        with pq.ParquetFile(file) as opened:
            schema = opened.schema_arrow
            wanted = [name for name in schema.names if columns is None or name in columns]
            table = opened.read(columns=wanted)
    except FileNotFoundError:
        return None
    except (OSError, pa.ArrowException) as error:
        raise _unreadable(file, error) from error
    found = Columns(table, tuple(schema.names), _object((schema.metadata or {}).get(b"opd", b"")) or {}, stage)
    return found if rows is None else found.take(rows)


@dataclass(slots=True)
class StageView:
    """One stage of a run. What can grow while the run works is read again by `refresh`."""

    name: str
    path: Path
    spec: dict[str, Any]  # of the resolved recipe
    metrics: list[dict[str, Any]] = field(default_factory=list)
    timings: list[dict[str, Any]] = field(default_factory=list)
    keys: dict[str, Any] | None = None  # keys.json
    progress: dict[str, Any] | None = None  # progress.json, of a peer that of its stage
    done: dict[str, Any] | None = None  # done.json, of a peer that of its stage
    held: bool = False  # whether a process has the run's folder, or was killed while it had it
    _lines: dict[str, LineReader] = field(default_factory=dict)

    def refresh(self) -> bool:
        """Read what is new; whether the metrics began again, because a resumed run removed their last lines."""
        again = False
        for name, rows in (("metrics", self.metrics), ("timings", self.timings)):
            reader = self._lines.setdefault(name, LineReader(self.path / f"{name}.jsonl"))
            starts = reader.starts
            new = reader.read()
            if reader.starts != starts:
                rows.clear()
                again = again or name == "metrics"
            rows.extend(row for row in new if "step" in row)
        self.keys = self.keys or read_object(self.path / "keys.json")
        whole = self.path.parents[1] if "/" in self.name else self.path  # of a peer, STAGE/peers/MODEL
        self.progress, self.done = read_object(whole / "progress.json"), read_object(whole / "done.json")
        self.held = (whole.parent / HOLDER).exists()
        return again

    @property
    def damaged(self) -> int:
        """How many complete lines of its files are no JSON object."""
        return sum(reader.damaged for reader in self._lines.values())

    @property
    def steps_done(self) -> int:
        """The number of the last step that was made; 0 before the first."""
        return max((int(row["step"]) for row in self.metrics), default=0)

    @property
    def sample_steps(self) -> list[int]:
        """The steps that have a file of responses, in order."""
        return sorted(_matches(self.path / "samples", SAMPLES))

    @property
    def whens(self) -> list[str]:
        """The evaluations that have a file of responses: before, teacher, then step_000016 and so on."""
        first = {"before": 0, "teacher": 1}
        found = [found[1] for file in _files(self.path) if (found := HELD_OUT.fullmatch(file.name))]
        return sorted(found, key=lambda when: (first.get(when, 2), when))

    def samples(
        self, step: int, columns: Sequence[str] | None = None, rows: Sequence[int] | None = None
    ) -> Columns | None:
        """The responses of a step, as `read_columns`."""
        return read_columns(self.path / "samples" / f"step_{step:06d}.parquet", columns, rows, self.path)

    def held_out(
        self, when: str, columns: Sequence[str] | None = None, rows: Sequence[int] | None = None
    ) -> Columns | None:
        """The responses of an evaluation, one of `whens`, as `read_columns`."""
        return read_columns(self.path / f"held_out_{when}.parquet", columns, rows, self.path)


@dataclass(frozen=True, slots=True)
class RunView:
    """A run's folder. `stages` holds those that have begun; another model of a stage is STAGE/MODEL."""

    path: Path
    recipe: dict[str, Any]
    recipe_text: str
    environment: dict[str, Any]
    doctor: Any  # what `opd doctor --json` printed, or None
    stages: dict[str, StageView]
    recipe_written: int = 0  # when, in nanoseconds

    @property
    def name(self) -> str:
        """The recipe's name, or that of the folder."""
        return str(self.recipe.get("name") or self.path.resolve().name)


def read_run(path: str | Path) -> RunView:
    """Read a run's folder; the tables of responses are read when they are used.

    Raises:
        RunError: there is no run at `path`, or its recipe cannot be read.
    """
    folder = Path(path)
    file = folder / "recipe.yaml"
    try:
        written = _written(file)
        text = file.read_text(encoding="utf-8")
        recipe = yaml.safe_load(text)
    except FileNotFoundError:
        raise RunError(
            f"{folder} is no run's folder: it has no recipe.yaml. Give the folder that `opd train` wrote, "
            "for example runs/quickstart."
        ) from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise _unreadable(file, error) from error
    if not isinstance(recipe, dict):
        raise RunError(f"{file} is no recipe: it holds {type(recipe).__name__}, not keys and values.")
    return RunView(
        path=folder,
        recipe=recipe,
        recipe_text=text,
        environment=read_object(folder / "environment.json") or {},
        doctor=read_object(folder / "doctor.json"),
        stages=_stages(folder, recipe, {}),
        recipe_written=written,
    )


def read_again(run: RunView) -> RunView:
    """The run with what is new: lines since the last reading, and stages that began. Raises as `read_run`.

    A recipe that was replaced, by a run that goes on with other settings, is read with everything else.
    """
    if _written(run.path / "recipe.yaml") != run.recipe_written:
        return read_run(run.path)
    for stage in run.stages.values():
        stage.refresh()
    return replace(run, stages=_stages(run.path, run.recipe, run.stages))


def read_object(file: Path) -> Any:
    """A file's JSON object; None for a missing file and for one that is no JSON object."""
    try:
        return _object(file.read_bytes())
    except OSError:
        return None


def _stages(folder: Path, recipe: dict[str, Any], known: Mapping[str, StageView]) -> dict[str, StageView]:
    """The stages that have begun, in the recipe's order: those that are `known`, and others, which are read.

    A new dictionary: another thread may be using the old one.
    """
    stages: dict[str, StageView] = {}
    for spec in recipe.get("stages") or []:
        for name, place in _models(folder, spec):
            if name in known:
                stages[name] = known[name]
            elif (place / "metrics.jsonl").exists() or (place / "progress.json").exists():
                stages[name] = StageView(name, place, spec)
                stages[name].refresh()
    return stages


def _written(file: Path) -> int:
    """When a file was written, in nanoseconds; 0 for a missing one."""
    try:
        return file.stat().st_mtime_ns
    except FileNotFoundError:
        return 0


def _models(folder: Path, spec: dict[str, Any]) -> list[tuple[str, Path]]:
    """The folders of a stage's models: its own, and one for each other model that it trains."""
    name = str(spec.get("name"))
    return [(name, folder / name)] + [
        (f"{name}/{peer}", folder / name / "peers" / str(peer)) for peer in spec.get("peers") or []
    ]


def _files(folder: Path) -> list[Path]:
    return list(folder.iterdir()) if folder.is_dir() else []


def _matches(folder: Path, pattern: re.Pattern[str]) -> list[int]:
    return [int(found[1]) for file in _files(folder) if (found := pattern.fullmatch(file.name))]


def _object(data: bytes) -> dict[str, Any] | None:
    try:
        value = json.loads(data)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


def _unreadable(path: Path, error: Exception) -> RunError:
    why = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return RunError(f"{path} cannot be read ({why}). Check that it is the file of a run, and that you may read it.")
