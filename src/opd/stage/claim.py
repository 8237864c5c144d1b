"""A run that made no step may give its folder to another recipe, unless its process is still at work there."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from weakref import WeakValueDictionary

NO_STAGES = frozenset({"tensorboard", "wandb"})  # folders of a run that are no stage's


class Claim:
    """That this process works in a folder; ends with the object, or with the process however that ends."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def __del__(self) -> None:
        os.close(self._descriptor)


_CLAIMS: WeakValueDictionary[tuple[int, int], Claim] = WeakValueDictionary()  # of this process, by device and inode


def claim(folder: Path) -> Claim | None:
    """The claim on a folder that exists; None where another process has it.

    Nothing is written. A file system or operating system without locks has nobody in any folder.
    """
    status = folder.stat()
    key = status.st_dev, status.st_ino
    mine = _CLAIMS.get(key)
    if mine is not None:  # a second run of one process, e.g. in a notebook after the first has failed
        return mine
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        import fcntl

        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    except (ImportError, OSError):
        pass
    mine = _CLAIMS[key] = Claim(descriptor)
    return mine


def made_nothing(run: Path) -> bool:
    """Whether no stage in a run's folder has a row of metrics, a checkpoint, a model, or the mark that it is done."""
    return not any(_made_something(stage) for stage in _stages(run))


def forget(run: Path) -> None:
    """Remove what a run that made nothing has left and another recipe's would read: its evaluations, its tracker's
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
