"""A checkpoint is complete or absent: under a kill at every point, a full disk, and damage afterwards."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from opd.errors import RunError
from opd.stage import checkpoint
from opd.stage.checkpoint import Checkpoint, latest, load, save, size_of, sweep

# The files of `write`: one process, two groups of tensors.
MOMENTS, STUDENT = "shard-00001-model-00001-of-00002.safetensors", "shard-00001-model-00002-of-00002.safetensors"


def write(folder: Path, step: int, value: float | None = None, **options: Any) -> Path:
    fill = float(step) if value is None else value
    return save(
        folder,
        step,
        tensors={"student": {"w": torch.full((50, 7), fill)}, "moments": {"w": torch.full((3,), fill)}},
        state={"step": step, "order": [1, 2]},
        **options,
    )


def value_of(path: Path | None) -> float:
    assert path is not None
    loaded = load(path)
    values = {float(loaded.tensors["student"]["w"][0, 0]), float(loaded.tensors["moments"]["w"][0])}
    assert len(values) == 1
    return values.pop()


def names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


def test_load_equals_saved_tensors_and_state(tmp_path: Path):
    generator = torch.Generator().manual_seed(0)
    tensors: dict[str, dict[str, Tensor]] = {
        "student": {
            "half": torch.randn(5, 3, generator=generator).bfloat16(),
            "transposed": torch.randn(4, 6, generator=generator).t(),
            "slice": torch.arange(20)[3:9:2],
            "scalar": torch.tensor(3.5, dtype=torch.float64),
            "empty": torch.zeros(0, 4),
            "mask": torch.tensor([True, False]),
        },
        "ema": {"nan": torch.tensor([float("nan"), float("inf")])},
        "nothing": {},
        "rng": {"torch": generator.get_state()},
    }
    state = {"step": 12, "seed": 0, "ratio": 0.1 + 0.2, "names": ["é", None, True]}
    path = save(tmp_path / "checkpoints", 12, tensors=tensors, state=state)
    assert path == tmp_path / "checkpoints" / "step_000012"
    assert names(path) == [*(f"shard-00001-model-0000{n}-of-00003.safetensors" for n in (1, 2, 3)), "state.json"]
    loaded = load(path)
    assert isinstance(loaded, Checkpoint)
    assert (loaded.step, loaded.state) == (12, state)
    del tensors["nothing"]  # a group without tensors leaves no trace
    torch.testing.assert_close(loaded.tensors, tensors, rtol=0, atol=0, equal_nan=True)


def test_load_keeps_type_and_refuses_other_shape(tmp_path: Path):
    path = write(tmp_path, 3)
    like = torch.zeros(50, 7, dtype=torch.bfloat16, requires_grad=True)
    read = load(path, like={"student": {"w": like}, "other": {"w": like}}).tensors["student"]["w"]
    assert read.dtype is torch.float32, "a checkpoint keeps its own type"
    assert not read.requires_grad
    assert read.equal(torch.full((50, 7), 3.0))
    with pytest.raises(RunError, match=r"w has the shape \(50, 7\) instead of \(7, 50\)"):
        load(path, like={"student": {"w": like.detach().t()}})


def test_save_writes_tied_tensors_apart_and_keeps_tie(tmp_path: Path):
    weight = nn.Parameter(torch.arange(12.0).view(3, 4))
    group = {"embedding": weight, "head": weight, "rows": weight[1:], "flat": weight.view(-1)}
    loaded = load(save(tmp_path, 0, tensors={"student": group}, state={})).tensors["student"]
    torch.testing.assert_close(loaded, {k: v.detach() for k, v in group.items()}, rtol=0, atol=0)
    assert group["embedding"].data_ptr() == group["head"].data_ptr()


def test_size_of_sums_tensor_bytes():
    shared = torch.zeros(10, dtype=torch.bfloat16)
    assert size_of({"a": {"x": shared, "y": shared}, "b": {"z": torch.zeros(2, 3)}}) == 20 + 20 + 24
    assert size_of([{"state": [torch.zeros(4)], "step": 3}]) == 16
    assert size_of({}) == 0


def test_save_rotates_older_checkpoints_and_keeps_later(tmp_path: Path):
    for step in (2, 4, 6, 8):
        write(tmp_path, step)
    assert names(tmp_path) == ["step_000006", "step_000008"]
    write(tmp_path, 7, keep=1)
    assert names(tmp_path) == ["step_000007", "step_000008"]
    write(tmp_path, 10, keep=5)
    assert names(tmp_path) == ["step_000007", "step_000008", "step_000010"]


def test_latest_orders_by_step_and_ignores_everything_else(tmp_path: Path):
    assert latest(tmp_path / "missing") is None
    assert latest(tmp_path) is None
    write(tmp_path, 999_999)
    write(tmp_path, 1_000_000)
    for other in (".writing-step_2000000-1", ".replaced-step_2000000-1", "step_final", "best"):
        (tmp_path / other).mkdir()
    (tmp_path / "step_3000000").write_text("a file")
    assert latest(tmp_path) == tmp_path / "step_1000000"


def test_sweep_removes_leftovers_and_nothing_else(tmp_path: Path):
    write(tmp_path, 3)
    for leftover in (".writing-step_000004-1", ".removing-step_000001-22", ".replaced-step_000003-1"):
        (tmp_path / leftover).mkdir()
        (tmp_path / leftover / "student.safetensors").write_text("half")
    (tmp_path / ".mine").mkdir()
    assert [path.name for path in sweep(tmp_path)] == [
        *(".removing-step_000001-22", ".replaced-step_000003-1", ".writing-step_000004-1")
    ]
    assert names(tmp_path) == [".mine", "step_000003"]
    assert value_of(latest(tmp_path)) == 3.0
    assert sweep(tmp_path) == sweep(tmp_path / "missing") == []


def test_sweep_names_leftover_when_removal_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / ".writing-step_000004-1").mkdir()

    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(checkpoint.shutil, "rmtree", refuse)
    with pytest.raises(
        RunError, match=r"step_000004-1 is left from an interrupted write .*\(Permission denied\)\. Remove"
    ):
        sweep(tmp_path)


def test_save_overwrites_leftover_of_same_process_id(tmp_path: Path):
    leftover = tmp_path / f".writing-step_000004-{os.getpid()}"
    leftover.mkdir()
    (leftover / "old.safetensors").write_text("half")
    path = write(tmp_path, 4)
    assert names(path) == [MOMENTS, STUDENT, "state.json"]
    assert names(tmp_path) == ["step_000004"]


def test_save_replaces_same_step(tmp_path: Path):
    write(tmp_path, 2)
    write(tmp_path, 4, 1.0)
    write(tmp_path, 4, 2.0)
    assert names(tmp_path) == ["step_000002", "step_000004"]
    assert value_of(latest(tmp_path)) == 2.0


def test_save_restores_old_checkpoint_when_replacement_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    write(tmp_path, 4, 1.0)
    rename = os.rename

    def fail_once(source: Path, target: Path) -> None:
        if ".writing-" in str(source):
            raise OSError(5, "Input/output error")
        rename(source, target)

    monkeypatch.setattr(checkpoint.os, "rename", fail_once)
    with pytest.raises(RunError, match=r"step 4 could not be written .*Input/output error.*step_000004 is complete"):
        write(tmp_path, 4, 2.0)
    assert names(tmp_path) == ["step_000004"]
    assert value_of(latest(tmp_path)) == 1.0


KILLED = """
import os, signal, sys
from pathlib import Path
import safetensors.torch, torch
from opd.stage import checkpoint
from opd.stage.checkpoint import save

