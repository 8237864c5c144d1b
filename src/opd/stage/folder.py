"""One run's folder: its files, and how they survive a kill.

    <run>/recipe.yaml           the resolved recipe of the last start
    <run>/environment.json      versions and hardware of the last process that opened the run, and when the run started
    <run>/inputs.json           fingerprints of rows, models and code at the last start
    <run>/changes.jsonl         accepted changes of recipe and inputs, see `changes.py`
    <run>/report.html           the page of `opd report`, written again at the end of each stage
    <run>/.lock, .holder.json   the process that runs it, see `claim.py`
    <run>/doctor.json           what `opd doctor` found for this recipe, if it ran, see `doctor_file.py`
    <run>/<stage>/metrics.jsonl one line per step; the same recipe on the same machine writes the same bytes
    <run>/<stage>/timings.jsonl wall-clock and CPU seconds of the same steps, which differ between runs
    <run>/<stage>/progress.json what the stage does now, see `progress_file.py`
    <run>/<stage>/keys.json     names that the metrics' names are made of
    <run>/<stage>/samples/step_000012.parquet, held_out_before.parquet    see `columns.py`
    <run>/<stage>/images/       small copies of the images of these rows, see `images.py`
    <run>/<stage>/checkpoints/  see `checkpoint.py`
    <run>/<stage>/done.json     exists once the stage has finished

Whole files are replaced atomically. Lines are appended with one `write` each, so a kill leaves at most one partial last
line, which reading ignores and `rewind` removes. Call `rewind` before continuing a stage. Only one process writes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from opd.errors import ConfigError, RunError
from opd.files import (
    append_line,
    check_finite,
    read_lines,
    read_table,
    refused,
    remove_unfinished,
    write_atomically,
    write_table,
)
from opd.recipe.schema import Recipe
from opd.stage.claim import FolderLock, lock_folder
from opd.stage.columns import full_rows, schema
from opd.stage.images import FOLDER, with_copies
from opd.stage.starting import CHANGES, INPUTS, Inputs, begin, check_place, started_at

_RESERVED = frozenset(
    {"recipe.yaml", "environment.json", "doctor.json", "report.html", INPUTS, CHANGES}
    | {"report_id.txt", "tensorboard", "wandb"}
)


def check_stage_name(name: str) -> None:
    """Refuse a stage name that cannot be a folder of the run. Raises ConfigError."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", name) or name in _RESERVED:
        raise ConfigError(
            f"A stage cannot be named {name!r}: its folder has the same name. Use letters, digits, '_', '-' and "
            f"'.', a letter or digit first, and none of {sorted(_RESERVED)}."
        )


@dataclass(frozen=True, slots=True)
class RunDir:
    """A run's folder. Make it with `RunDir.open`, and close it at the run's end."""

    path: Path
    writes: bool = True
    lock: FolderLock | None = None
    notes: tuple[str, ...] = ()  # a replaced run, accepted changes

    @classmethod
    def open(
        cls,
        path: Path,
        recipe: Recipe,
        inputs: Inputs,
        *,
        accept: bool = False,
        say: Callable[[str], None] = print,
    ) -> RunDir:
        """Start a run in `path`, or continue the run of the same recipe that is there.

        `inputs`: fingerprints by stage and name. A change of recipe or inputs since the last start is
        accepted, refused or needs `accept` by the rules of `changes.py`. The recipe of a run that made no step is
        replaced. `say` gets a line if this waits for the lock.

        Raises:
            RunError: `path` is a file, cannot be written to, holds other files or another run, or is in use. Nothing in
                it is changed.
        """
        try:
            check_place(path)
            path.mkdir(parents=True, exist_ok=True)
            lock = lock_folder(path, say)
            try:
                return cls(path, lock=lock, notes=begin(path, recipe, inputs, accept=accept))
            except BaseException:
                lock.release()
                raise
        except RunError:
            raise
        except OSError as error:
            raise refused(path, error) from error

    def close(self) -> None:
        """Let other processes run it."""
        if self.lock is not None:
            self.lock.release()

    @property
    def started(self) -> datetime:
        """The time at which the run was started first. Chat templates read it."""
        return started_at(self.path)

    def stage(self, name: str) -> StageDir:
        """The folder of one stage, created if needed.

        Raises:
            ConfigError: the name is not allowed. RunError: the folder cannot be created.
        """
        check_stage_name(name)
        stage = StageDir(self.path / name, self.writes)
        if not self.writes:
            return stage
        try:
            stage.samples.mkdir(parents=True, exist_ok=True)
            stage.checkpoints.mkdir(exist_ok=True)
        except OSError as error:
            raise refused(stage.path, error) from error
        return stage


