"""Checkpoints of one stage, each complete or absent.

    <stage>/checkpoints/step_000012/shard-00001-model-00002-of-00004.safetensors   process 1 of all, group 2 of 4
                                    state.json     the step, every file's size in bytes, and `state`

Every process writes its shards of every group of tensors (the student, each moment of its optimiser, an EMA teacher);
any number of processes can read them. A checkpoint is written into a hidden folder beside the others, synced to disk
file by file, and then renamed. So a folder named `step_...` is complete, even after a crash. Hidden folders are
leftovers of an interrupted write; `sweep` removes them and runs before `latest` when a stage starts. The main process
creates, renames and removes folders.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from opd.errors import RunError
from opd.files import GIB, fsync_path
from opd.parallel import ALONE, World, read_tensors, write_tensors

_NAME = re.compile(r"step_(\d{6,})")


_LEFTOVER = re.compile(r"\.(writing|replaced|removing)-(step_\d{6,})-\d+")


# Errors that the readers of both formats raise for damaged files.
_UNREADABLE = (OSError, ValueError, LookupError, TypeError, AttributeError, EOFError, RuntimeError, SafetensorError)


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """The contents of a checkpoint, as passed to `save`."""

    step: int
    tensors: dict[str, dict[str, Tensor]]
    state: dict[str, Any]


def save(
    folder: Path,
    step: int,
    *,
    tensors: Mapping[str, Mapping[str, Tensor]],
    state: Mapping[str, Any],
    keep: int = 2,
    world: World = ALONE,
) -> Path:
    """Write the checkpoint of `step` into `folder`, then remove older ones until `keep` are left, this one included.

    `tensors`: groups by name. Sharded tensors are written by all processes; whole ones must be equal in all. Tensors
    keep their dtype; those that share memory are written separately. `state` is JSON. A checkpoint of the same step is
    replaced, later ones are left alone. While this runs, the disk holds up to `keep + 1` checkpoints.

    Raises:
        RunError: it could not be written (most often, the disk is full). Earlier checkpoints are unchanged.
    """
    assert step >= 0
    assert keep >= 1
    final = folder / f"step_{step:06d}"
    part = world.gather(_hidden(folder, "writing", final.name))[0]
    try:
        if world.main:
            folder.mkdir(parents=True, exist_ok=True)
            shutil.rmtree(part, ignore_errors=True)  # a killed process may have had this one's id
            part.mkdir()
        world.wait()
        write_tensors(_apart(tensors), part)
        world.wait()
        if world.main:
            _write_state(part, step, state)
            _put(part, final)
    except BaseException as error:
        shutil.rmtree(part, ignore_errors=True)
        if isinstance(error, OSError | SafetensorError):
            raise RunError(_not_written(folder, step, error, size_of(tensors))) from error
        raise
    if world.main:
        _rotate(folder, step, keep)
    world.wait()
    return final


def latest(folder: Path) -> Path | None:
    """The complete checkpoint of the highest step, or None. Ignores leftovers of interrupted writes."""
    found = _complete(folder)
    return found[max(found)] if found else None


def sweep(folder: Path) -> list[Path]:
    """Clean up after an interrupted `save`; to call before `latest`. Returns the leftovers found.

    A checkpoint that was moved aside for a replacement is moved back if the replacement is missing.

    Raises:
        RunError: a leftover cannot be removed.
    """
    leftovers = [(entry, match) for entry in sorted(folder.glob(".*")) if (match := _LEFTOVER.fullmatch(entry.name))]
    for leftover, match in leftovers:
        try:
            if match[1] == "replaced" and not (folder / match[2]).exists():
                os.rename(leftover, folder / match[2])
            else:
                shutil.rmtree(leftover)
        except OSError as error:
            raise RunError(
                f"{leftover} is left from an interrupted write and cannot be removed ({_reason(error)}). Remove it, "
                "then start the same command again."
            ) from error
    return [leftover for leftover, _ in leftovers]


def load(path: Path, like: Mapping[str, Mapping[str, Tensor]] | None = None) -> Checkpoint:
    """Read a checkpoint. With several processes, all call this.

    Tensors are loaded whole, on the CPU. A tensor that `like` has under the same group and name is loaded onto its
    device, and sharded as it is.

    Raises:
        RunError: `path` is not a checkpoint, or one of its files is damaged; names the file.
    """
    if not (path / "state.json").is_file():
        raise RunError(f"{path} is not a checkpoint: it has no state.json. Give a folder named step_....")
    file = path / "state.json"
    try:
        header = json.loads(file.read_bytes())
        sizes, step, state = header["files"], header["step"], header["state"]
        for name, size in sizes.items():
            file = path / name
            if file.stat().st_size != size:
                raise ValueError(f"{file.stat().st_size} bytes instead of {size}")
            with safe_open(file, framework="pt"):  # fails here, so that the error names the file
                pass
        file = path
        tensors = read_tensors(path, like)
    except _UNREADABLE as error:
        why = _reason(error).strip().splitlines()[0]
        raise RunError(
            f"{file} is damaged ({why}). Remove {path}; the run then continues from the checkpoint before it, or "
            "starts again if it has none."
        ) from error
    return Checkpoint(step=step, tensors=tensors, state=state)


def size_of(tensors: Any) -> int:
    """Bytes of all tensors in a tensor or a nested container of them, as `save` writes them."""
    if isinstance(tensors, Tensor):
        return tensors.numel() * tensors.element_size()
    if isinstance(tensors, Mapping):
        return sum(size_of(value) for value in tensors.values())
    if isinstance(tensors, list | tuple):
        return sum(size_of(value) for value in tensors)
    return 0


def _write_state(part: Path, step: int, state: Mapping[str, Any]) -> None:
    sizes = {file.name: file.stat().st_size for file in sorted(part.iterdir())}
    text = json.dumps({"step": step, "files": sizes, "state": state}, indent=2, allow_nan=False)
    assert json.loads(text)["state"] == state, "the state changes on its way through JSON (a tuple, an integer key?)"
    (part / "state.json").write_text(text + "\n")
    fsync_path(part / "state.json")
    fsync_path(part)


def _apart(tensors: Mapping[str, Mapping[str, Tensor]]) -> dict[str, dict[str, Tensor]]:
    """The tensors contiguous and without shared memory, as safetensors requires. Shards already are."""
    storages: set[int] = set()
    result: dict[str, dict[str, Tensor]] = {}
    for group, named in tensors.items():
        result[group] = {}
        for name, tensor in named.items():
            copy = tensor.detach()
            if not hasattr(copy, "full_tensor"):
                copy = copy.contiguous()
                if copy.numel() and copy.untyped_storage().data_ptr() in storages:
                    copy = copy.clone()
                storages.add(copy.untyped_storage().data_ptr())
            result[group][name] = copy
    return result


def _put(part: Path, final: Path) -> None:
    """Rename the complete folder to `final`. An existing one is moved aside first, and back if the rename fails."""
    aside = _hidden(final.parent, "replaced", final.name)
    replaces = final.exists()
    if replaces:
        shutil.rmtree(aside, ignore_errors=True)
        os.rename(final, aside)
    try:
        os.rename(part, final)
    except BaseException:
        if replaces:
            os.rename(aside, final)
        raise
    fsync_path(final.parent)
    if replaces:
        shutil.rmtree(aside, ignore_errors=True)  # the new one is in place; `sweep` removes any rest


def _rotate(folder: Path, step: int, keep: int) -> None:
    older = sorted(other for other in _complete(folder) if other < step)
    for other in older[: max(0, len(older) - (keep - 1))]:
        path = folder / f"step_{other:06d}"
        removing = _hidden(folder, "removing", path.name)
        try:
            shutil.rmtree(removing, ignore_errors=True)
            os.rename(path, removing)  # so that a half-removed one never looks complete
            shutil.rmtree(removing)
        except OSError as error:
            raise RunError(
                f"The checkpoint of step {step} is written, and the older {path} could not be removed "
                f"({_reason(error)}). Remove it, then start the same command again: it continues from step {step}."
            ) from error


def _complete(folder: Path) -> dict[int, Path]:
    if not folder.is_dir():
        return {}
    matches = ((entry, _NAME.fullmatch(entry.name)) for entry in folder.iterdir() if entry.is_dir())
    return {int(match[1]): entry for entry, match in matches if match}


def _hidden(folder: Path, kind: str, name: str) -> Path:
    return folder / f".{kind}-{name}-{os.getpid()}"


def _reason(error: BaseException) -> str:
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


def _not_written(folder: Path, step: int, error: BaseException, needed: int) -> str:
    good = latest(folder)
    there = next(place for place in (folder.absolute(), *folder.absolute().parents) if place.is_dir())
    free = shutil.disk_usage(there).free
    still, then = (
        (f"{good} is complete and unchanged.", f"it continues from step {int(good.name[5:])}")
        if good
        else ("It is the stage's first checkpoint.", "it starts again")
    )
    return (
        f"The checkpoint of step {step} could not be written to {folder} ({_reason(error)}; it needs about "
        f"{needed / GIB:.2f} GiB, {free / GIB:.2f} GiB are free). The half-written folder is removed. {still} Free "
        f"space or allow writing there, then start the same command again: {then}."
    )
