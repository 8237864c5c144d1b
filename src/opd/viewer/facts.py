"""What a page says about a run beside its curves and responses: state, warnings, time, environment, files."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from opd.evaluation.learned import failed_rewards, skipped_updates, unmoved_reward
from opd.evaluation.thresholds import fired
from opd.viewer.read import RunView, StageView

ALIVE = 120  # seconds after which a run that writes no progress counts as stopped
SILENT = 45  # seconds after which a page says so; a run writes its progress every 30
PHASES = ("sync", "generate", "score", "train", "diagnose")


@dataclass(frozen=True, slots=True)
class Warned:
    """Something to look at: a metric or a check, what it says, what to do, and where that is explained."""

    name: str
    says: str
    remedy: str = ""
    where: str = ""


def state_of(stage: StageView, now: float | None = None) -> str:
    """`finished`, `running` or `stopped`, from what the run wrote and when; `now` is a Unix time.

    A process that ends in an error or by Ctrl-C gives the folder back; of one that was killed only the age tells.
    """
    if stage.done is not None:
        return "finished"
    return "running" if stage.held and _silence(stage, now) < ALIVE else "stopped"


def silent(stage: StageView, now: float | None = None) -> str:
    """`no sign of life for 50 s` of a running stage that is late; else empty."""
    seconds = _silence(stage, now)
    late = state_of(stage, now) == "running" and seconds >= SILENT
    return f"no sign of life for {duration(seconds)}" if late else ""


def _silence(stage: StageView, now: float | None) -> float:
    """Seconds since the stage wrote its progress."""
    updated = (stage.progress or {}).get("updated")
    return (time.time() if now is None else now) - updated if isinstance(updated, int | float) else math.inf


def opened_first(stages: Sequence[StageView]) -> int:
    """The place of the stage that a page opens on: the one that runs, else the last that trains on its own responses.

    A stage of `sft` prepares a model for the others, so it is first only if no other stage has made a step. A stage
    with other models (`peers`) opens on its own.
    """
    made = [i for i, stage in enumerate(stages) if stage.steps_done]
    runs = [i for i, stage in enumerate(stages) if state_of(stage) == "running"]
    own = [i for i in made if stages[i].spec.get("method") != "sft"]
    chosen = (runs or own or made or [0])[-1]
    return next(i for i, stage in enumerate(stages) if stage.spec is stages[chosen].spec)


def head_of(run: RunView, stage: StageView) -> dict[str, Any]:
    """Method, models and state of a stage, and `facts`: tokens, time and memory as texts."""
    tokens = int(sum(row.get("train/tokens", 0) for row in stage.metrics))
    seconds = sum(row.get("total", 0) for row in stage.timings)
    state, planned, made = state_of(stage), int(stage.spec.get("steps") or 0), stage.steps_done
    said = {
        "finished": f"finished after {made} step{'s' * (made != 1)}",
        "running": f"running, step {made} of {planned}",
    }
    if stage.done is not None and made < planned:
        said["finished"] = f"finished at step {made} of {planned}"
    late = silent(stage)
    peak = max((row.get("peak_memory_gib") or 0 for row in stage.timings), default=0)
    rate = f", {round(tokens / seconds):,} per second" if seconds else ""
    facts = [f"{tokens:,} trained tokens{rate}"] if tokens else []
    facts += [f"{duration(seconds)} of steps"] + ([f"{peak:.1f} GiB at most"] if peak else [])
    student = str((stage.keys or {}).get("trained") or stage.spec.get("train") or "student")
    teacher = stage.spec.get("teacher") or (stage.keys or {}).get("teacher")
    return {
        "method": str(stage.spec.get("method", "")),
        "student": student,
        "teacher": None if not teacher else "itself with another context" if teacher == student else str(teacher),
        "state": state,
        "state_says": said.get(state, f"stopped at step {made} of {planned}") + (late and f", {late}"),
        "facts": facts,
    }


def warned(run: RunView, stage: StageView) -> list[Warned]:
    """What to look at in a stage: its own numbers first, then the findings of `opd doctor` that ask for a change."""
    found = [
        Warned(
            one.rule.metric,
            one.rule.text.format(v=one.value),
            one.rule.remedy,
            f"docs/diagnostics.md#{one.rule.anchor}",
        )
        for one in fired(stage.metrics)
    ]
    others = (failed_rewards, unmoved_reward, skipped_updates)
    found += [Warned("", line) for says in others for line in says(stage.metrics)]
    if stage.damaged:
        found.append(Warned("metrics.jsonl", f"damaged lines, which are left out: {stage.damaged}"))
    doctor = run.doctor if isinstance(run.doctor, dict) and run.doctor.get("stage") == stage.name else {}
    for one in doctor.get("findings") or []:
        if one.get("level") in ("stop", "change"):
            found.append(Warned(f"doctor: {one.get('name')}", str(one.get("says")), str(one.get("remedy") or "")))
    return found


def verdict_of(run: RunView, stage: StageView) -> str | None:
    """The verdict of `opd doctor` on the stage, if it ran for this recipe."""
    doctor = run.doctor
    return str(doctor["verdict"]) if isinstance(doctor, dict) and doctor.get("stage") == stage.name else None


def phases_of(stage: StageView) -> list[tuple[str, float, float]]:
    """(phase, seconds, share of all) summed over the steps; the rest of the steps' time is `other`."""
    total = sum(row.get("total", 0) for row in stage.timings)
    found = [(name, float(sum(row.get(name, 0) or 0 for row in stage.timings))) for name in PHASES]
    found.append(("other", max(0.0, total - sum(seconds for _, seconds in found))))
    return [(name, seconds, seconds / total) for name, seconds in found if total and seconds > 0.005 * total]


