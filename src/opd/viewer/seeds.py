"""Means over seeds of held-out numbers with Student's t, and their differences: of recipes, or of their stages."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from opd.errors import ConfigError, nearest
from opd.evaluation.results import environments_own
from opd.maths.intervals import Interval, mean_interval, welch_interval
from opd.viewer.comparable import HeldOutRows, Number, conditions_apart, rows_apart, unlike
from opd.viewer.groups import Entry, Group, entries, grouped, keys_of
from opd.viewer.read import RunView
from opd.viewer.results import DIVERGENCES, reward_of, settings_of, tasks_of


@dataclass(slots=True)
class Line:
    """One number of an entry: each run's value by seed, their mean, and its difference from the baseline's.

    `mean` is None if the runs' evaluations are not comparable; `difference` then, too, and in the baseline's own line.
    """

    entry: Entry
    values: dict[int, float]
    mean: Interval | None = None
    difference: Interval | None = None
    pairing: Literal["paired", "Welch"] | None = None


@dataclass(frozen=True, slots=True)
class Table:
    """One number of all entries: a reward, pass@k or count in a sampling setting, or a divergence from the teacher."""

    setting: str  # empty for a divergence of a stage without tasks
    number: str  # what it is called
    key: str  # as in the metrics
    lines: list[Line]

    @property
    def title(self) -> str:
        """The setting and what was measured."""
        return ": ".join(part for part in (self.setting, self.number) if part)

    @property
    def pairings(self) -> list[str]:
        """How its differences were taken: paired, Welch, both or neither."""
        return list(dict.fromkeys(line.pairing for line in self.lines if line.pairing is not None))


@dataclass(slots=True)
class OverSeeds:
    """A comparison over seeds. In words: `covers`, what its intervals are, and `reasons`, what is not compared."""

    between: str
    groups: list[Group]
    entries: list[Entry]
    baseline: Entry
    keys: list[tuple[str, list[str]]]  # that differ between the groups
    covers: str
    tables: list[Table] = field(default_factory=list)
    reasons: list[str] = field(default_factory=list)


def over_seeds(
    runs: Sequence[RunView],
    between: str,
    stage: str | None = None,
    against: str | None = None,
    by: str = "prompt",
    *,
    text: bool = True,
) -> OverSeeds:
    """Means over the seeds of each recipe, and differences from the entry named `against`, by default the first.

    `between`, `stage`: as for `groups.entries`. `by`: as for `HeldOutRows`. `text`: as for `groups.grouped`.

    Raises:
        ConfigError: two runs of one recipe and seed, too many recipes, an unknown stage or entry, nothing measured.
        RunError: a run has not finished a stage that is compared, or its files cannot be read.
    """
    groups = grouped(runs, text=text)
    compared = entries(groups, between, stage)
    names = {entry.name: entry for entry in compared}
    if against is not None and against not in names:
        raise ConfigError(
            f"Differences from {against!r} (--against) need a row of this name. There are: {'; '.join(names)}."
            f"{nearest(against, names)}"
        )
    baseline = names[against or compared[0].name]
    keys = keys_of([group.first for group in groups])
    found = OverSeeds(between, groups, compared, baseline, keys, _covers(groups))
    found.reasons += [reason for group in groups for reason in unlike(group)]
    rows = HeldOutRows(by)
    for number in dict.fromkeys(number for entry in compared for number in _numbers(entry)):
        lines = [Line(entry, values) for entry in compared if (values := _values(entry, number))]
        if lines:
            _fill(found, rows, number, lines)
            labels = dict.fromkeys(_label(line.entry, number) for line in lines)
            found.tables.append(Table(_setting(number), " / ".join(labels), number[2], lines))
    return found


def _covers(groups: Sequence[Group]) -> str:
    """What the intervals are, in words."""
    if all(len(group.runs) == 1 for group in groups):
        return "Each recipe has one seed: there is no interval over seeds. Those over prompts are in `opd report`."
    models = [dict(one or {}) for group in groups for one in (group.first.recipe.get("models") or {}).values()]
    new = any((one.get("init") and one.get("seed") is None) or one.get("lora") for one in models)
    return (
        f"95 % intervals are Student's t over seeds. A seed draws {'new weights, ' if new else ''}the order of prompts "
        "and the sampling. The held-out rows of a mean are the same in all its runs: it says nothing about other rows."
    )


def _numbers(entry: Entry) -> list[Number]:
    """What an entry's runs may have measured, in the recipe's order: rewards, pass@k, counts, then divergences.

    The counts are those of an environment's own, such as `environment/won`.
    """
    found: list[Number] = []
    for task, section in tasks_of(entry.first).items():
        keys = ["reward", *(f"pass@{k}" for k in section.get("pass_at") or [] if k != 1)]
        for setting in settings_of(entry.first, task):
            each = (name for run in entry.group.runs.values() for name in entry.numbers(run, task))
            found += [(task, setting, key) for key in [*keys, *environments_own(setting, each)]]
        found += [(task, None, key) for key, _ in DIVERGENCES]
    return found


def _values(entry: Entry, number: Number) -> dict[int, float]:
    """The number in each run that has it, by seed."""
    task, setting, key = number
    name = key if setting is None else f"{setting}/{key}"
    every = {seed: entry.numbers(run, task) for seed, run in entry.group.runs.items()}
    return {seed: float(numbers[name]) for seed, numbers in every.items() if name in numbers}


def _label(entry: Entry, number: Number) -> str:
    """What the number is called: the reward by its name."""
    key = number[2]
    return reward_of(entry.first, number[0])[0] if key == "reward" else dict(DIVERGENCES).get(key, key)


def _setting(number: Number) -> str:
    return ", ".join(part for part in number[:2] if part is not None)


def _fill(found: OverSeeds, rows: HeldOutRows, number: Number, lines: Sequence[Line]) -> None:
    """Means and differences of a table's lines, and the reasons for those that are absent."""

    def say(line: Line, text: str) -> None:
        _add(found, f"{line.entry.name}, {_setting(number) or number[2]}: {text}.")

    for line in lines:
        for note in _notes(line, number):
            say(line, note)
        if why := _inside(line, rows, number):
            say(line, f"no mean, because {why}")
        else:
            line.mean = mean_interval(list(line.values.values()), None)
    base = next((line for line in lines if line.entry is found.baseline), None)
    for line in lines:
        if base is None or line is base or line.mean is None or base.mean is None:
            continue
        if why := conditions_apart(line.entry, base.entry, number) or _between(line, base, rows, number):
            say(line, f"no difference from {base.entry.name}, because {why}")
            continue
        _subtract(line, base)
        if line.pairing == "Welch":
            groups = f"{line.entry.group.label} and {base.entry.group.label}"
            _add(found, f"{groups}: differences are not paired by seed (Welch), because {_seeds(line, base)}.")


