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
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import yaml
from support.runs import one_stage

import opd
from opd.errors import ConfigError, DataError, RunError, TrainingError
from opd.files import write_atomically
from opd.recipe.load import load_recipe, parse_recipe
from opd.recipe.schema import Recipe
from opd.stage.columns import NAMES, schema
from opd.stage.folder import RunDir, StageDir

RECIPE = parse_recipe(one_stage())
OTHER = RECIPE.model_copy(update={"seed": 1})


def opened(path: Path, recipe: Recipe = RECIPE, **more: Any) -> RunDir:
    return RunDir.open(path, recipe, {}, **more)


@pytest.fixture
def stage(tmp_path: Path) -> Iterator[StageDir]:
    with closing(opened(tmp_path / "run")) as run:
        yield run.stage("distil")


def names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


def test_open_writes_recipe_and_environment(tmp_path: Path):
    with closing(opened(tmp_path / "deep" / "run")) as run:
        assert names(run.path) == [".holder.json", ".lock", "environment.json", "inputs.json", "recipe.yaml"]
    assert names(run.path) == [".lock", "environment.json", "inputs.json", "recipe.yaml"]
    assert load_recipe(run.path / "recipe.yaml") == RECIPE
    environment = json.loads((run.path / "environment.json").read_text())
    assert environment["python"] == sys.version.split()[0]
    assert environment["packages"]["torch"].startswith("2.")
    assert set(environment["packages"]) == {"torch", "transformers", "datasets", "peft", "opd"}
    assert environment["cpus"] == os.cpu_count()
    assert isinstance(environment["cuda_devices"], list)


def test_open_keeps_time_of_first_start(tmp_path: Path):
    file = tmp_path / "run" / "environment.json"
    before = datetime.now().replace(microsecond=0)
    with closing(opened(tmp_path / "run")) as first:
        assert before <= first.started <= datetime.now()
    file.write_text(json.dumps({"started": "2001-02-03T04:05:06"}))
    with closing(opened(tmp_path / "run")) as again:
        assert again.started == datetime(2001, 2, 3, 4, 5, 6)
    with closing(opened(tmp_path / "run", OTHER)) as other:
        assert other.started >= before


def test_open_records_git_commit_of_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def commit(name: str) -> str | None:
        return json.loads((opened(tmp_path / name).path / "environment.json").read_text())["git_commit"]

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


def begun(path: Path, steps: int = 1) -> StageDir:
    """The stage of a run that has made steps."""
    with closing(opened(path)) as run:
        stage = run.stage("distil")
        for step in range(steps):
            stage.append_metrics(step + 1, {"a/b": 1.0})
    return stage


def test_open_keeps_metrics_when_recipe_is_equal(tmp_path: Path):
    begun(tmp_path)
    with closing(opened(tmp_path)) as run:
        assert run.stage("distil").read_metrics() == [{"step": 1, "a/b": 1.0}]
        assert run.notes == ()


def test_open_replaces_recipe_when_run_made_no_step(tmp_path: Path):
    with closing(opened(tmp_path)) as first:
        assert first.notes == ()
        stage = first.stage("distil")
        stage.write_samples(1, [{"prompt": "x"}])
        stage.write_held_out("before", [{"prompt": "x"}])
        stage.metrics.write_bytes(b"")
        (tmp_path / "report_id.txt").write_text("abc")
    with closing(opened(tmp_path)) as second:
        assert second.notes == ()
        assert (tmp_path / "report_id.txt").exists()
    with closing(opened(tmp_path, OTHER)) as again:
        assert "a run of another recipe that made no step" in again.notes[0]
        assert load_recipe(tmp_path / "recipe.yaml") == OTHER
        assert again.stage("distil").read_held_out("before") == []
        assert not (tmp_path / "report_id.txt").exists()


@pytest.mark.parametrize("made", ["metrics.jsonl", "checkpoints/step_000001", "done.json", "model/config.json"])
def test_open_refuses_other_recipe_when_run_made_output(tmp_path: Path, made: str):
    with closing(opened(tmp_path)) as run:
        file = run.stage("distil").path / made
    file.parent.mkdir(exist_ok=True)
    file.write_text("" if made == "metrics.jsonl" else "{}")
    if made == "metrics.jsonl":
        file.write_text('{"step": 1}\n')
    with pytest.raises(RunError, match="a run with other values:\n  seed: 0 -> 1\n"):
        opened(tmp_path, OTHER)
    assert load_recipe(tmp_path / "recipe.yaml") == RECIPE
    assert not (tmp_path / ".holder.json").exists()


