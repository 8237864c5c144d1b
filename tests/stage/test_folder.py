"""A run's folder: one recipe, deterministic lines, and nothing half-written after a kill."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from datetime import datetime
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from opd.errors import ConfigError, DataError, RunError, TrainingError
from opd.files import write_atomically
from opd.stage import folder
from opd.stage.folder import RunDir, StageDir

RECIPE = "name: demo\nseed: 0\nstages:\n- name: distil\n  steps: 5\n"


@pytest.fixture
def stage(tmp_path: Path) -> StageDir:
    return RunDir.open(tmp_path / "run", RECIPE).stage("distil")


def names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


def test_open_writes_recipe_and_environment(tmp_path: Path):
    run = RunDir.open(tmp_path / "deep" / "run", RECIPE)
    assert names(run.path) == [".lock", "environment.json", "recipe.yaml"]
    assert (run.path / "recipe.yaml").read_bytes() == RECIPE.encode()
    environment = json.loads((run.path / "environment.json").read_text())
    assert environment["python"] == sys.version.split()[0]
    assert environment["packages"]["torch"].startswith("2.")
    assert set(environment["packages"]) == {"torch", "transformers", "datasets", "peft", "opd"}
    assert environment["cpus"] == os.cpu_count()
    assert isinstance(environment["cuda_devices"], list)


def test_open_keeps_time_of_first_start(tmp_path: Path):
    file = tmp_path / "run" / "environment.json"
    before = datetime.now().replace(microsecond=0)
    first = RunDir.open(tmp_path / "run", RECIPE)
    assert before <= first.started <= datetime.now()
    file.write_text(json.dumps({"started": "2001-02-03T04:05:06"}))
    assert first.lock is not None
    first.lock.release()
    again = RunDir.open(tmp_path / "run", RECIPE)
    assert again.started == datetime(2001, 2, 3, 4, 5, 6)
    assert again.lock is not None
    again.lock.release()
    assert RunDir.open(tmp_path / "run", RECIPE + "# another\n").started >= before


def test_open_records_git_commit_of_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def commit(name: str) -> str | None:
        return json.loads((RunDir.open(tmp_path / name, RECIPE).path / "environment.json").read_text())["git_commit"]

    (tmp_path / "code").mkdir()
    monkeypatch.chdir(tmp_path / "code")
    assert commit("outside") is None
    if shutil.which("git"):
        git = ["git", "-c", "user.name=n", "-c", "user.email=e@example.org"]
        subprocess.run(["git", "init", "-q"], check=True)
        assert commit("unborn") is None
        subprocess.run([*git, "commit", "-q", "--allow-empty", "-m", "m"], check=True)
        assert re.fullmatch("[0-9a-f]{40}", commit("inside") or "")
    monkeypatch.setenv("PATH", "")
    assert commit("without-git") is None


def test_open_keeps_metrics_when_recipe_is_equal(tmp_path: Path):
    first = RunDir.open(tmp_path, RECIPE).stage("distil")
    first.append_metrics(0, {"a/b": 1.0})
    assert RunDir.open(tmp_path, RECIPE).stage("distil").read_metrics() == [{"step": 0, "a/b": 1.0}]


def begun(path: Path) -> StageDir:
    """A run that has made a step."""
    stage = RunDir.open(path, RECIPE).stage("distil")
    stage.append_metrics(1, {"a/b": 1.0})
    return stage


OTHER = RECIPE.replace("seed: 0", "seed: 1")


def test_open_replaces_recipe_when_run_made_no_step(tmp_path: Path):
    first = RunDir.open(tmp_path, RECIPE)
    assert not first.replaced
    stage = first.stage("distil")
    stage.write_samples(1, [{"prompt": "x"}])
    stage.write_held_out("before", [{"prompt": "x"}])
    stage.metrics.write_bytes(b"")
    (tmp_path / "report_id.txt").write_text("abc")
    assert not RunDir.open(tmp_path, RECIPE).replaced
    assert (tmp_path / "report_id.txt").exists()
    again = RunDir.open(tmp_path, OTHER)
    assert again.replaced
    assert (tmp_path / "recipe.yaml").read_text() == OTHER
    assert again.stage("distil").read_held_out("before") == []
    assert not (tmp_path / "report_id.txt").exists()


@pytest.mark.parametrize("made", ["metrics.jsonl", "checkpoints/step_000001", "done.json", "model/config.json"])
def test_open_refuses_other_recipe_when_run_made_output(tmp_path: Path, made: str):
    file = RunDir.open(tmp_path, RECIPE).stage("distil").path / made
    file.parent.mkdir(exist_ok=True)
    file.write_text("{}")
    with pytest.raises(RunError, match="another recipe") as caught:
        RunDir.open(tmp_path, OTHER)
    assert "another process is running it" not in str(caught.value)
    assert (tmp_path / "recipe.yaml").read_text() == RECIPE


def test_open_refuses_other_recipe_while_process_is_at_work(tmp_path: Path):
    other = at_work(tmp_path)
    with pytest.raises(RunError, match=r"It has made no step, but another process is running it\. Use"):
        RunDir.open(tmp_path, OTHER)
    other.kill()
    other.communicate()
    assert RunDir.open(tmp_path, OTHER).replaced


def at_work(path: Path) -> subprocess.Popen[str]:
    """A process that has opened the run, and holds it until it is killed."""
    code = f"""
