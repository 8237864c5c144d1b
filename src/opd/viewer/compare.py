"""Runs side by side: keys that differ, rewards on the same held-out prompts, curves, rows where they disagree."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from opd.errors import ConfigError, nearest
from opd.maths.intervals import Interval
from opd.messages import visible
from opd.viewer import facts
from opd.viewer.content import Content, Options, add_held_out, add_images, run_shown
from opd.viewer.groups import LETTERS
from opd.viewer.images import Album
from opd.viewer.keys import differing
from opd.viewer.names import apart
from opd.viewer.overlay import overlaid
from opd.viewer.pairs import SCORED, Paired, Scores, paired, scores, unpaired
from opd.viewer.read import RunView, StageView, read_run
from opd.viewer.responses import HeldOut, held_out, shown_keys
from opd.viewer.results import Cell, reward_of, tasks_of
from opd.viewer.seeds import OverSeeds, bounds
from opd.viewer.thin import Budget

BY = ("prompt", "id")


@dataclass(frozen=True, slots=True)
class Side:
    """One of the compared runs: the stage, and its last evaluation."""

    label: str
    run: RunView
    stage: StageView
    when: str | None
    apart: str = ""  # what tells it from another run of its name

    @property
    def name(self) -> str:
        """The run's name, and what tells it apart."""
        return visible(self.run.name) + (f" ({self.apart})" if self.apart else "")

    @property
    def said(self) -> str:
        """The evaluation in words."""
        return "no evaluation" if self.when is None else f"step {int(self.when.removeprefix('step_'))}"


@dataclass(frozen=True, slots=True)
class Row:
    """A setting of a task: each run's mean reward with its own interval, and the paired comparison of two runs."""

    title: str
    reward: str
    means: list[Interval | None]
    pair: Paired | None


@dataclass(slots=True)
class Comparison:
    """What differs between runs. `reasons` says what could not be paired, and why."""

    sides: list[Side]
    keys: list[tuple[str, list[str]]]
    rows: list[Row] = field(default_factory=list)
    reasons: list[str] = field(default_factory=list)
    by: str = "prompt"
    pairable: bool = True


def compare(
    paths: Sequence[str | Path | RunView], stage: str | None = None, by: str = "prompt", *, text: bool = True
) -> Comparison:
    """Compare the last evaluations of runs, given by their folders or read, on the prompts that they share.

    `stage`: its name in every run; by default the last one that all have. `by`: how prompts are known to be the same,
    by their text ("prompt") or by their place in the data ("id"). Without `text` no key of a recipe is in a run's name.

    Raises:
        ConfigError: fewer than two runs, no stage that all have, or an unknown `by`. RunError: as `read_run`.
    """
    if not 2 <= len(paths) <= len(LETTERS):
        raise ConfigError(
            f"A comparison of runs side by side needs 2 to {len(LETTERS)} runs, got {len(paths)}. Give their folders; "
            "--between stages compares the stages of one."
        )
    check_by(by)
    runs = [path if isinstance(path, RunView) else read_run(path) for path in paths]
    name = _common(runs, stage)
    keys = differing([run.recipe for run in runs], [run.environment for run in runs])
    names = apart([run.name for run in runs], [run.path for run in runs], keys if text else [])
    stages = [run.stages[name] for run in runs]
    sides = [Side(*one) for one in zip(LETTERS, runs, stages, map(_last, stages), names, strict=False)]
    found = Comparison(sides, keys, by=by)
    _rewards(found)
    return found


def check_by(by: str) -> None:
    """Raise ConfigError for another word than those of `BY`."""
    if by not in BY:
        raise ConfigError(f"Prompts are matched by `prompt` or by `id`, not by {by!r}.{nearest(by, BY)}")


def _common(runs: Sequence[RunView], stage: str | None) -> str:
    """The stage to compare. Raises ConfigError if not all runs have it."""
    names = [name for name in runs[0].stages if all(name in run.stages for run in runs)]
    if stage is None and names:
        return names[-1]
    if stage is not None and stage in names:
        return stage
    has = "; ".join(f"{run.path}: {', '.join(run.stages) or 'none yet'}" for run in runs)
    what = "no stage of one name" if stage is None else f"not all a stage {stage!r}"
    raise ConfigError(f"The runs have {what} ({has}). Name one that all have with --stage.")


def _last(stage: StageView) -> str | None:
    return next((when for when in reversed(stage.whens) if when.startswith("step_")), None)


def _rewards(found: Comparison) -> None:
    """Fill rows and reasons from the files of responses."""
    sides = found.sides
    for side in sides:
        if side.when is None:
            found.reasons.append(f"{side.label} has no responses of an evaluation after training.")
    held: list[Scores] = [
        {} if side.when is None else scores(side.stage.held_out(side.when, SCORED), found.by) for side in sides
    ]
    names = {task: {side.label: reward_of(side.stage, task)[0] for side in sides} for task in tasks_of(sides[0].stage)}
    for setting in dict.fromkeys(key for one in held for key in one):
        task = setting[0]
        title = ", ".join(str(part) for part in setting if part is not None)
        rewards = names.get(task) or {side.label: reward_of(side.stage, task)[0] for side in sides}
        own = [one.get(setting, {}) for one in held]
        pair = None
        if len(set(rewards.values())) > 1:
            said = ", ".join(f"{label} {name}" for label, name in rewards.items())
            found.reasons.append(f"{title}: not paired, because the rewards differ ({said}).")
            found.pairable = False
        elif len(sides) == 2 and all(own):
            pair = paired(own[0], own[1])
            if pair is None:
                found.reasons.append(
                    f"{title}: not paired, because no held-out prompt is in both runs; each has its own."
                )
            elif pair.prompts < max(map(len, own)):
                counts = " and ".join(str(len(one)) for one in own)
                found.reasons.append(f"{title}: {pair.prompts} prompts are in both runs, of {counts}.")
        elif not all(own):
            lacking = ", ".join(side.label for side, one in zip(sides, own, strict=True) if not one)
            found.reasons.append(f"{title}: not paired, because {lacking} did not measure it.")
        name = next(iter(rewards.values()))
        found.rows.append(Row(title, name, [unpaired(one.values()) for one in own], pair))


