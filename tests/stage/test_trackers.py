"""Trackers get every point, and only those that report_to names."""

from __future__ import annotations

import html
import json
import os
import re
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest
from support.runs import one_stage, prepare

from opd.commands.check import check_recipe
from opd.errors import ConfigError, TrainingError
from opd.recipe.load import load_recipe
from opd.runs.stages import run_recipe
from opd.stage import trackers
from opd.stage.progress import Progress
from opd.stage.trackers import ReportWriter, check_report_to
from opd.types import Image


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


def row(i: int, **changes: Any) -> dict[str, Any]:
    response = f"response {i}"
    return {
        "prompt_id": i,
        "sample": 0,
        "prompt": f"prompt {i}",
        "response": response,
        "response_tokens": ["response", f" {i}", "<|end|>"],
        "reward": 1.0,
        "finished": True,
        "policy_logp": [-1.0, -2.0, -3.0],
        "teacher_logp": [-0.5, -0.5, -0.5],
        "pick": None,
        **changes,
    }


def test_table_has_picked_responses_first():
    rows = [row(0, pick="follow"), row(1), row(2, pick="most"), row(3, pick="least")]
    shown = trackers.completions(rows, 3)
    assert [one["prompt_id"] for one in shown] == [2, 3, 1]
    assert shown[0]["response"] == "response 2<|end|>"
    assert shown[0]["log_ratio"] == pytest.approx(1.5)
    assert trackers.completions(rows, 0) == []
    assert "images" not in shown[0]
    assert trackers.completions([row(0, policy_logp=None)], 1)[0]["log_ratio"] is None


def test_table_names_copies_of_images():
    images = tuple(Image(name=str(n), digest=str(n) * 64) for n in range(2))
    shown = trackers.completions([row(0, images=images), row(1)], 2)
    assert [one["images"] for one in shown] == [f"images/{'0' * 32}.png images/{'1' * 32}.png", ""]


def test_tensorboard_shows_hostile_texts_as_they_are(tmp_path: Path):
    """The text that TensorBoard makes of the table's Markdown is the response, and no element of it."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    from tensorboard.plugin_util import markdown_to_safe_html

    hostile = "<b>bold</b> **strong** | a\n# head `code` [x](http://example.org) \x1b \u202e <script>x</script>"
    writer = ReportWriter(["tensorboard"], folder=tmp_path, name="n")
    writer.table("distil", 10, [row(0, response_tokens=[hostile]), row(1)])
    writer.close()
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard" / "distil")).Reload()
    (tag,) = events.Tags()["tensors"]
    (event,) = events.Tensors(tag)
    page = markdown_to_safe_html(event.tensor_proto.string_val[0])
    assert (tag, event.step) == ("completions/text_summary", 10)
    assert page.count("<tr>") == 3
    assert not any(f"<{name}" in page for name in ("b>", "strong", "h1", "code", "a ", "script"))
    assert "[x](http://example.org)" in html.unescape(page)
    assert "\x1b" not in page


def test_wandb_gets_table_under_stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    calls: list[Any] = []
    table = lambda columns, data: (columns, data)  # noqa: E731
    fake_wandb(monkeypatch, init=lambda **options: FakeRun(calls), Table=table)
    writer = ReportWriter(["wandb"], folder=tmp_path, name="demo", samples=1)
    writer.table("distil", 10, [row(0), row(1)])
    (_, logged) = calls[-1]
    columns, data = logged["distil/completions"]
    assert logged["distil/step"] == 10
    assert columns[:2] == ["prompt_id", "sample"]
    assert [one[0] for one in data] == [0]


def test_trackers_are_closed_when_training_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    closed: list[str] = []

    def opened(folder: Path, name: str, project: str, config: dict[str, Any]) -> trackers._Tracker:
        return trackers._Tracker(
            lambda stage, step, metrics: None, lambda stage, step, rows: None, lambda: closed.append(name)
        )

    monkeypatch.setitem(trackers._TRACKERS, "fake", ("json", opened))
    folder = prepare(tmp_path / "work", one_stage(optimizer={"learning_rate": 1e30, "max_grad_norm": 1e30}))
    monkeypatch.chdir(folder)
    recipe = load_recipe("recipe.yaml").model_copy(update={"report_to": ["fake"]})
    with pytest.raises(TrainingError):
        run_recipe(recipe, progress=Progress(quiet=True))
    assert closed == [recipe.name]


def test_check_recipe_refuses_stage_named_as_a_tracker_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(prepare(tmp_path / "work", one_stage(name="wandb")))
    with pytest.raises(ConfigError, match="A stage cannot be named 'wandb'"):
        check_recipe(load_recipe("recipe.yaml"))


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
