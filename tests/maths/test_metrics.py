"""Metrics combine to the same number however a batch is split; trackers get every point, and only when asked."""

from __future__ import annotations

import json
import math
import os
import pickle
import re
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from opd.errors import ConfigError, RunError, TrainingError
from opd.files import append_line, check_finite, read_lines
from opd.maths.metrics import Metrics, merged
from opd.stage.trackers import ReportWriter, check_report_to


def test_metrics_mean_equals_totals_over_counts():
    metrics = Metrics()
    metrics.mean("train/loss", 10.0, 4)
    metrics.mean("train/loss", 2.0, 8)
    assert metrics.reduce() == {"train/loss": 1.0}  # a mean of means would be 1.375


def test_metrics_reduce_gives_every_kind_with_sorted_names():
    metrics = Metrics()
    for value in (3.0, 1.0, 2.0):
        metrics.sum("z/sum", value)
        metrics.max("b/max", value)
    metrics.value("optim/learning_rate", 1e-5)
    reduced = metrics.reduce()
    assert reduced == {"b/max": 3.0, "optim/learning_rate": 1e-5, "z/sum": 6.0}
    assert list(reduced) == sorted(reduced)


def test_metrics_merge_equals_recording_in_one():
    numbers = [(1.5, 2.0), (-4.0, 3.0), (0.5, 1.0), (8.0, 5.0)]
    whole, parts = Metrics(), [Metrics(), Metrics(), Metrics()]
    for i, (total, count) in enumerate(numbers):
        for metrics in (whole, parts[i % 2]):
            metrics.mean("a/mean", total, count)
            metrics.sum("a/sum", total)
            metrics.max("a/max", total)
    parts[0].value("a/value", 7.0)
    whole.value("a/value", 7.0)
    merged = Metrics()
    for part in parts:
        merged.merge(part)
    assert merged.reduce() == whole.reduce()
    assert parts[1].reduce()["a/sum"] == 4.0  # merging leaves the part alone


def test_metrics_mean_is_absent_when_count_is_zero():
    metrics = Metrics()
    metrics.mean("support/mass", 0.0, 0)
    assert metrics.reduce() == {}
    metrics.mean("support/mass", 3.0, 2)
    assert metrics.reduce() == {"support/mass": 1.5}


def spread_of(columns):
    return {"a/spread": float(columns["x"].max() - columns["x"].min()), "a/first": float(columns["y"][0])}


def test_metrics_rows_are_summarised_after_merge():
    whole, parts = Metrics(), [Metrics(), Metrics(), Metrics()]
    rows = [(3.0, 1.0), (1.0, 2.0), (7.0, 0.0), (1.0, -5.0)]
    whole.rows(spread_of, x=[x for x, _ in rows], y=[y for _, y in rows])
    for i, (x, y) in enumerate(reversed(rows)):
        parts[i % 2].rows(spread_of, x=[x], y=[y])
    for part in parts:
        part.mean("a/mean", 1.0, 1)
    together = merged(pickle.loads(pickle.dumps(parts))).reduce()
    # Rows are sorted by their columns in turn: the first one is (1, -5).
    assert together == {"a/first": -5.0, "a/mean": 1.0, "a/spread": 6.0}
    assert {name: together[name] for name in whole.reduce()} == whole.reduce()
    assert list(together) == sorted(together)


def test_metrics_rows_give_no_number_when_empty():
    metrics = Metrics()
    metrics.rows(spread_of, x=[], y=[])
    assert metrics.reduce() == {}
    metrics.rows(spread_of, x=[1.0], y=[2.0])
    assert metrics.reduce() == {"a/first": 2.0, "a/spread": 0.0}


def test_metrics_rows_raise_assertion_when_misused():
    metrics = Metrics()
    with pytest.raises(AssertionError, match="columns of one table have one length"):
        metrics.rows(spread_of, x=[1.0], y=[])
    metrics.rows(spread_of, x=[1.0], y=[1.0])
    metrics.sum("a/first", 1.0)
    with pytest.raises(AssertionError, match=r"recorded twice: {'a/first'}"):
        metrics.reduce()


@pytest.mark.parametrize("order", [(math.nan, 1.0), (1.0, math.nan)])
def test_metrics_max_keeps_nan(order):
    metrics = Metrics()
    for value in order:
        metrics.max("a/max", value)
    assert all(math.isnan(value) for value in metrics.reduce().values())


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (lambda m: (m.sum("a/b", 1), m.max("a/b", 1)), "metric 'a/b' is a sum and was also recorded as a max"),
        (
            lambda m: (m.value("a/b", 1), m.value("a/b", 1)),
            "metric 'a/b' is one value of the step and was set a second",
        ),
        (lambda m: m.sum("loss", 1), "metric 'loss' is not named `namespace/name`"),
        (lambda m: m.sum("/loss", 1), "metric '/loss' is not named"),
        (lambda m: m.mean("a/b", 1, -1), "a/b: a mean over -1 things"),
    ],
)
def test_metrics_raise_assertion_when_misused(record: Callable[[Metrics], Any], message: str):
    with pytest.raises(AssertionError, match=re.escape(message)):
        record(Metrics())


