"""The disk space that a stage needs: what it will have at most, less what it has."""

from __future__ import annotations

import shutil
import sys
from collections import namedtuple
from pathlib import Path

import pytest
from support.models import tiny
from support.runs import Ended, command, one_stage, prepare

from opd import methods
from opd.recipe.load import parse_recipe
from opd.runs.space import Space, space_of
from opd.stage import checkpoint
from opd.stage.folder import StageDir


def test_space_counts_average_of_ema_teacher(tmp_path: Path):
    spec = parse_recipe(one_stage()).stages[0]
    student = tiny()
    weights = checkpoint.size_of(student.trainable())

    def size(teacher: str) -> int:
        options = {"teacher": teacher, "template": "{privileged_context}{prompt}"}
        method = methods.build("context_distillation", options)
        return space_of(spec, method, student, StageDir(tmp_path)).checkpoint

    assert size("frozen") == 3 * weights
    assert size("ema") == 4 * weights


@pytest.mark.parametrize("keep", [1, 2, 3])
@pytest.mark.parametrize("there", [0, 1, 2, 3, 5])
@pytest.mark.parametrize("sizes", [(10, 4), (3, 100)], ids=["all weights", "LoRA"])
def test_space_needed_is_peak_of_writing(keep: int, there: int, sizes: tuple[int, int]):
    """Saved 9 times and ended, step by step: a checkpoint is written beside the others, then the oldest are removed."""
    size, model = sizes
    most, now = 0, there
    for _ in range(9):
        most = max(most, (now + 1) * size)
        now = min(now + 1, keep)
    most = max(most, now * size + model)
    assert Space(checkpoint=size, model=model, keep=keep, there=there).needed == most - there * size


@pytest.fixture
def stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run that failed after step 4, with the checkpoints of steps 2 and 4."""
    recipe = one_stage(
        method="grpo",
        teacher=None,
        reward={"name": "mine:reward"},
        sampling={"max_completion_length": 3, "n": 2},
        steps=6,
        checkpoint={"every": 2, "keep": 2},
    )
    monkeypatch.chdir(prepare(tmp_path / "work", recipe))
    monkeypatch.setattr(sys, "path", list(sys.path))
    sys.modules.pop("mine", None)
    Path("mine.py").write_text(
        "calls = 0\n\n\ndef reward(prompt, text):\n    global calls\n    calls += 1\n"
        "    assert calls != 17, 'a stop'\n    return 1.0\n"
    )
    ended = command("train", "recipe.yaml")
    assert ended.code == 1, ended
    assert "a stop" in ended.err
    assert len(list(Path("run/distil/checkpoints").glob("step_*"))) == 2
    return Path.cwd()


def with_free(monkeypatch: pytest.MonkeyPatch, free: int) -> Ended:
    usage = namedtuple("usage", ["total", "used", "free"])
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: usage(1 << 40, (1 << 40) - free, free))
        return command("train", "recipe.yaml")


def test_stopped_run_goes_on_with_room_for_one_checkpoint(stopped: Path, monkeypatch: pytest.MonkeyPatch):
    saved = sum(file.stat().st_size for file in Path("run/distil/checkpoints/step_000004").glob("*.safetensors"))
    refused = with_free(monkeypatch, saved // 2)
    assert refused.code == 1
    assert "more than its 2 checkpoints that are there" in refused.err
    assert "or move the folder to another disk and leave a symbolic link to it" in refused.err
    assert "output_dir" not in refused.err
    assert len(list(Path("run/distil/checkpoints").glob("step_*"))) == 2
    Path("elsewhere").mkdir()
    shutil.move("run", "elsewhere/run")
    Path("run").symlink_to(Path("elsewhere/run").absolute())
    ended = with_free(monkeypatch, saved)
    assert ended.code == 0, ended.err
    assert "distil: continuing after step 4 of 6" in ended.out
    assert Path("elsewhere/run/distil/model/config.json").exists()