import sys
from pathlib import Path
from opd.stage.folder import RunDir
run = RunDir.open(Path({str(path)!r}), {RECIPE!r})
print("open", flush=True)
sys.stdin.read()
"""
    other = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert other.stdout is not None
    assert other.stdout.readline() == "open\n"
    return other


def another_process_may_lock(path: Path) -> bool:
    code = """
import sys
from pathlib import Path
from opd.stage.claim import lock_folder
sys.exit(lock_folder(Path(sys.argv[1])) is None)
"""
    return subprocess.run([sys.executable, "-c", code, path], check=False).returncode == 0


def test_open_locks_until_the_last_run_of_the_process_ends(tmp_path: Path):
    first, second = RunDir.open(tmp_path, RECIPE), RunDir.open(tmp_path, OTHER)
    assert second.lock is first.lock
    del first
    assert not another_process_may_lock(tmp_path)
    del second
    assert another_process_may_lock(tmp_path)


def test_open_locks_anew_when_the_folder_was_removed(tmp_path: Path):
    first = RunDir.open(tmp_path / "run", RECIPE)
    shutil.rmtree(tmp_path / "run")
    second = RunDir.open(tmp_path / "run", OTHER)
    assert second.lock is first.lock
    assert not another_process_may_lock(tmp_path / "run")


def test_open_goes_on_when_there_can_be_no_lock(tmp_path: Path):
    (tmp_path / ".lock").mkdir()
    run = RunDir.open(tmp_path, RECIPE)
    assert run.lock is not None
    assert not run.lock.is_locked


def test_open_shows_difference_when_recipe_differs(tmp_path: Path):
    begun(tmp_path)
    before = (tmp_path / "environment.json").stat().st_mtime_ns
    with pytest.raises(RunError) as caught:
        RunDir.open(tmp_path, RECIPE.replace("seed: 0", "seed: 1"))
    message = str(caught.value)
    assert message.startswith(f"{tmp_path} holds a run of another recipe:\n--- the run's\n+++ this recipe\n")
    assert "\n-seed: 0\n+seed: 1\n" in message
    assert "stages" in message  # one line of context
    assert "steps" not in message
    assert "Use another output_dir=... to keep both, or remove the folder" in message
    assert (tmp_path / "recipe.yaml").read_text() == RECIPE
    assert (tmp_path / "environment.json").stat().st_mtime_ns == before
    with pytest.raises(OSError, match="another recipe"):
        RunDir.open(tmp_path, "x")


def test_open_cuts_long_difference_and_names_line_ends(tmp_path: Path):
    begun(tmp_path)
    with pytest.raises(RunError) as caught:
        RunDir.open(tmp_path, "".join(f"line {i}\n" for i in range(100)))
    assert len(str(caught.value).splitlines()) == 1 + 12 + 1 + 1
    assert "\n...\nUse another" in str(caught.value)
    with pytest.raises(RunError, match="only in line ends"):
        RunDir.open(tmp_path, RECIPE.replace("\n", "\r\n"))


def test_open_refuses_folder_of_other_content(tmp_path: Path):
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(
        RunError, match=r"is not a run directory: it holds 'thesis\.tex' and no recipe\.yaml \(1 entries"
    ):
        RunDir.open(tmp_path, RECIPE)
    assert names(tmp_path) == ["thesis.tex"]


def test_open_takes_folder_of_killed_first_start(tmp_path: Path):
    (tmp_path / ".lock").touch()
    (tmp_path / ".recipe.yaml.writing-17").write_text("name")
    RunDir.open(tmp_path, RECIPE)
    assert names(tmp_path) == [".lock", "environment.json", "recipe.yaml"]


def test_open_raises_run_error_when_path_is_no_folder(tmp_path: Path):
    file = tmp_path / "file"
    file.write_text("x")
    with pytest.raises(RunError, match=r"file is a file, and a run needs a folder\. Use another output_dir=\.\.\., or"):
        RunDir.open(file, RECIPE)
    with pytest.raises(RunError, match=r"file/run cannot be written \(Not a directory\)\. .*another output_dir"):
        RunDir.open(file / "run", RECIPE)


def test_open_raises_run_error_when_writing_is_denied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    # Simulated, since a superuser may write anywhere.
    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "write_bytes", refuse)
    with pytest.raises(RunError, match=r"recipe\.yaml cannot be written \(Permission denied\)\. Free space or allow"):
        RunDir.open(tmp_path, RECIPE)
    assert names(tmp_path) == [".lock"]


@pytest.mark.parametrize("name", ["", ".hidden", "a/b", "..", "recipe.yaml", "tensorboard"])
def test_stage_refuses_name_that_is_no_folder(tmp_path: Path, name: str):
    with pytest.raises(
        ConfigError, match=re.escape(f"A stage cannot be named {name!r}: its folder has the same name.")
    ):
        RunDir.open(tmp_path, RECIPE).stage(name)


def test_stage_raises_run_error_when_folder_cannot_be_made(tmp_path: Path):
    run = RunDir.open(tmp_path, RECIPE)
    (tmp_path / "distil").write_text("x")
    with pytest.raises(RunError, match="distil cannot be written"):
        run.stage("distil")


def test_append_metrics_writes_equal_bytes_for_equal_runs(tmp_path: Path):
    written = []
    for name in ("a", "b"):
        stage = RunDir.open(tmp_path / name, RECIPE).stage("distil")
        for step in range(3):
            stage.append_metrics(step, {"train/loss": 1 / (step + 1), "rollout/length": 3})
            stage.append_timings(step, {"time/step_seconds": time.perf_counter()})
        written.append(stage.metrics.read_bytes())
        assert len(stage.timings.read_bytes().splitlines()) == 3
    assert written[0] == written[1]
    assert written[0].splitlines()[1] == b'{"step": 1, "rollout/length": 3, "train/loss": 0.5}'


def test_append_metrics_raises_training_error_when_not_finite(stage: StageDir):
    with pytest.raises(TrainingError, match="In step 7, 'train/loss' is nan"):
        stage.append_metrics(7, {"train/loss": math.nan})
    with pytest.raises(TrainingError, match=re.escape("In the stage's summary, 'eval.score' is inf")):
        stage.mark_done({"eval": {"score": math.inf}})
    assert stage.read_metrics() == []
    assert stage.done() is None


def test_rewind_keeps_rows_up_to_step(stage: StageDir):
    for step in range(5):
        stage.append_metrics(step, {"a/b": float(step)})
        stage.append_timings(step, {"time/s": float(step)})
        stage.write_samples(step, [{"text": str(step)}])
    kept = stage.metrics.read_bytes().splitlines(keepends=True)[:3]
    with stage.metrics.open("ab") as file:
        file.write(b'{"step": 5, "a/')
    (stage.samples / ".step_000009.parquet.writing-3").write_text("x")
    (stage.path / ".metrics.jsonl.writing-3").write_text("x")
    (stage.samples / "notes.txt").write_text("mine")
    stage.rewind(2)
    assert stage.metrics.read_bytes() == b"".join(kept)
    assert [json.loads(line)["step"] for line in stage.timings.read_bytes().splitlines()] == [0, 1, 2]
    assert names(stage.samples) == ["notes.txt", *(f"step_{i:06d}.parquet" for i in range(3))]
    assert names(stage.path) == ["checkpoints", "metrics.jsonl", "samples", "timings.jsonl"]
    stage.append_metrics(3, {"a/b": 3.0})
    assert [row["step"] for row in stage.read_metrics()] == [0, 1, 2, 3]
    stage.rewind(-1)
    assert stage.read_metrics() == []
    assert names(stage.samples) == ["notes.txt"]


def test_rewind_accepts_empty_stage(stage: StageDir):
    stage.rewind(-1)
    assert names(stage.path) == ["checkpoints", "samples"]


def test_append_metrics_keeps_whole_rows_when_killed(stage: StageDir):
    code = """