def test_metrics_merge_raises_assertion_when_value_is_set_twice():
    left, right = Metrics(), Metrics()
    left.value("a/b", 1)
    right.value("a/b", 1)
    with pytest.raises(AssertionError, match="set a second time"):
        left.merge(right)


def test_append_line_writes_json_with_step_first(tmp_path: Path):
    file = tmp_path / "metrics.jsonl"
    append_line(file, 0, {"b/x": 1, "a/y": 0.1})
    append_line(file, 1, {})
    assert file.read_text() == '{"step": 0, "a/y": 0.1, "b/x": 1}\n{"step": 1}\n'
    assert [row for _, row in read_lines(file)] == [{"step": 0, "a/y": 0.1, "b/x": 1}, {"step": 1}]


def test_read_lines_skips_partial_last_line_and_names_damaged(tmp_path: Path):
    file = tmp_path / "metrics.jsonl"
    assert read_lines(file) == []
    append_line(file, 0, {"a/b": 1.0})
    whole = file.read_bytes()
    file.write_bytes(whole + whole[:-3])
    assert [row["step"] for _, row in read_lines(file)] == [0]
    for damage in (b'{"step": 1, "a/', b"[1]", b'{"a/b": 2}', b"\0\0\0"):
        file.write_bytes(whole + damage + b"\n" + whole)
        with pytest.raises(RunError, match=r"metrics\.jsonl, line 2 is damaged .* Remove that line to continue"):
            read_lines(file)


def test_append_line_raises_run_error_when_not_writable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(RunError, match=r"missing/m\.jsonl could not be written \(No such file or directory\)\. Free"):
        append_line(tmp_path / "missing" / "m.jsonl", 0, {})
    (tmp_path / "folder").mkdir()
    with pytest.raises(RunError, match=r"folder cannot be read \(Is a directory\)"):
        read_lines(tmp_path / "folder")
    monkeypatch.setattr("opd.files.os.write", lambda descriptor, line: len(line) - 1)
    with pytest.raises(RunError, match=r"took only 11 of the 12 bytes of step 3 \(disk full\?\)\. Free space"):
        append_line(tmp_path / "m.jsonl", 3, {})


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_append_line_refuses_non_finite_numbers(tmp_path: Path, value: float):
    with pytest.raises(TrainingError, match=f"In step 4, 'train/loss' is {value}.*checkpoints are untouched"):
        append_line(tmp_path / "m.jsonl", 4, {"a/b": 1.0, "train/loss": value})
    assert not (tmp_path / "m.jsonl").exists()
    with pytest.raises(TrainingError, match=re.escape(f"In the summary, 'eval.scores[1]' is {value}")):
        check_finite("the summary", {"eval": {"name": "x", "scores": [1.0, value]}})


