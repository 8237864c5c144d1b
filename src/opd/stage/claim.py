"""One process works in a run's folder at a time, and a run that made no step may leave its folder to another recipe."""

from __future__ import annotations

import contextlib
from pathlib import Path

from filelock import BaseFileLock, FileLock, Timeout

LOCK = ".lock"  # a file of every run's folder, empty
NO_STAGES = frozenset({"tensorboard", "wandb"})  # folders of a run that are no stage's


def lock_folder(folder: Path) -> BaseFileLock | None:
    """The lock on a folder that exists; None where another process holds it.

    It is held while the object lives, and no longer than the process. A second run of one process, e.g. in a notebook
    after the first has failed, gets the same lock. Where the file of the lock cannot be opened, or the file system has
    no locks, the lock is returned unheld and keeps no process out.
    """
    file = folder.resolve() / LOCK
    lock = FileLock(file, blocking=False, thread_local=False, is_singleton=True, fallback_to_soft=False)
    if lock.is_locked and not file.exists():  # the folder was removed, and is another one now
        lock.release(force=True)
    try:
        lock.acquire()
    except Timeout:
        return None
    except OSError:
        pass
    return lock


def made_progress(run: Path) -> bool:
    """Whether a stage in a run's folder has a row of metrics, a checkpoint, a model, or the mark that it is done."""
    return any(_made_something(stage) for stage in _stages(run))


def clear(run: Path) -> None:
    """Remove what a run without progress has left and another recipe's would read: its evaluations, its tracker's
    name. Judges' answers stay: each carries its question."""
    for stage in _stages(run):
        for file in stage.glob("held_out_*.parquet"):
            file.unlink()
    with contextlib.suppress(FileNotFoundError):
        (run / "report_id.txt").unlink()


def _stages(run: Path) -> list[Path]:
    return [entry for entry in run.iterdir() if entry.is_dir() and entry.name not in NO_STAGES]


def _made_something(stage: Path) -> bool:
    metrics, checkpoints = stage / "metrics.jsonl", stage / "checkpoints"
    return (
        (metrics.exists() and metrics.stat().st_size > 0)
        or (checkpoints.is_dir() and any(checkpoints.iterdir()))
        or any((stage / name).exists() for name in ("done.json", "model"))
    )
