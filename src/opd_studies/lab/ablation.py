"""Ablations: train several settings from the same pairs and collect their numbers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any, TypeAlias

from opd_studies.lab.distilling import Distillation, Trained, distil_all, held_out
from opd_studies.lab.lab import SORTERS, Lab, PairSize

# By setting, then by measurement: one number per seed. Shares are in 0..1, lengths in tokens, entropies and divergences
# in nats per token.
Numbers: TypeAlias = dict[str, dict[str, list[float]]]


START = "start"  # the student before any of the settings


TEACHER = "teacher"


NUCLEUS = "accuracy at top-p 0.9"  # in studies with the sampling setting "nucleus"


HELD_OUT = {
    "greedy accuracy": "greedy/reward",
    "sampled accuracy": "sampled/reward",
    NUCLEUS: "nucleus/reward",
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


SMOOTHED = 10  # updates averaged in a point of a training curve


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """A method with its options, and fields of the stage that differ from the default."""

    method: str
    options: Mapping[str, Any] = field(default_factory=dict[str, Any])
    stage: Mapping[str, Any] = field(default_factory=dict[str, Any])


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """Seeds (one pair each), updates, and prompts per step."""

    seeds: Sequence[int] = (0, 1, 2)
    steps: int = 150
    prompts_per_step: int = 64
    pair: PairSize = SORTERS
    evaluate: Mapping[str, Any] = field(default_factory=dict[str, Any])  # fields that differ from `held_out`'s


def measure(lab: Lab, settings: Mapping[str, Setting], size: Size) -> Numbers:
    """Train every setting from every seed's pair and collect the numbers."""
    return collect(train(lab, settings, size))


def train(lab: Lab, settings: Mapping[str, Setting], size: Size) -> dict[str, list[Trained]]:
    """Finished distillations by setting, one per seed. The first setting also measures student before and teacher."""
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
    """The numbers of finished distillations, and of the student before and the teacher where measured."""
    numbers: Numbers = {START: {}, TEACHER: {}}
    for name, seeds in trained.items():
        for one in seeds:
            append(numbers, START, held_out_of(one.before, "eval/"))
            append(numbers, TEACHER, held_out_of(one.before, "eval/teacher/"))
            append(numbers, name, numbers_of(one))
    return {name: measured for name, measured in numbers.items() if measured}


def numbers_of(one: Trained) -> dict[str, float]:
    """The numbers of one finished distillation: held-out, and means over the last steps of training."""
    training = {what: read(one) for what, read in TRAINING.items()}
    return held_out_of(one.after, "eval/") | {what: value for what, value in training.items() if value is not None}


def held_out_of(row: Mapping[str, float], prefix: str) -> dict[str, float]:
    """The held-out numbers of a metrics row with this `prefix`, under this file's names."""
    return {what: row[prefix + name] for what, name in HELD_OUT.items() if prefix + name in row}


def append(numbers: Numbers, name: str, measured: Mapping[str, float]) -> None:
    """Add one seed's numbers to a setting."""
    for what, value in measured.items():
        numbers.setdefault(name, {}).setdefault(what, []).append(value)


def accuracy_curves(trained: Mapping[str, Sequence[Trained]]) -> dict[str, list[list[float]]]:
    """Smoothed training accuracy by update, by setting, one list per seed. The stages need a reward."""
    return {
        name: [smoothed([row["rollout/reward"] for row in one.rows]) for one in seeds]
        for name, seeds in trained.items()
    }


def smoothed(values: Sequence[float], width: int = SMOOTHED) -> list[float]:
    """Moving means of `width` values; the first one is over the first `width` values."""
    return [fmean(values[end - width : end]) for end in range(width, len(values) + 1)]
