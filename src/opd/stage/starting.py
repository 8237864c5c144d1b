"""The start of a run in its folder: a new run, or the continuation of the one that is there, with its changes."""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
from collections.abc import Collection, Mapping
from dataclasses import asdict
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypeAlias

from opd.errors import ConfigError, RunError
from opd.files import GIB, append_row, read_lines, remove_unfinished, write_atomically
from opd.recipe.load import dump, load_recipe
from opd.recipe.schema import Recipe
from opd.stage.changes import Change, check_steps, input_changes, recipe_changes, refuse
from opd.stage.claim import HOLDER, LOCK, clear, made_progress, made_something
from opd.stage.doctor_file import bring

INPUTS, CHANGES = "inputs.json", "changes.jsonl"
FILES = {"of another recipe": "recipe.yaml", "with other rows, models or code": INPUTS}  # which run a folder holds

Inputs: TypeAlias = Mapping[str, Mapping[str, str]]  # by stage: fingerprints of rows, models and code by name


def check_place(path: Path) -> None:
    """Raise RunError for a path that is no folder of a run and no new one. Writes nothing."""
    if not path.exists():
        return
    if not path.is_dir():
        raise RunError(f"{path} is a file, and a run needs a folder. Use another output_dir=..., or move the file.")
    if (path / "recipe.yaml").exists():
        return
    # A first start that was killed leaves its lock and an unfinished recipe; that still counts as empty.
    entries = [entry.name for entry in path.iterdir()]
    others = sorted(name for name in entries if name not in (LOCK, HOLDER) and ".writing-" not in name)
    if others:
        raise RunError(
            f"{path} is not a run directory: it holds {others[0]!r} and no recipe.yaml ({len(others)} entries). "
            "Nothing was written. Use another output_dir=..., or empty the folder."
        )


def begin(path: Path, recipe: Recipe, inputs: Inputs, *, accept: bool) -> tuple[str, ...]:
    """Write the files of a start into the locked folder; returns notes. Raises RunError for another run's folder."""
    notes: list[str] = []
    started = datetime.now()
    texts = {"recipe.yaml": dump(recipe), INPUTS: json.dumps(inputs, indent=2) + "\n"}
    if made_progress(path):
        started = started_at(path)
        old = _last_recipe(path)
        longer = _other_steps(path, old, recipe)
        changes = [*recipe_changes(old, recipe), *_other_inputs(path, inputs, longer.values())]
        refuse(str(path), [c for c in changes if c.key not in longer], accept=accept)
        for stage in longer.values():
            (path / stage / "done.json").unlink(missing_ok=True)
        if any(change.effect != "none" for change in changes):  # an unfinished evaluation has sampled before them
            for folder in path.glob("*/evaluating"):
                shutil.rmtree(folder)
        for change in changes:
            notes.append(f"changed since the last start: {change}")
            at = datetime.now().isoformat(timespec="seconds")
            append_row(path / CHANGES, {"at": at, **asdict(change)}, "a change")
    elif (path / "recipe.yaml").exists():
        if not (other := [what for what, file in FILES.items() if not _holds(path / file, texts[file])]):
            started = started_at(path)
        else:
            notes.append(f"{path}: a run {other[0]} that made no step was here; this run replaces it")
            clear(path)
    remove_unfinished(path)
    for name, text in texts.items():
        if not _holds(path / name, text):
            write_atomically(path / name, text)
    bring(path, texts["recipe.yaml"])
    write_atomically(path / "environment.json", json.dumps(_environment(started), indent=2) + "\n")
    return tuple(notes)


def _holds(file: Path, text: str) -> bool:
    return file.exists() and file.read_bytes() == text.encode()


def _last_recipe(path: Path) -> Recipe:
    """The recipe of the run's last start. Raises RunError if it is no recipe of this version."""
    file = path / "recipe.yaml"
    try:
        return load_recipe(file)
    except ConfigError as error:
        raise RunError(
            f"{file}, the recipe of the run in this folder, cannot be read.\n{error}\nGo on with the version of opd "
            "that wrote it, or use another output_dir=..."
        ) from error


def _other_inputs(path: Path, inputs: Inputs, reopened: Collection[str]) -> list[Change]:
    """The inputs that differ from those of the last start, of stages that are not done or `reopened`."""
    try:
        old: Inputs = {stage: {**names} for stage, names in {**json.loads((path / INPUTS).read_bytes())}.items()}
    except FileNotFoundError:
        return []
    except (ValueError, TypeError) as error:
        raise RunError(f"{path / INPUTS} is damaged ({error}). Remove it to go on without a comparison.") from error
    done = {stage for stage in inputs if stage not in reopened and (path / stage / "done.json").exists()}
    compared = [stage for stage in inputs if stage in old and stage not in done]
    return [change for stage in compared for change in input_changes(stage, old[stage], inputs[stage])]


def _other_steps(path: Path, old: Recipe, new: Recipe) -> dict[str, str]:
    """The stages with another, allowed number of steps, by the key of that change. Raises RunError: `check_steps`."""
    out: dict[str, str] = {}
    for i, (before, after) in enumerate(zip(old.stages, new.stages, strict=False)):
        if before.name != after.name or before.steps == after.steps:
            continue
        rows = [row for _, row in read_lines(path / before.name / "metrics.jsonl")]
        later = [one.name for one in old.stages[i + 1 :] if made_something(path / one.name)]
        made = max((row["step"] for row in rows), default=0)
        early = before.seconds_of is not None or before.has_goal
        limited = early and (path / before.name / "done.json").exists() and made < before.steps
        check_steps(before, after.steps, made=made, later=later, limited=limited)
        out[f"stages.{before.name}.steps"] = before.name
    return out


def started_at(path: Path) -> datetime:
    """The time that the run's folder states; the present for a new run."""
    try:
        return datetime.fromisoformat(json.loads((path / "environment.json").read_text())["started"])
    except (OSError, ValueError, KeyError, TypeError):
        return datetime.now()


def _environment(started: datetime) -> dict[str, Any]:
    import torch

    return {
        "started": started.isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "cpu": _processor(),
        "memory_gib": _memory_gib(),
        "packages": {name: _version(name) for name in ("torch", "transformers", "datasets", "peft", "opd")},
        "cuda_devices": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "gpu": list(dict.fromkeys(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))),
        "git_commit": _git_commit(),
    }


def _processor() -> str | None:
    """The name of the processor, as Linux or Python states it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or None
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or None


def _memory_gib() -> float | None:
    """The machine's memory; None where the system does not say."""
    try:
        return round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / GIB, 1)
    except (ValueError, OSError):
        return None


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _git_commit() -> str | None:
    """The commit of the working directory, or None outside a repository, before its first commit or without git."""
    try:
        result = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return result.stdout.strip() if result.returncode == 0 else None
