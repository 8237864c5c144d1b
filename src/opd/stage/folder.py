"""One run's folder: its files, and how they survive a kill.

    <run>/recipe.yaml           the resolved recipe; the run's identity
    <run>/environment.json      versions and hardware of the last process that opened the run, and when the run started
    <run>/.lock                 held by the process that runs it
    <run>/<stage>/metrics.jsonl one line per step; the same recipe on the same machine writes the same bytes
    <run>/<stage>/timings.jsonl wall-clock and CPU seconds of the same steps, which differ between runs
    <run>/<stage>/samples/step_000012.parquet
    <run>/<stage>/checkpoints/  see `checkpoint.py`
    <run>/<stage>/done.json     exists once the stage has finished

Whole files are replaced atomically. Lines are appended with one `write` each, so a kill leaves at most one partial last
line, which reading ignores and `rewind` removes. Call `rewind` before continuing a stage. Only one process writes.
"""

from __future__ import annotations

import difflib
import json
import os
import platform
import re
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from filelock import BaseFileLock

from opd.errors import ConfigError, RunError
from opd.files import append_line, check_finite, read_lines, read_table, refused, write_atomically, write_table
from opd.stage.claim import LOCK, clear, lock_folder, made_progress

_RESERVED = frozenset({"recipe.yaml", "environment.json", "report_id.txt", "tensorboard", "wandb"})


_DIFF_LINES = 12


def check_stage_name(name: str) -> None:
    """Refuse a stage name that cannot be a folder of the run. Raises ConfigError."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", name) or name in _RESERVED:
        raise ConfigError(
            f"A stage cannot be named {name!r}: its folder has the same name. Use letters, digits, '_', '-' and "
            f"'.', a letter or digit first, and none of {sorted(_RESERVED)}."
        )


@dataclass(frozen=True, slots=True)
class RunDir:
    """A run's folder. Make it with `RunDir.open`."""

    path: Path
    writes: bool = True
    replaced: bool = False  # whether another recipe's run without a step was here
    lock: BaseFileLock | None = None

    @classmethod
    def open(cls, path: Path, recipe_yaml: str) -> RunDir:
        """Start a run in `path`, or continue an existing run with the same recipe text.

        The recipe of a run that made no step is replaced, unless another process is running it.

        Raises:
            RunError: `path` is a file, cannot be written to, or holds another run or other files. Nothing in it is
                changed.
        """
        try:
            lock = lock_folder(path) if (path / "recipe.yaml").exists() else None
            continues = _holds_this_run(path, recipe_yaml, free=lock is not None)
            replaced = not continues and (path / "recipe.yaml").exists()
            path.mkdir(parents=True, exist_ok=True)
            lock = lock or lock_folder(path)
            _remove_unfinished(path)
            if replaced:
                clear(path)
        except RunError:
            raise
        except OSError as error:
            raise refused(path, error) from error
        if not continues:
            write_atomically(path / "recipe.yaml", recipe_yaml)
        started = _started(path) if continues else datetime.now()
        write_atomically(path / "environment.json", json.dumps(_environment(started), indent=2) + "\n")
        return cls(path, replaced=replaced, lock=lock)

    @property
    def started(self) -> datetime:
        """The time at which the run was started first. Chat templates read it."""
        return _started(self.path)

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

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def timings(self) -> Path:
        return self.path / "timings.jsonl"

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
            _remove_unfinished(self.path)
            _remove_unfinished(self.samples)
        except OSError as error:
            raise refused(self.path, error) from error

    def write_samples(self, step: int, rows: list[dict[str, Any]]) -> Path:
        """One parquet file of a step's responses. Every row has the same keys.

        Raises:
            DataError: the values of a column have no common type.
            RunError: the file could not be written.
        """
        file = self.samples / f"step_{step:06d}.parquet"
        return write_table(file, rows) if self.writes else file

    def write_held_out(self, when: str, rows: list[dict[str, Any]]) -> Path:
        """The responses of one evaluation, to held_out_<when>.parquet. Raises as `write_samples` does."""
        file = self.path / f"held_out_{when}.parquet"
        return write_table(file, rows) if self.writes else file

    def read_samples(self) -> list[dict[str, Any]]:
        """The rows of all sample files, each with its `step`, in order."""
        return [
            {"step": int(file.stem.removeprefix("step_")), **row}
            for file in sorted(self.samples.glob("step_*.parquet"))
            for row in read_table(file)
        ]

    def read_held_out(self, when: str) -> list[dict[str, Any]]:
        """The responses of one evaluation; empty if there was none."""
        file = self.path / f"held_out_{when}.parquet"
        return read_table(file) if file.exists() else []

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


def _remove_unfinished(folder: Path) -> None:
    for part in folder.glob(".*.writing-*"):
        part.unlink(missing_ok=True)


def _holds_this_run(path: Path, recipe_yaml: str, *, free: bool) -> bool:
    """True to continue, False to start; raises RunError to refuse. `free`: no other process holds the lock."""
    if not path.exists():
        return False
    if not path.is_dir():
        raise RunError(f"{path} is a file, and a run needs a folder. Use another output_dir=..., or move the file.")
    recipe = path / "recipe.yaml"
    if not recipe.exists():
        # A first start that was killed leaves its lock and an unfinished recipe; that still counts as empty.
        entries = [entry.name for entry in path.iterdir()]
        others = sorted(name for name in entries if name != LOCK and ".writing-" not in name)
        if others:
            raise RunError(
                f"{path} is not a run directory: it holds {others[0]!r} and no recipe.yaml ({len(others)} entries). "
                "Nothing was written. Use another output_dir=..., or empty the folder."
            )
        return False
    existing = recipe.read_bytes().decode(errors="replace")
    if existing == recipe_yaml:
        return True
    idle = not made_progress(path)
    if idle and free:
        return False
    old, new = existing.splitlines(), recipe_yaml.splitlines()
    lines = list(difflib.unified_diff(old, new, "the run's", "this recipe", n=1, lineterm=""))
    shown = lines[:_DIFF_LINES] + ["..."] * (len(lines) > _DIFF_LINES)
    difference = "\n".join(shown) or "(only in line ends)"
    running = "It has made no step, but another process is running it. " if idle else ""
    raise RunError(
        f"{path} holds a run of another recipe:\n{difference}\n{running}Use another output_dir=... to keep both, or "
        "remove the folder to start again there."
    )


def _started(path: Path) -> datetime:
    """The time that the run's folder states; the present for a new run."""
    try:
        return datetime.fromisoformat(json.loads((path / "environment.json").read_text())["started"])
    except (OSError, ValueError, KeyError):
        return datetime.now()


def _environment(started: datetime) -> dict[str, Any]:
    import torch

    return {
        "started": started.isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "packages": {name: _version(name) for name in ("torch", "transformers", "datasets", "peft", "opd")},
        "cuda_devices": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "git_commit": _git_commit(),
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _git_commit() -> str | None:
    """The commit of the working directory, or None outside a repository, before its first commit or without git."""
    try:
        result = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return result.stdout.strip() if result.returncode == 0 else None