torch.set_num_threads(1)
root, call, kills, first, second = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), int(sys.argv[5])


def write(folder, step, value):
    tensors = {"student": {"w": torch.full((50, 7), value)}, "moments": {"w": torch.full((3,), value)}}
    save(folder, step, tensors=tensors, state={}, keep=1)


module, name = {"fsync": (os, "fsync"), "rename": (os, "rename"), "rmtree": (checkpoint.shutil, "rmtree"),
                "save": (safetensors.torch, "save")}[call]
real = getattr(module, name)
for nth in range(1, kills + 1):
    folder = root / f"{call}-{nth}"
    write(folder, first, 1.0)
    child = os.fork()
    if child == 0:
        calls = 0

        def kill_at_nth(*arguments, **options):
            global calls
            calls += 1
            if calls == nth:
                if call == "save":  # into a file that is open by now
                    part = next(next(folder.glob(".writing-*")).glob(f"*{nth:05}-of-*"))
                    part.write_bytes(b"half of it")
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*arguments, **options)

        setattr(module, name, kill_at_nth)
        write(folder, second, 2.0)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    print(nth, -os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status))
"""


def killed_at(root: Path, call: str, kills: int, first: int, second: int) -> list[Path]:
    """One folder a kill: the checkpoint of `first` (1.0), and a save of `second` (2.0) killed at its n-th call."""
    arguments = [str(root), call, *map(str, (kills, first, second))]
    done = subprocess.run([sys.executable, "-c", KILLED, *arguments], capture_output=True, text=True, check=True)
    assert done.stdout.split() == [text for n in range(1, kills + 1) for text in (str(n), str(-signal.SIGKILL))]
    return [root / f"{call}-{n}" for n in range(1, kills + 1)]


def resumed_value(folder: Path) -> float:
    """What a process that starts now would continue from; its next save has to work too."""
    sweep(folder)
    value = value_of(latest(folder))
    assert not any(name.startswith(".") for name in names(folder))
    assert value_of(write(folder, 99, 99.0)) == 99.0
    return value


def test_save_keeps_previous_when_killed_between_writes(tmp_path: Path):
    # The n-th fsync: the moments' file, the student's, state.json, the folder, then its parent after the rename.
    folders = killed_at(tmp_path, "fsync", 5, first=2, second=4)
    found = [latest(folder) for folder in folders]  # before sweep: leftovers are ignored
    assert [path.name for path in found if path] == ["step_000002"] * 4 + ["step_000004"]
    assert names(folders[0])[0].startswith(".writing-step_000004-")
    assert [resumed_value(folder) for folder in folders] == [1.0, 1.0, 1.0, 1.0, 2.0]


def test_save_keeps_previous_when_killed_inside_file(tmp_path: Path):
    assert [resumed_value(folder) for folder in killed_at(tmp_path, "save", 2, first=2, second=4)] == [1.0, 1.0]


def test_save_keeps_one_checkpoint_when_killed_in_rotation(tmp_path: Path):
    # The n-th rename: into place, then the older one out of the way.
    assert [resumed_value(folder) for folder in killed_at(tmp_path, "rename", 2, first=2, second=4)] == [1.0, 2.0]
    # The n-th rmtree: a leftover of the same process id, one of the rotation, the older checkpoint.
    assert [resumed_value(folder) for folder in killed_at(tmp_path, "rmtree", 3, first=2, second=4)] == [1.0, 2.0, 2.0]


def test_save_keeps_old_step_when_killed_in_replacement(tmp_path: Path):
    # The n-th rename: the old one aside, then the new one into place.
    folders = killed_at(tmp_path, "rename", 2, first=4, second=4)
    assert latest(folders[1]) is None  # the one moment without the name; sweep gives it back
    assert [resumed_value(folder) for folder in folders] == [1.0, 1.0]


def full_disk(*_: object, **__: object) -> None:
    raise OSError(28, "No space left on device")


def full_disk_in_rust(*_: object, **__: object) -> None:
    raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")


@pytest.mark.parametrize(
    ("function", "failure"),
    [
        ("safetensors.torch.save", full_disk_in_rust),
        ("torch.distributed.checkpoint.filesystem.os.fsync", full_disk),
        ("opd.stage.checkpoint.write_tensors", full_disk),
        ("opd.stage.checkpoint.fsync_path", full_disk),
    ],
)
def test_save_names_last_good_checkpoint_when_disk_is_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, function, failure
):
    write(tmp_path, 8)
    with monkeypatch.context() as patch:
        patch.setattr(function, failure)
        with pytest.raises(RunError) as caught:
            write(tmp_path, 12)
    message = str(caught.value)
    assert message.startswith(f"The checkpoint of step 12 could not be written to {tmp_path} (")
    assert "No space left on device" in message
    assert re.search(
        r"it needs about 0\.00 GiB, \d+\.\d\d GiB are free\)\. The half-written folder is removed", message
    )
    assert f"{tmp_path}/step_000008 is complete and unchanged. Free space or allow writing there" in message
    assert message.endswith("start the same command again: it continues from step 8.")
    assert names(tmp_path) == ["step_000008"]
    assert value_of(latest(tmp_path)) == 8.0
    assert value_of(write(tmp_path, 12)) == 12.0


def test_save_leaves_no_file_when_disk_is_full_at_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(checkpoint, "write_tensors", full_disk)
    with pytest.raises(RunError, match=r"It is the stage's first checkpoint\. Free space .* again: it starts again\."):
        write(tmp_path, 0)
    assert names(tmp_path) == []


@pytest.mark.parametrize("limit", [100_000, 4_000])
def test_save_raises_run_error_when_file_size_is_limited(tmp_path: Path, limit: int):
    # A real refusal: files of this process may not pass 100 kB (4 kB), so the writer fails midway.
    code = """