def _add(found: OverSeeds, reason: str) -> None:
    """Add a reason that is not there yet: those of a reward and of its pass@k are often the same."""
    if reason not in found.reasons:
        found.reasons.append(reason)


def _notes(line: Line, number: Number) -> list[str]:
    """What a reader has to know of a mean that is shown."""
    entry, notes, task = line.entry, list[str](), number[0]
    runs = entry.group.runs.values()
    failed = [
        str(run.path) for run in runs if number[1] and entry.numbers(run, task).get(f"{number[1]}/rewards_failed")
    ]
    if failed:
        notes.append(f"rows whose reward failed are left out in {', '.join(failed)}")
    steps = dict.fromkeys(entry.step(run, task) for run in runs)
    if len(steps) > 1:
        notes.append(f"the runs were measured after different numbers of steps ({', '.join(map(str, steps))})")
    return notes


def _inside(line: Line, rows: HeldOutRows, number: Number) -> str | None:
    """Why a line's values cannot be averaged, in words; None if they can."""
    runs = line.entry.group.runs
    lacking = [str(run.path) for seed, run in runs.items() if seed not in line.values]
    if lacking:
        return f"{', '.join(lacking)} did not measure it"
    first, *others = runs.values()
    own = rows.of(line.entry, first, number) if others else None
    every = (rows_apart(str(first.path), own, str(run.path), rows.of(line.entry, run, number)) for run in others)
    return next((why for why in every if why is not None), None)


def _between(line: Line, base: Line, rows: HeldOutRows, number: Number) -> str | None:
    """How the held-out rows of two lines differ, in words; None if they are the same."""
    one, other = (rows.of(each.entry, each.entry.group.first, number) for each in (line, base))
    return rows_apart(line.entry.name, one, base.entry.name, other)


def _subtract(line: Line, base: Line) -> None:
    """A line's difference from the baseline's: paired by seed if both have the same seeds, else Welch's."""
    if line.values.keys() == base.values.keys():
        gains = [value - base.values[seed] for seed, value in line.values.items()]
        line.difference, line.pairing = mean_interval(gains, None), "paired"
    else:
        line.difference = welch_interval(list(line.values.values()), list(base.values.values()))
        line.pairing = "Welch"


def _seeds(line: Line, base: Line) -> str:
    """The seeds that one of two lines has alone, in words."""
    alone = [
        f"{one.entry.group.label} alone has seed{'s' if len(own) > 1 else ''} {', '.join(map(str, own))}"
        for one, other in ((line, base), (base, line))
        if (own := [seed for seed in one.values if seed not in other.values])
    ]
    return " and ".join(alone)


def as_json(found: OverSeeds) -> str:
    """The comparison as JSON: groups, what the intervals cover, tables with each run's value by seed, reasons."""
    groups = [
        {
            "label": group.label,
            "name": group.name,
            "runs": [{"seed": seed, "folder": str(run.path)} for seed, run in group.runs.items()],
        }
        for group in found.groups
    ]
    tables = [
        {
            "setting": table.setting,
            "number": table.number,
            "key": table.key,
            "rows": [
                {
                    "name": line.entry.name,
                    "group": line.entry.group.label,
                    "stage": line.entry.stage,
                    "when": line.entry.when,
                    "seeds": {str(seed): value for seed, value in line.values.items()},
                    "mean": bounds(line.mean),
                    "difference": bounds(line.difference),
                    "pairing": line.pairing,
                }
                for line in table.lines
            ],
        }
        for table in found.tables
    ]
    whole = {"between": found.between, "groups": groups, "against": found.baseline.name, "covers": found.covers}
    keys = [{"key": key, "values": values} for key, values in found.keys]
    whole |= {"keys": keys, "tables": tables, "reasons": found.reasons}
    return json.dumps(whole, indent=2, allow_nan=False)


def bounds(one: Interval | None) -> dict[str, Any] | None:
    """An interval as numbers; its ends are None if they are infinite, as of a single value."""
    if one is None:
        return None
    finite = math.isfinite(one.high - one.low)
    return {"mean": one.mean, "low": one.low if finite else None, "high": one.high if finite else None}
