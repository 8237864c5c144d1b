"""Lock a run's folder for one process. A run that made no step may be replaced by a run of another recipe."""

from __future__ import annotations

import contextlib
from pathlib import Path

from filelock import BaseFileLock, FileLock, Timeout

LOCK = ".lock"  # an empty file in every run's folder
NO_STAGES = frozenset({"tensorboard", "wandb"})  # folders of a run that are not stages


def lock_folder(folder: Path) -> BaseFileLock | None:
    """The lock of an existing folder; None if another process holds it.

    It is held while the object lives, at most until the process ends. A second run in the same process, e.g. in a
    notebook after a failure, gets the same lock. If the lock file cannot be opened, or the file system has no locks,
    the lock is returned without being acquired, and does not exclude other processes.
    """
    file = folder.resolve() / LOCK
    lock = FileLock(file, blocking=False, thread_local=False, is_singleton=True, fallback_to_soft=False)
    if lock.is_locked and not file.exists():  # the folder was removed and created again
        lock.release(force=True)
    try:
        lock.acquire()
    except Timeout:
        return None
    except OSError:
        pass
    return lock


def made_progress(run: Path) -> bool:
    """Whether any stage in a run's folder has metrics, a checkpoint, a model, or done.json."""
    return any(_made_something(stage) for stage in _stages(run))


def clear(run: Path) -> None:
    """Remove files of a run without progress that a run of another recipe would read: evaluations and the trackers' id.

    Judges' answers stay: each is stored with its question.
    """
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
