"""What other programs read of a stage while it works."""

from __future__ import annotations

import itertools
import json
import time
from pathlib import Path
from typing import Any

import pytest

from opd.models.ticks import counting
from opd.stage import progress_file
from opd.stage.progress import Progress
from opd.stage.progress_file import ProgressFile


def wait_for(file: Path, key: str, value: Any) -> dict[str, Any]:
    for _ in range(400):
        if file.exists() and (found := json.loads(file.read_text()))[key] == value:
            return found
        time.sleep(0.02)
    raise AssertionError(f"{file} never had {key} {value!r}")


def test_progress_file_states_phase_loop_and_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(progress_file, "EVERY", 0.02)
    before = time.time()
    file = tmp_path / "progress.json"
    with Progress(quiet=True) as progress:
        progress.record(file, 8)
        progress.phase("distil: loading student")
        found = wait_for(file, "phase", "distil: loading student")
        assert (found["done"], found["of"], found["step"], found["steps"], found["eta_seconds"]) == (
            *(None, None, 0, 8),
            None,
        )
        assert before <= found["since"] <= found["updated"] <= time.time()
        progress.step("distil", 3, {"train/loss": 1.0}, left=12.5)
        assert wait_for(file, "step", 3)["eta_seconds"] == 12.5
        with counting("responses scored", 40) as count:
            count.add(12)
            found = wait_for(file, "done", 12)
        assert found["of"] == 40
        assert found["phase"] == "distil: loading student, responses scored"
        progress.phase("distil: finished")
    assert json.loads(file.read_text())["phase"] == "distil: finished"
    assert [path.name for path in tmp_path.iterdir()] == ["progress.json"]


def test_progress_file_is_written_at_most_once_a_second(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    written: list[float] = []
    replace = Path.replace

    def noted(self: Path, target: Any) -> Any:
        written.append(time.monotonic())
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", noted)
    file = ProgressFile(tmp_path / "progress.json", 1)
    end = time.monotonic() + 2.5
    while time.monotonic() < end:
        file.phase(f"phase {time.monotonic()}")
        time.sleep(0.01)
    file.close()
    assert 1 <= len(written) <= 4  # the last one by `close`
    assert all(b - a > 0.9 for a, b in itertools.pairwise(written[:-1]))


def test_progress_says_once_that_file_cannot_be_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    with Progress() as progress:
        progress.record(tmp_path / "missing" / "progress.json", 2)
        progress.phase("distil: step 1 of 2")
    out = capsys.readouterr().out
    assert "progress.json cannot be written (No such file or directory): the run went on without it" in out


def test_progress_file_shows_that_a_long_phase_is_alive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """`updated` goes on although nothing changes: a reader takes a run without it for stopped."""
    monkeypatch.setattr(progress_file, "EVERY", 0.02)
    monkeypatch.setattr(progress_file, "BEAT", 0.1)
    file = tmp_path / "progress.json"
    with Progress(quiet=True) as progress:
        progress.record(file, 8)
        progress.phase("distil: a long step")
        first = wait_for(file, "phase", "distil: a long step")
        for _ in range(400):
            if json.loads(file.read_text())["updated"] > first["updated"]:
                break
            time.sleep(0.02)
        later = json.loads(file.read_text())
    assert later["updated"] >= first["updated"] + 0.1
    assert {**later, "updated": 0} == {**first, "updated": 0}


def test_progress_file_goes_on_after_its_part_was_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A run that continues removes unfinished files in the stage's folder, while the thread may be writing one."""
    replaced = Path.replace

    def removed(self: Path, target: Path) -> Path:
        self.unlink()
        return replaced(self, target)

    file = ProgressFile(tmp_path / "progress.json", 4)
    monkeypatch.setattr(Path, "replace", removed)
    file.step(1, 2.0)
    file.close()
    assert file.trouble == ""
    monkeypatch.setattr(Path, "replace", replaced)
    file.close()
    assert json.loads((tmp_path / "progress.json").read_text())["step"] == 1