def test_report_writer_writes_no_file_when_trackers_are_empty(tmp_path: Path):
    code = (
        "import sys, pathlib; from opd.stage.trackers import ReportWriter; "
        "w = ReportWriter([], folder=pathlib.Path(sys.argv[1]) / 'run', name='n'); "
        "w.log('s', 0, {'a/b': 1.0}); w.close(); "
        "print(sorted({'torch', 'tensorboard', 'wandb', 'trackio'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
    assert list(tmp_path.iterdir()) == []


def test_check_report_to_refuses_unknown_and_repeated_trackers():
    with pytest.raises(ConfigError, match=r"'tensorbord' is unknown\. Did you mean 'tensorboard'\? Known: \['tensor"):
        check_report_to(["tensorbord"])
    with pytest.raises(ConfigError, match="names 'tensorboard' twice"):
        check_report_to(["tensorboard", "tensorboard"])


@pytest.mark.parametrize(
    ("tracker", "missing"), [("wandb", "wandb"), ("trackio", "trackio"), ("tensorboard", "torch.utils.tensorboard")]
)
def test_report_writer_names_package_to_install_when_missing(
    tracker, missing, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(ConfigError, match=rf"{tracker} cannot be imported .* pip install 'opd\[report\]' or leave"):
        ReportWriter([tracker], folder=tmp_path, name="n")


def test_check_report_to_refuses_package_folder_without_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "wandb" / "run-1").mkdir(parents=True)
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    with pytest.raises(ConfigError, match=r"only a folder named wandb without code .* pip install 'opd\[report\]'"):
        check_report_to(["wandb"])
    sys.modules.pop("wandb", None)


def test_tensorboard_replaces_steps_that_are_written_again(tmp_path: Path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    for first, scale in ((0, 1.0), (2, 10.0)):
        writer = ReportWriter(["tensorboard"], folder=tmp_path, name="n")
        for step in range(first, 4):
            writer.log("distil", step, {"train/loss": scale * step, "eval/score": 0.5})
        writer.log("other", 0, {"train/loss": 1.0})
        writer.close()
        writer.close()
    assert sorted(p.name for p in (tmp_path / "tensorboard").iterdir()) == ["distil", "other"]
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard" / "distil")).Reload()
    points = [(event.step, event.value) for event in events.Scalars("train/loss")]
    assert points == [(0, 0.0), (1, 1.0), (2, 20.0), (3, 30.0)]
    assert events.Tags()["scalars"] == ["train/loss", "eval/score"]


class FakeRun:
    def __init__(self, calls: list[Any]) -> None:
        self.calls = calls

    def define_metric(self, name: str, step_metric: str | None = None) -> None:
        self.calls.append(("define", name, step_metric))

    def log(self, data: dict[str, float]) -> None:
        self.calls.append(("log", data))

    def finish(self) -> None:
        self.calls.append("finish")


def fake_wandb(monkeypatch: pytest.MonkeyPatch, **attributes: Any) -> None:
    package = types.ModuleType("wandb")
    package.__file__ = "wandb/__init__.py"
    vars(package).update({"run": None, "Error": type("Error", (Exception,), {})} | attributes)
    monkeypatch.setitem(sys.modules, "wandb", package)


def test_wandb_keeps_run_id_when_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    inits: list[dict[str, Any]] = []
    calls: list[Any] = []
    fake_wandb(monkeypatch, init=lambda **options: inits.append(options) or FakeRun(calls))
    for _ in range(2):
        writer = ReportWriter(["wandb"], folder=tmp_path, name="demo", config={"seed": 1})
        writer.log("cold-start", 5, {"train/loss": 2.0})
        writer.log("distil", 0, {"train/loss": 1.0})
        writer.log("distil", 1, {"train/loss": 0.5})
        writer.close()
        writer.close()
    assert calls[: len(calls) // 2] == calls[len(calls) // 2 :] == [
        ("define", "cold-start/step", None),
        ("define", "cold-start/*", "cold-start/step"),
        ("log", {"cold-start/step": 5, "cold-start/train/loss": 2.0}),
        ("define", "distil/step", None),
        ("define", "distil/*", "distil/step"),
        ("log", {"distil/step": 0, "distil/train/loss": 1.0}),
        ("log", {"distil/step": 1, "distil/train/loss": 0.5}),
        "finish",
    ]  # fmt: skip
    assert inits[0] == inits[1]
    assert re.fullmatch(r"[0-9a-f]{8}", inits[0].pop("id"))
    common = {"project": "opd", "name": "demo", "resume": "allow", "dir": str(tmp_path), "config": {"seed": 1}}
    assert inits[0] == common


def test_wandb_run_id_differs_by_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    ids: list[str] = []
    fake_wandb(monkeypatch, init=lambda **options: ids.append(options["id"]) or FakeRun([]))
    for folder in ("a", "b"):
        ReportWriter(["wandb"], folder=tmp_path / folder, name="demo").close()
    assert ids[0] != ids[1]


def test_wandb_uses_open_run_and_leaves_it_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    calls: list[Any] = []
    fake_wandb(monkeypatch, run=FakeRun(calls))
    writer = ReportWriter(["wandb"], folder=tmp_path, name="demo")
    writer.log("distil", 0, {"a/b": 1.0})
    writer.close()
    assert calls[-1] == ("log", {"distil/step": 0, "distil/a/b": 1.0})


def test_wandb_raises_config_error_when_start_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    error = type("Error", (Exception,), {})

    def init(**_: Any) -> None:
        raise error("No API key configured")

    fake_wandb(monkeypatch, init=init, Error=error)
    with pytest.raises(ConfigError, match=r"did not start a run \(No API key configured\)\. .*`wandb login`.*offline"):
        ReportWriter(["wandb"], folder=tmp_path, name="demo")


def test_trackio_keeps_every_point_of_every_stage(tmp_path: Path):
    pytest.importorskip("trackio")
    # A process of its own: trackio reads TRACKIO_DIR when it is imported.
    code = """
import sys, pathlib, sqlite3
from opd.stage.trackers import ReportWriter
folder = pathlib.Path(sys.argv[1])
for first in (0, 2):
    writer = ReportWriter(["trackio"], folder=folder / "run", name="demo", config={"seed": 1})
    for step in range(first, first + 2):
        writer.log("cold-start", step, {"train/loss": step / 2})
    writer.log("distil", first, {"train/loss": 1.0})
    writer.close()
(database,) = folder.glob("db/*.db")
rows = sqlite3.connect(database).execute("select run_name, step, metrics from metrics order by id").fetchall()
import json
pathlib.Path(sys.argv[1], "rows.json").write_text(json.dumps([(n, s, json.loads(m)) for n, s, m in rows]))
"""
    environment = os.environ | {"TRACKIO_DIR": str(tmp_path / "db"), "HF_HUB_OFFLINE": "1"}
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], env=environment, check=True, capture_output=True)
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert {name for name, _, _ in rows} == {"demo-" + (tmp_path / "run" / "report_id.txt").read_text().strip()}
    assert [row[1:] for row in rows] == [
        [0, {"cold-start/train/loss": 0.0}],
        [1, {"cold-start/train/loss": 0.5}],
        [0, {"distil/train/loss": 1.0}],
        [2, {"cold-start/train/loss": 1.0}],
        [3, {"cold-start/train/loss": 1.5}],
        [2, {"distil/train/loss": 1.0}],
    ]