@pytest.mark.parametrize("recipe", [RECIPE, OTHER])
def test_open_refuses_run_while_process_is_at_work(tmp_path: Path, recipe: Recipe):
    other = at_work(tmp_path)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    with pytest.raises(RunError, match=rf"is in use: it is held by process {other.pid} on .* Nothing was changed"):
        opened(tmp_path, recipe)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before
    other.kill()
    other.communicate()
    opened(tmp_path, recipe).close()


def test_open_refuses_second_run_of_same_process(tmp_path: Path):
    with closing(opened(tmp_path)), pytest.raises(RunError, match="this process already runs it"):
        opened(tmp_path)
    opened(tmp_path).close()


def at_work(path: Path) -> subprocess.Popen[str]:
    """A process that has opened the run, and holds it until it is killed."""
    code = f"""
import sys
from pathlib import Path
from opd.recipe.load import parse_recipe
from opd.stage.columns import NAMES, schema
from opd.stage.folder import RunDir
run = RunDir.open(Path({str(path)!r}), parse_recipe({RECIPE.model_dump(mode="json")!r}), {{}})
print("open", flush=True)
sys.stdin.read()
"""
    other = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert other.stdout is not None
    assert other.stdout.readline() == "open\n"
    return other


def test_open_shows_difference_and_changes_nothing(tmp_path: Path):
    begun(tmp_path)
    before = (tmp_path / "environment.json").stat().st_mtime_ns
    with pytest.raises(RunError) as caught:
        opened(tmp_path, OTHER)
    assert str(caught.value) == (
        f"{tmp_path} holds a run with other values:\n  seed: 0 -> 1\nTo go on with the new values from here, add "
        "--accept-changes (in Python accept_changes=True); they are then recorded in changes.jsonl. Use another "
        "output_dir=... to keep both, or remove the folder to start again there."
    )
    assert load_recipe(tmp_path / "recipe.yaml") == RECIPE
    assert (tmp_path / "environment.json").stat().st_mtime_ns == before
    assert not (tmp_path / "changes.jsonl").exists()
    with pytest.raises(OSError, match="other values"):
        opened(tmp_path, OTHER)


def test_open_records_accepted_changes(tmp_path: Path):
    begun(tmp_path)
    with closing(opened(tmp_path, OTHER, accept=True)) as run:
        assert run.notes == ("changed since the last start: seed: 0 -> 1",)
    (line,) = (tmp_path / "changes.jsonl").read_text().splitlines()
    row = json.loads(line)
    datetime.fromisoformat(row.pop("at"))
    assert row == {"key": "seed", "before": 0, "after": 1, "effect": "numbers"}
    with closing(opened(tmp_path, OTHER)) as run:
        assert run.notes == ()


def test_open_reads_recipe_of_version_with_fewer_fields(tmp_path: Path):
    stage = begun(tmp_path)
    values = yaml.safe_load((tmp_path / "recipe.yaml").read_text())
    del values["stages"][0]["save"], values["stages"][0]["optimizer"]["eps"], values["report_to"]
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(values))
    with closing(opened(tmp_path)) as run:
        assert run.notes == ()
    assert len(stage.read_metrics()) == 1
    values["stages"][0]["of_another_version"] = 1
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(values))
    with pytest.raises(RunError, match=r"(?s)cannot be read\.\n.*of_another_version.*\nGo on with the version"):
        opened(tmp_path)


def test_open_compares_inputs_of_unfinished_stages(tmp_path: Path):
    rows = {"distil": {"training rows": "40 rows, aa", "held-out rows": "4 rows, bb"}}
    RunDir.open(tmp_path, RECIPE, rows).close()
    stage = begun(tmp_path)
    RunDir.open(tmp_path, RECIPE, rows).close()
    other = {"distil": {**rows["distil"], "training rows": "3 rows, cc"}}
    with pytest.raises(RunError, match="\n  distil, training rows: 40 rows, aa -> 3 rows, cc\n"):
        RunDir.open(tmp_path, RECIPE, other)
    assert json.loads((tmp_path / "inputs.json").read_text()) == rows
    stage.mark_done({})
    RunDir.open(tmp_path, RECIPE, other).close()
    (stage.path / "done.json").unlink()
    RunDir.open(tmp_path, RECIPE, rows, accept=True).close()
    assert len((tmp_path / "changes.jsonl").read_text().splitlines()) == 1


