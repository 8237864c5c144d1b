"""Lock a run's folder for one process, on one machine or on several that share a file system.

The operating system's lock on `.lock` excludes other processes, and ends with its process. Some network file systems
have no locks, or keep them to one machine. So the holder also writes `.holder.json` and touches it every `BEAT`
seconds. A holder on another machine counts as ended after `SILENCE` seconds without a touch, by the clock of the file
system.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path

from filelock import FileLock, Timeout

from opd.errors import RunError
from opd.files import write_atomically

LOCK = ".lock"  # an empty file in every run's folder
HOLDER = ".holder.json"  # the process that runs it
BEAT = 10.0
SILENCE = 60.0
NO_STAGES = frozenset({"tensorboard", "wandb"})  # folders of a run that are not stages


@dataclass(frozen=True, slots=True)
class Holder:
    """A process that holds a run's folder."""

    host: str
    pid: int
    since: str
    machine: str  # equal for processes that share the operating system's locks

    @classmethod
    def this(cls) -> Holder:
        host = socket.gethostname()
        try:
            machine = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        except OSError:
            machine = host
        return cls(host, os.getpid(), datetime.now().isoformat(timespec="seconds"), machine)

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}, since {self.since}"


class FolderLock:
    """The lock of a run's folder; make it with `lock_folder`. `release` ends it, at the latest the process does."""

    def __init__(self, folder: Path, lock: FileLock) -> None:
        self._folder, self._lock = folder, lock
        self._ended = threading.Event()
        self._pid = os.getpid()
        write_atomically(folder / HOLDER, json.dumps(asdict(Holder.this())) + "\n")
        self._file = (folder / HOLDER).stat().st_ino
        threading.Thread(target=_beat, args=(folder / HOLDER, self._ended), daemon=True).start()

    def release(self) -> None:
        """Let other processes run the folder. Without effect the second time."""
        if self._ended.is_set():
            return
        self._ended.set()
        with contextlib.suppress(FileNotFoundError):  # the folder was removed; another lock's file stays
            if (self._folder / HOLDER).stat().st_ino == self._file:
                (self._folder / HOLDER).unlink()
        self._lock.release(force=True)

    def __del__(self) -> None:
        if self._pid == os.getpid():  # a forked process has a copy of this object, but not the lock
            with contextlib.suppress(Exception):  # at the end of the process, modules may be gone
                self.release()


def lock_folder(folder: Path, say: Callable[[str], None] = print) -> FolderLock:
    """Lock an existing folder.

    Where `.lock` cannot be locked, because the file system has no locks or the file cannot be opened, `.holder.json`
    alone decides. `say` gets a line about that, and one while a holder on another machine may have ended without a
    trace.

    Raises RunError, which names the holder, if another process has the folder, or this process already has it.
    """
    folder = folder.resolve()
    lock = FileLock(folder / LOCK, blocking=False, thread_local=False, fallback_to_soft=False, preserve_lock_file=True)
    try:
        lock.acquire()
    except Timeout:
        raise _in_use(folder, _holder(folder)) from None
    except (OSError, NotImplementedError) as error:  # filelock raises the second where there is no flock
        say(f"{folder / LOCK} cannot be locked ({error}). Heartbeats alone keep other processes out.")
    try:
        _wait_for_end(folder, locked=lock.is_locked, say=say)
        return FolderLock(folder, lock)
    except BaseException:
        lock.release(force=True)
        raise


def _beat(file: Path, ended: threading.Event) -> None:
    while not ended.wait(BEAT):
        with contextlib.suppress(OSError):  # the folder may have been removed
            os.utime(file)


def _wait_for_end(folder: Path, *, locked: bool, say: Callable[[str], None]) -> None:
    """Return once no living holder can be in the folder. Raises RunError as soon as one shows that it lives."""
    first, holder = _last_beat(folder), _holder(folder)
    if first is None or holder is None or (locked and holder.machine == Holder.this().machine):
        return  # the operating system's lock of a dead process is free
    left = SILENCE - (_now(folder) - first)
    if left > 0:
        say(f"{folder}: held by {holder}. Waiting {left:.0f} s for its next heartbeat.")
    while (last := _last_beat(folder)) is not None:
        if last != first:
            raise _in_use(folder, _holder(folder))
        if _now(folder) - last > SILENCE:
            return
        time.sleep(min(1.0, SILENCE / 10))


def _holder(folder: Path) -> Holder | None:
    try:
        return Holder(**json.loads((folder / HOLDER).read_bytes()))
    except (OSError, ValueError, TypeError):
        return None


def _last_beat(folder: Path) -> float | None:
    """The time of the holder's last heartbeat. Opened first, because NFS refreshes a file's times on opening it."""
    try:
        with (folder / HOLDER).open("rb") as file:
            return os.fstat(file.fileno()).st_mtime
    except OSError:
        return None


def _now(folder: Path) -> float:
    """The time by the clock that stamps the folder's files."""
    probe = folder / f"{HOLDER}.writing-{os.getpid()}"
    try:
        probe.write_bytes(b"")
        return probe.stat().st_mtime
    finally:
        probe.unlink(missing_ok=True)


def _in_use(folder: Path, holder: Holder | None) -> RunError:
    own = holder is not None and (holder.pid, holder.machine) == (os.getpid(), Holder.this().machine)
    who = "this process already runs it" if own else f"it is held by {holder or 'another process'}"
    return RunError(
        f"{folder} is in use: {who}. Nothing was changed. Wait until that run ends, or stop it, or use another "
        "output_dir=..."
    )


def made_progress(run: Path) -> bool:
    """Whether any stage in a run's folder has metrics, a checkpoint, a model, or done.json."""
    return any(made_something(stage) for stage in _stages(run))


def clear(run: Path) -> None:
    """Remove files of a run without progress that another run would read: evaluations, the trackers' id, findings.

    Judges' answers stay: each is stored with its question.
    """
    for stage in _stages(run):
        for file in stage.glob("held_out_*.parquet"):
            file.unlink()
        for folder in (stage / "evaluating", stage / "images"):
            if folder.exists():
                shutil.rmtree(folder)
    for name in ("report_id.txt", "doctor.json"):
        (run / name).unlink(missing_ok=True)


def _stages(run: Path) -> list[Path]:
    return [entry for entry in run.iterdir() if entry.is_dir() and entry.name not in NO_STAGES]


def made_something(stage: Path) -> bool:
    """Whether a stage's folder has metrics, a checkpoint, a model, or done.json."""
    metrics, checkpoints = stage / "metrics.jsonl", stage / "checkpoints"
    return (
        (metrics.exists() and metrics.stat().st_size > 0)
        or (checkpoints.is_dir() and any(checkpoints.iterdir()))
        or any((stage / name).exists() for name in ("done.json", "model"))
    )
