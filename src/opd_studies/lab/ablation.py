"""Several settings from the same pairs, side by side: training, the numbers that come of it, bars and rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeAlias

from opd_studies.lab.distilling import Distillation, Trained, distil_all, held_out
from opd_studies.lab.lab import SORTERS, Lab, PairSize
from opd_studies.page import report
from opd_studies.page.outcome import Check, differences, over_seeds, short

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# By setting, then by what was measured: one number a seed. Shares lie in 0..1, lengths are tokens, entropies and
# divergences nats a token.
Numbers: TypeAlias = dict[str, dict[str, list[float]]]


START = "start"  # the student before any of the settings


TEACHER = "teacher"


HELD_OUT = {
    "greedy accuracy": "greedy/reward",
    "sampled accuracy": "sampled/reward",
    "accuracy at top-p 0.9": "nucleus/reward",  # of a study that asks for it
    "length": "sampled/length",
    "cut": "sampled/cut_share",
    "repeat ratio": "sampled/repeat_ratio",
    "KL": "reverse_kl",
}


TRAINING: dict[str, Callable[[Trained], float | None]] = {
    "entropy": lambda one: one.last.get("rollout/policy_nll"),
    "P_S": lambda one: one.last.get("support/student_mass"),
    "Q_S": lambda one: one.last.get("support/teacher_mass"),
    "gradient norm": lambda one: one.last.get("optim/grad_norm"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """A method with its options, and fields of the recipe's stage that differ from the usual ones."""

    method: str
    options: Mapping[str, Any] = field(default_factory=dict[str, Any])
    stage: Mapping[str, Any] = field(default_factory=dict[str, Any])


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """Seeds (a pair each), updates, and prompts a step."""

    seeds: Sequence[int] = (0, 1, 2)
    steps: int = 150
    prompts_per_step: int = 64
    pair: PairSize = SORTERS
    evaluate: Mapping[str, Any] = field(default_factory=dict[str, Any])  # fields that differ from `held_out`'s


def measure(lab: Lab, settings: Mapping[str, Setting], size: Size) -> Numbers:
    """Train every setting from every seed's pair, and what was measured of each: `collect` of `train`."""
    return collect(train(lab, settings, size))


def train(lab: Lab, settings: Mapping[str, Setting], size: Size) -> dict[str, list[Trained]]:
    """By setting, a finished distillation a seed. The first one also measures the student before, and the teacher."""
    pairs = dict(zip(size.seeds, lab.pairs(size.seeds, size.pair), strict=True))
    first = next(iter(settings))
    runs = [
        Distillation(
            pair=pairs[seed],
            seed=seed,
            method=setting.method,
            task=size.pair.task,
            options=setting.options,
            stage={
                "steps": size.steps,
                "prompts_per_step": size.prompts_per_step,
                "evaluate": held_out(size.pair.task, before=name == first, teacher=name == first, **size.evaluate),
                **setting.stage,
            },
        )
        for seed in size.seeds
        for name, setting in settings.items()
    ]
    trained = distil_all(lab, runs)
    return {name: trained[place :: len(settings)] for place, name in enumerate(settings)}


def collect(trained: Mapping[str, Sequence[Trained]]) -> Numbers:
    """What was measured of finished distillations, and, where it was, of the student before and the teacher."""
    numbers: Numbers = {START: {}, TEACHER: {}}
    for name, seeds in trained.items():
        for one in seeds:
            append(numbers, START, held_out_of(one.before, "eval/"))
            append(numbers, TEACHER, held_out_of(one.before, "eval/teacher/"))
            append(numbers, name, numbers_of(one))
    return {name: measured for name, measured in numbers.items() if measured}


def numbers_of(one: Trained) -> dict[str, float]:
    """What was measured of a finished distillation: held-out numbers, and those of training over its last steps."""
    training = {what: read(one) for what, read in TRAINING.items()}
    return held_out_of(one.after, "eval/") | {what: value for what, value in training.items() if value is not None}


def held_out_of(row: Mapping[str, float], prefix: str) -> dict[str, float]:
    """Those held-out numbers that a metrics row has behind `prefix`, under this file's names."""
    return {what: row[prefix + name] for what, name in HELD_OUT.items() if prefix + name in row}


def append(numbers: Numbers, name: str, measured: Mapping[str, float]) -> None:
    """One more seed's numbers of a setting."""
    for what, value in measured.items():
        numbers.setdefault(name, {}).setdefault(what, []).append(value)


def gap(numbers: Numbers, first: str, second: str, name: str = "sampled accuracy", **side: float) -> Check:
    """What was measured as `name` of one setting minus that of another, seed by seed, against `above` or `below`."""
    interval = differences(numbers[first][name], numbers[second][name])
    return Check(what=f"{name}, {first} minus {second}", interval=interval, **side)


def table(numbers: Numbers, columns: Sequence[str]) -> tuple[tuple[str, ...], ...]:
    """A row a setting: means over seeds, the first column with its 95 % interval; empty where nothing was measured."""
    rows = [("setting", *columns)]
    for name, measured in numbers.items():
        cells: list[str] = []
        for column in columns:
            if column not in measured:
                cells.append("")
                continue
            one = over_seeds(measured[column])
            interval = f" [{short(one.low)}, {short(one.high)}]" if column == columns[0] else ""
            cells.append(short(one.mean) + interval)
        rows.append((name, *cells))
    return tuple(rows)


def draw(numbers: Numbers, panels: Mapping[str, str], height: float = 3.4) -> Figure:
    """A panel for each of `panels` (what was measured: its axis' label): seeds as points, their mean as a bar."""
    figure, axes = report.figure(len(panels), width=2.6, height=height)
    bars(axes[0], numbers, panels)
    return figure


def bars(axes: Sequence[Any], numbers: Numbers, panels: Mapping[str, str]) -> None:
    """`draw` on axes that are there, one for each of `panels`; the first one names the settings."""
    names = list(numbers)
    for panel, (what, label) in zip(axes, panels.items(), strict=True):
        for place, name in enumerate(names):
            values = numbers[name].get(what)
            if values is None:
                continue
            colour = report.COLOURS[5] if name.partition(",")[0] in (START, TEACHER) else report.COLOURS[0]
            panel.barh(place, sum(values) / len(values), color=colour, alpha=0.6)
            panel.plot(values, [place] * len(values), "o", color="black", markersize=2.5)
        panel.set_xlabel(label)
        panel.set_ylim(len(names) - 0.4, -0.6)
        panel.set_yticks(range(len(names)), names if panel is axes[0] else [""] * len(names))