def as_json(found: Comparison) -> str:
    """The comparison as JSON: runs, keys that differ, rows with intervals, reasons."""
    runs = [
        {
            "label": side.label,
            "name": side.run.name,
            "folder": str(side.run.path),
            "apart": side.apart,
            "stage": side.stage.name,
            "when": side.when,
        }
        for side in found.sides
    ]
    rows = [
        {
            "setting": row.title,
            "reward": row.reward,
            "runs": [bounds(mean) for mean in row.means],
            "paired": None if row.pair is None else asdict(row.pair) | {"difference": bounds(row.pair.difference)},
        }
        for row in found.rows
    ]
    keys = [{"key": key, "values": values} for key, values in found.keys]
    return json.dumps({"runs": runs, "keys": keys, "rows": rows, "reasons": found.reasons}, indent=2, allow_nan=False)


def table_of(found: Comparison) -> tuple[list[str], list[tuple[str, list[Cell]]]]:
    """Column names and rows of the table of rewards."""
    two = len(found.sides) == 2
    columns = [f"{side.label}, {side.said}" for side in found.sides]
    columns += ["B - A", "prompts", "only A", "only B", "McNemar p"] if two else []
    rows: list[tuple[str, list[Cell]]] = []
    for row in found.rows:
        cells = [_cell(mean) for mean in row.means]
        if two:
            cells += _pair(row.pair)
        rows.append((f"{row.title}: {row.reward}", cells))
    return columns, rows


def _interval(one: Interval, *, signed: bool = False) -> Cell:
    show = (lambda x: f"{x:+.3f}") if signed else (lambda x: f"{x:.3f}")
    finite = one.high - one.low < float("inf")
    return Cell(show(one.mean), f"{show(one.low)} to {show(one.high)}" if finite else "")


def _pair(pair: Paired | None) -> list[Cell]:
    if pair is None:
        return [Cell("")] * 5
    counts = [Cell("" if one is None else str(one)) for one in (pair.only_first, pair.only_second)]
    p = Cell("" if pair.p is None else f"{pair.p:.2g}")
    return [_interval(pair.difference, signed=True), Cell(str(pair.prompts)), *counts, p]


def runs_shown(found: Comparison, *, text: bool = True) -> list[dict[str, Any]]:
    """What the template shows of each run."""
    return [{"label": side.label, **run_shown(side.run, text=text), "name": side.name} for side in found.sides]


def content_of(found: Comparison, options: Options, over: OverSeeds | None = None) -> Content:
    """The page's stage of a comparison: the table, curves over each other, and for two runs their responses.

    `over`: a comparison over seeds of the same runs, whose tables come first.
    """
    columns, rows = table_of(found)
    data, block = overlaid([side.stage for side in found.sides], [side.label for side in found.sides])
    shown: dict[str, Any] = {
        "name": found.sides[0].stage.name,
        "compared": True,
        "head": None,
        "verdict": None,
        "missing": [],
        "sparks": [],
        "over": None if over is None else _over_shown(over),
        "reasons": found.reasons,
        "table": rows,
        "table_columns": columns,
        "phases": [],
        "files": [],
        "differing": found.keys if options.text else [],
        "warnings": [
            facts.Warned(f"{side.label}: {one.name}".removesuffix(": "), one.says, one.remedy, one.where)
            for side in found.sides
            for one in facts.warned(side.run, side.stage)
        ],
    }
    content = Content(found.sides[0].stage.name, data, shown, {"curves": block})
    if options.text and len(found.sides) == 2 and found.pairable:
        measured = [_measured(side, found.by) for side in found.sides]
        both = [one for one in measured if one is not None]
        if len(both) == 2:
            keys = [key for key in shown_keys(both) if all(key in one.rows for one in both)]
            tokens = options.tokens_beside([side.stage for side in found.sides])
            budget = Budget.of(tokens, [one.lengths[key] for one in both for key in keys])
            if keys:
                album = Album()
                add_held_out(content, both, keys, budget, album)
                add_images(content, album, options.images)
                content.data["held_of"] = sum(key in both[1].rows for key in both[0].rows)
    return content


def _over_shown(over: OverSeeds) -> dict[str, Any]:
    """What the template shows of a comparison over seeds."""
    tables: list[dict[str, Any]] = []
    for table in over.tables:
        rows: list[tuple[str, list[Cell]]] = []
        for line in table.lines:
            cells = [Cell(str(len(line.values))), _cell(line.mean), _cell(line.difference, signed=True)]
            rows.append((line.entry.name, [*cells, Cell(line.pairing or "")]))
        columns = ["seeds", "mean", f"minus {over.baseline.name}", "by seed"]
        tables.append({"title": table.title, "columns": columns, "rows": rows})
    groups = [(one.label, one.name, ", ".join(map(str, one.runs))) for one in over.groups]
    return {"groups": groups, "tables": tables, "lines": [over.covers, *over.reasons]}


def _cell(one: Interval | None, *, signed: bool = False) -> Cell:
    return Cell("") if one is None else _interval(one, signed=signed)


def _measured(side: Side, by: str) -> HeldOut | None:
    return None if side.when is None else held_out(side.label, side.stage, side.when, by)
