"""The lock of a run's folder, on one machine and on several."""

from __future__ import annotations

import json
import os
import shutil
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from filelock import FileLock

from opd.errors import RunError
from opd.stage import claim
from opd.stage.claim import HOLDER, Holder, lock_folder


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claim, "BEAT", 0.05)
    monkeypatch.setattr(claim, "SILENCE", 0.5)


@pytest.fixture
def no_locks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system without locks, as some network file systems."""

    def acquire(*_: object, **__: object) -> None:
        raise NotImplementedError("no locks here")

    monkeypatch.setattr(FileLock, "acquire", acquire)


def write_holder(folder: Path, *, age: float = 0.0) -> None:
    """The file of a holder on another machine, last touched `age` seconds ago."""
    there = replace(Holder.this(), host="elsewhere", pid=17, machine="another")
    (folder / HOLDER).write_text(json.dumps(asdict(there)))
    touched = time.time() - age
    os.utime(folder / HOLDER, (touched, touched))


@pytest.fixture
def beating(tmp_path: Path) -> Iterator[None]:
    """A holder on another machine that lives."""
    write_holder(tmp_path)
    ended = threading.Event()
    thread = threading.Thread(target=claim._beat, args=(tmp_path / HOLDER, ended))
    thread.start()
    yield
    ended.set()
    thread.join()


def test_lock_writes_heartbeats_until_released(tmp_path: Path):
    lock = lock_folder(tmp_path)
    holder = json.loads((tmp_path / HOLDER).read_text())
    assert holder["pid"] == os.getpid()
    first = (tmp_path / HOLDER).stat().st_mtime
    deadline = time.monotonic() + 20
    while (tmp_path / HOLDER).stat().st_mtime == first:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    lock.release()
    lock.release()
    assert not (tmp_path / HOLDER).exists()
    lock_folder(tmp_path).release()


def test_lock_refuses_living_holder_on_other_machine(tmp_path: Path, beating: None):
    said: list[str] = []
    with pytest.raises(RunError, match=r"held by process 17 on elsewhere, since .* Nothing was changed"):
        lock_folder(tmp_path, said.append)
    assert json.loads((tmp_path / HOLDER).read_text())["host"] == "elsewhere"
    assert len(said) == 1
    assert "Waiting" in said[0]


def test_lock_takes_over_from_silent_holder_after_waiting(tmp_path: Path):
    write_holder(tmp_path)
    started, said = time.monotonic(), list[str]()
    lock_folder(tmp_path, said.append).release()
    assert 0.4 < time.monotonic() - started < 20
    assert len(said) == 1


def test_lock_takes_over_at_once_from_long_silent_holder(tmp_path: Path):
    write_holder(tmp_path, age=3600)
    said: list[str] = []
    lock_folder(tmp_path, said.append).release()
    assert said == []


def test_lock_without_file_locks_goes_by_heartbeat(tmp_path: Path, no_locks: None):
    said: list[str] = []
    first = lock_folder(tmp_path, said.append)
    assert said == [f"{tmp_path}/.lock cannot be locked (no locks here). Heartbeats alone keep other processes out."]
    with pytest.raises(RunError, match="this process already runs it"):
        lock_folder(tmp_path, lambda _: None)
    first.release()
    lock_folder(tmp_path).release()


def test_lock_that_cannot_be_opened_is_said(tmp_path: Path):
    (tmp_path / ".lock").mkdir()
    said: list[str] = []
    first = lock_folder(tmp_path, said.append)
    assert ".lock cannot be locked (" in said[0]
    with pytest.raises(RunError, match="this process already runs it"):
        lock_folder(tmp_path, said.append)
    first.release()


def test_lock_of_removed_folder_does_not_hold_new_one(tmp_path: Path):
    folder = tmp_path / "run"
    folder.mkdir()
    first = lock_folder(folder)
    shutil.rmtree(folder)
    folder.mkdir()
    second = lock_folder(folder)
    first.release()
    with pytest.raises(RunError, match="this process already runs it"):
        lock_folder(folder)
    second.release()