import sys, pathlib
from opd.stage.folder import StageDir
stage = StageDir(pathlib.Path(sys.argv[1]))
step = 0
while True:
    stage.append_metrics(step, {f"a/{i}": i + 0.5 for i in range(200)})
    step += 1
"""
    child = subprocess.Popen([sys.executable, "-c", code, str(stage.path)])
    while not stage.metrics.exists() or stage.metrics.stat().st_size < 200_000:
        assert child.poll() is None
        time.sleep(0.01)
    child.send_signal(signal.SIGKILL)
    child.wait()
    steps = [row["step"] for row in stage.read_metrics()]
    assert steps == list(range(len(steps)))
    assert all(len(row) == 201 for row in stage.read_metrics())
    assert len(stage.metrics.read_bytes().splitlines()) - len(steps) <= 1


def test_write_samples_reads_back_equal(stage: StageDir):
    rows = [
        {"prompt_id": 3, "text": "4 .", "reward": 1.0, "ids": [19, 30], "teacher": None},
        {"prompt_id": 4, "text": "é\n", "reward": None, "ids": [], "teacher": None},
    ]
    file = stage.write_samples(12, rows)
    assert file == stage.samples / "step_000012.parquet"
    assert pq.read_table(file).to_pylist() == rows
    stage.write_samples(12, rows[:1])
    assert pq.read_table(file).to_pylist() == rows[:1]
    stage.write_samples(13, [])
    assert names(stage.samples) == ["step_000012.parquet", "step_000013.parquet"]


def test_write_samples_refuses_mixed_columns(stage: StageDir):
    with pytest.raises(
        DataError, match=r"step_000002\.parquet: column 'answer' mixes types \(.*\)\. Use one type there"
    ):
        stage.write_samples(2, [{"answer": 4}, {"answer": "four"}])
    with pytest.raises(AssertionError, match="different keys"):
        stage.write_samples(2, [{"a": 1}, {"a": 1, "b": 2}])
    assert names(stage.samples) == []


def test_done_reads_back_and_names_damaged_file(stage: StageDir):
    assert stage.done() is None
    stage.mark_done({"steps": 5, "eval": {"score": 0.5}, "names": ["a"]})
    assert stage.done() == {"steps": 5, "eval": {"score": 0.5}, "names": ["a"]}
    (stage.path / "done.json").write_text("{")
    with pytest.raises(RunError, match=r"done\.json cannot be read .* Remove it to run the stage again"):
        stage.done()


@pytest.mark.parametrize("broken", ["fsync", "replace"])
def test_write_atomically_keeps_old_file_when_write_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str):
    file = tmp_path / "x.json"
    write_atomically(file, "old")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(folder.os, broken, full)
    with pytest.raises(RunError, match=r"x\.json cannot be written \(No space left on device\)\. Free space or allow"):
        write_atomically(file, "new")
    assert file.read_text() == "old"
    assert names(tmp_path) == ["x.json"]


def test_write_atomically_leaves_no_file_when_interrupted(tmp_path: Path):
    def interrupted(part: Path) -> None:
        part.write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_atomically(tmp_path / "x", interrupted)
    assert names(tmp_path) == []