@dataclass(frozen=True, slots=True)
class StageDir:
    """The files of one stage. Make it with `RunDir.stage`."""

    path: Path
    writes: bool = True
    # {"name", "correctness"} of the rewards of training and of evaluations, for the metadata of the files.
    reward: Mapping[str, Any] | None = None
    measured_by: Mapping[str, Any] | None = None
    most_images: int = 0  # different images of a file of responses that have a copy

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def timings(self) -> Path:
        return self.path / "timings.jsonl"

    @property
    def progress(self) -> Path:
        return self.path / "progress.json"

    @property
    def keys(self) -> Path:
        return self.path / "keys.json"

    @property
    def samples(self) -> Path:
        return self.path / "samples"

    @property
    def model(self) -> Path:
        return self.path / "model"

    @property
    def adapter(self) -> Path:
        return self.path / "adapter"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    def of_peer(self, name: str) -> StageDir:
        """The folder of another model of the stage, created if needed: its metrics, timings and responses.

        Checkpoints and the saved model of all are in the stage's own. Raises RunError if it cannot be created.
        """
        peer = StageDir(self.path / "peers" / name, self.writes, self.reward, self.measured_by, self.most_images)
        try:
            if self.writes:
                peer.samples.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise refused(peer.path, error) from error
        return peer

    def append_metrics(self, step: int, metrics: Mapping[str, float]) -> None:
        """Append one line of metrics, which recipe and seed determine.

        Raises:
            TrainingError: a metric is NaN or infinite. RunError: the line could not be written.
        """
        if self.writes:
            append_line(self.metrics, step, metrics)

    def append_timings(self, step: int, timings: Mapping[str, float]) -> None:
        """Append one line of seconds. Raises as `append_metrics` does."""
        if self.writes:
            append_line(self.timings, step, timings)

    def read_metrics(self) -> list[dict[str, Any]]:
        """All complete lines, each with its `step`. Raises RunError if one is damaged or the file cannot be read."""
        return [row for _, row in read_lines(self.metrics)]

    def read_timings(self) -> list[dict[str, Any]]:
        """All complete lines, each with its `step`. Raises RunError as `read_metrics` does."""
        return [row for _, row in read_lines(self.timings)]

    def rewind(self, step: int) -> None:
        """Remove everything after `step`, to continue from its checkpoint; -1 removes everything.

        Raises:
            RunError: a file cannot be read or written, or a complete line is damaged.
        """
        if not self.writes:
            return
        for file in (self.metrics, self.timings):
            if file.exists():
                kept = [line for line, row in read_lines(file) if row["step"] <= step]
                write_atomically(file, b"".join(kept))
        try:
            for file in list(self.samples.iterdir()):
                match = re.fullmatch(r"step_(\d{6,})\.parquet", file.name)
                if match and int(match[1]) > step:
                    file.unlink()
            remove_unfinished(self.path)
            remove_unfinished(self.samples)
        except OSError as error:
            raise refused(self.path, error) from error

    def write_samples(self, step: int, rows: list[dict[str, Any]]) -> Path:
        """One parquet file of a step's responses, with the columns of `columns.COLUMNS`; absent ones are null.

        Raises:
            DataError: a value is not of its column's type.
            RunError: the file could not be written.
        """
        return self._write_rows(self.samples / f"step_{step:06d}.parquet", rows, self.reward)

    def write_held_out(self, when: str, rows: list[dict[str, Any]]) -> Path:
        """The responses of one evaluation, to held_out_<when>.parquet. Raises as `write_samples` does."""
        return self._write_rows(self.path / f"held_out_{when}.parquet", rows, self.measured_by)

    def _write_rows(self, file: Path, rows: list[dict[str, Any]], reward: Mapping[str, Any] | None) -> Path:
        if not self.writes:
            return file
        shown = with_copies(self.path / FOLDER, rows, self.most_images)
        return write_table(file, full_rows(shown), schema(reward))

    def read_samples(self, *, followed: bool = False) -> list[dict[str, Any]]:
        """The responses of the steps in all sample files, each with its `step`, in order.

        `followed`: those to the same held-out prompts at each of these steps, instead. Raises RunError if a file
        cannot be read.
        """
        return [
            {"step": int(file.stem.removeprefix("step_")), **row}
            for file in sorted(self.samples.glob("step_*.parquet"))
            for row in read_table(file)
            if (row.get("pick") == "follow") == followed
        ]

    @property
    def evaluations(self) -> list[str]:
        """Those whose responses are there, as `read_held_out` takes them, by name."""
        return sorted(file.stem.removeprefix("held_out_") for file in self.path.glob("held_out_*.parquet"))

    def read_held_out(self, when: str) -> list[dict[str, Any]]:
        """The responses of one evaluation; empty if there was none. Raises RunError if they cannot be read."""
        file = self.path / f"held_out_{when}.parquet"
        return read_table(file) if file.exists() else []

    def write_keys(self, keys: Mapping[str, Any]) -> None:
        """Write what a reader needs to parse the names of the stage's metrics. Raises RunError if it cannot."""
        if self.writes:
            write_atomically(self.keys, json.dumps(keys, indent=2) + "\n")

    def mark_done(self, summary: Mapping[str, Any]) -> None:
        """Record that the stage has finished.

        Raises:
            TrainingError: a number in `summary` is NaN or infinite. RunError: the file could not be written.
        """
        check_finite("the stage's summary", summary)
        if not self.writes:
            return
        write_atomically(self.path / "done.json", json.dumps(summary, indent=2, sort_keys=True) + "\n")

    def done(self) -> dict[str, Any] | None:
        """The summary of a finished stage, or None. Raises RunError if done.json cannot be read."""
        file = self.path / "done.json"
        try:
            return json.loads(file.read_bytes()) if file.exists() else None
        except (OSError, ValueError) as error:
            raise RunError(f"{file} cannot be read ({error}). Remove it to run the stage again.") from error