def test_open_refuses_folder_of_other_content(tmp_path: Path):
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(
        RunError, match=r"is not a run directory: it holds 'thesis\.tex' and no recipe\.yaml \(1 entries"
    ):
        opened(tmp_path)
    assert names(tmp_path) == ["thesis.tex"]


def test_open_takes_folder_of_killed_first_start(tmp_path: Path):
    (tmp_path / ".lock").touch()
    (tmp_path / ".recipe.yaml.writing-17").write_text("name")
    opened(tmp_path).close()
    assert names(tmp_path) == [".lock", "environment.json", "inputs.json", "recipe.yaml"]


def test_open_raises_run_error_when_path_is_no_folder(tmp_path: Path):
    file = tmp_path / "file"
    file.write_text("x")
    with pytest.raises(RunError, match=r"file is a file, and a run needs a folder\. Use another output_dir=\.\.\., or"):
        opened(file)
    with pytest.raises(RunError, match=r"file/run cannot be written \(Not a directory\)\. .*another output_dir"):
        opened(file / "run")


def test_open_raises_run_error_when_writing_is_denied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    # Simulated, since a superuser may write anywhere.
    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "write_bytes", refuse)
    with pytest.raises(RunError, match=r"\.holder\.json cannot be written \(Permission denied\)\. Free space or allow"):
        opened(tmp_path)
    assert names(tmp_path) == [".lock"]


@pytest.mark.parametrize("name", ["", ".hidden", "a/b", "..", "recipe.yaml", "tensorboard"])
def test_stage_refuses_name_that_is_no_folder(tmp_path: Path, name: str):
    with pytest.raises(
        ConfigError, match=re.escape(f"A stage cannot be named {name!r}: its folder has the same name.")
    ):
        opened(tmp_path).stage(name)


def test_stage_raises_run_error_when_folder_cannot_be_made(tmp_path: Path):
    run = opened(tmp_path)
    (tmp_path / "distil").write_text("x")
    with pytest.raises(RunError, match="distil cannot be written"):
        run.stage("distil")


def test_append_metrics_writes_equal_bytes_for_equal_runs(tmp_path: Path):
    written = []
    for name in ("a", "b"):
        stage = opened(tmp_path / name).stage("distil")
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
        stage.write_samples(step, [{"prompt": str(step)}])
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
    unit = {"student_start": 0, "student_end": 2, "teacher_start": 0, "teacher_end": 1}
    rows = [
        {"prompt_id": 3, "response": "4 .", "reward": 1.0, "response_ids": [19, 30], "units": [unit]},
        {"prompt_id": 4, "response": "é\n", "response_ids": [], "signal": [None, 0.5], "student_top_ids": [[1, 2], []]},
    ]
    file = stage.write_samples(12, rows)
    assert file == stage.samples / "step_000012.parquet"
    full = [{name: row.get(name) for name in NAMES} for row in rows]
    assert pq.read_table(file).to_pylist() == full
    stage.write_samples(12, rows[:1])
    assert pq.read_table(file).to_pylist() == full[:1]
    stage.write_samples(13, [])
    assert names(stage.samples) == ["step_000012.parquet", "step_000013.parquet"]


def test_sample_file_states_schema_format_and_reward(stage: StageDir):
    exact = {"name": "exact", "correctness": True}
    stage = replace(stage, reward=exact, measured_by=exact)
    for file in (stage.write_samples(1, [{"prompt": "x"}]), stage.write_held_out("before", [{"prompt": "x"}])):
        found = pq.read_schema(file)
        assert found.remove_metadata() == schema().remove_metadata()
        assert json.loads(found.metadata[b"opd"]) == {"format": 2, "library": opd.__version__, "reward": exact}
        assert pq.ParquetFile(file).metadata.row_group(0).column(0).compression == "ZSTD"


def test_write_samples_refuses_other_types_and_columns(stage: StageDir):
    with pytest.raises(
        DataError, match=r"step_000002\.parquet: column 'answer' holds values that are no string \(.*\)\. Use one type"
    ):
        stage.write_samples(2, [{"answer": 4}, {"answer": "four"}])
    with pytest.raises(AssertionError, match="no columns of the format: \\['b'\\]"):
        stage.write_samples(2, [{"prompt": "x"}, {"prompt": "x", "b": 2}])
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

    monkeypatch.setattr(os, broken, full)
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