import resource, sys
from pathlib import Path
import torch
from opd.stage.checkpoint import latest, save
from opd.errors import RunError
folder, limit = Path(sys.argv[1]), int(sys.argv[2])
save(folder, 1, tensors={}, state={})
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
try:
    save(folder, 2, tensors={"student": {"small": torch.zeros(2)}, "moments": {"w": torch.zeros(limit // 3)}}, state={})
except RunError as error:
    print(error, latest(folder).name, [p.name for p in folder.iterdir()])
"""
    arguments = [sys.executable, "-c", code, str(tmp_path), str(limit)]
    run = subprocess.run(arguments, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert "File too large" in run.stdout
    assert "it continues from step 1. step_000001 ['step_000001']" in run.stdout


def test_save_raises_run_error_when_folder_cannot_be_made(tmp_path: Path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(
        RunError, match=r"step 3 could not be written to .*file/checkpoints \(Not a directory; it needs"
    ):
        write(tmp_path / "file" / "checkpoints", 3)


def test_save_raises_run_error_when_rotation_is_denied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    write(tmp_path, 2)
    rename = os.rename

    def refuse(source: Path, target: Path) -> None:
        if ".removing-" in str(target):
            raise PermissionError(13, "Permission denied")
        rename(source, target)

    monkeypatch.setattr(checkpoint.os, "rename", refuse)
    with pytest.raises(
        RunError, match=r"step 4 is written, and the older .*step_000002 could not be removed \(Perm.*step 4"
    ):
        write(tmp_path, 4, keep=1)
    assert value_of(latest(tmp_path)) == 4.0


def test_load_refuses_folder_without_state(tmp_path: Path):
    with pytest.raises(RunError, match=r"is not a checkpoint: it has no state\.json\. Give a folder named step_"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        *((name, "missing") for name in (STUDENT, MOMENTS)),
        *((name, how) for name in (STUDENT, MOMENTS, "state.json") for how in ("empty", "cut", "x")),
    ],
)
def test_load_names_damaged_file(tmp_path: Path, name: str, damage: str):
    file = write(tmp_path, 6) / name
    size = file.stat().st_size
    if damage == "missing":
        file.unlink()
    else:
        file.write_bytes({"empty": b"", "cut": file.read_bytes()[: size // 2], "x": b"\x07" * size}[damage])
    with pytest.raises(RunError) as caught:
        load(file.parent)
    message = str(caught.value)
    assert message.startswith(f"{file} is damaged (")
    assert message.endswith(f"Remove {file.parent}; the run then continues from the checkpoint before it, or starts "
                            "again if it has none.")  # fmt: skip
    if damage in ("empty", "cut") and name != "state.json":
        assert f" bytes instead of {size})" in message


def test_load_refuses_state_without_files(tmp_path: Path):
    file = write(tmp_path, 6) / "state.json"
    file.write_text(json.dumps({"step": 6}))
    with pytest.raises(RunError, match=r"state\.json is damaged \('files'\)"):
        load(file.parent)


def test_load_runs_no_pickled_code(tmp_path: Path):
    file = write(tmp_path, 6) / MOMENTS
    torch.save({"f": os.getcwd}, file)
    header = json.loads((file.parent / "state.json").read_text())
    header["files"][MOMENTS] = file.stat().st_size
    (file.parent / "state.json").write_text(json.dumps(header))
    with pytest.raises(RunError, match=rf"{MOMENTS} is damaged \("):
        load(file.parent)


@pytest.mark.parametrize("state", [{"a": (1, 2)}, {"a": {1: 2}}])
def test_save_refuses_state_that_json_changes(tmp_path: Path, state: dict[str, Any]):
    with pytest.raises(AssertionError, match="changes on its way through JSON"):
        save(tmp_path, 0, tensors={}, state=state)
    assert names(tmp_path) == []