def environment_of(run: RunView) -> list[tuple[str, str]]:
    """Versions and hardware, as rows of a table."""
    env = run.environment
    rows = [(name, env.get(name)) for name in ("cpu", "gpu", "memory_gib", "cpus", "python", "platform", "git_commit")]
    packages: Mapping[str, Any] = env.get("packages") or {}
    return [(name.replace("_gib", ", GiB"), _said(value)) for name, value in [*rows, *packages.items()] if value]


def files_of(stage: StageView) -> list[tuple[str, str]]:
    """The stage's files and folders with their sizes."""
    rows: list[tuple[str, str]] = []
    for path in sorted(stage.path.iterdir()) if stage.path.is_dir() else []:
        if path.name.startswith(".") or path.name == "peers":
            continue
        files = [path] if path.is_file() else [one for one in path.rglob("*") if one.is_file()]
        name = path.name if path.is_file() else f"{path.name}/ ({len(files)} files)"
        rows.append((name, size(sum(one.stat().st_size for one in files))))
    return rows


def missing_of(stage: StageView) -> list[str]:
    """Sentences about what a page cannot show, because the run's files do not hold it."""
    last = [when for when in stage.whens if when.startswith("step_")]
    parts = [stage.samples(stage.sample_steps[-1], ["policy_logp"]) if stage.sample_steps else None]
    parts += [stage.held_out(when, ["policy_logp"]) for when in last[-1:]]
    held = [one for one in parts if one is not None]
    if not held or any("format" in one.metadata for one in held):
        return []
    names = set().union(*(one.names for one in held))
    lacks = {
        "signal": "the signal per token",
        "student_top_ids": "the most likely tokens of both models",
        "student_entropy": "the entropies",
        "response_tokens": "the texts of tokens (ids are shown)",
        "prompt_messages": "whole conversations",
    }
    absent = [what for column, what in lacks.items() if column not in names]
    return [f"These files were written by an earlier version of opd. Off: {', '.join(absent)}."] if absent else []


def duration(seconds: float) -> str:
    """Seconds in words: 45 s, 3 min 20 s, 2 h 05 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def size(count: int) -> str:
    """Bytes in words."""
    for unit, name in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if count >= unit:
            return f"{count / unit:.1f} {name}"
    return f"{count} bytes"


def folder_of(path: Path) -> str:
    """A folder's own name, not where it lies on this machine."""
    return path.resolve().name


def _said(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
