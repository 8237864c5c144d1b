"""Numbers as the papers claim them, and their opposite, for the studies of baselines and of jumps."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from opd.studies import control_variate, extrapolation
from opd.studies.ablation import START
from opd.studies.control_variate import FEWER, FULL, LOSS, METHODS, NONE, TOP_K
from opd.studies.variances import BASELINES, REGIMES
from study_numbers import spread


def baseline_numbers(good: bool, second: bool) -> control_variate.Numbers:
    """`second`: whether training with few responses is as claimed."""
    lower = 0.6 if good else 1.3
    variance = {regime: {name: spread(1.0 if name == "none" else lower) for name in BASELINES} for regime in REGIMES}
    variance["mild gap"] |= {"value": spread(0.9 if good else 1.2), "top-20": spread(0.91 if good else 1.5)}
    variance["confident and wrong"]["value"] = spread(4.0 if good else 0.9)
    training = {name: {"KL": spread(0.5)} for name in METHODS}
    training |= {START: {"KL": spread(1.2 if good or second else 0.2)}}
    training[TOP_K] = {"KL": spread(0.2 if good else 0.9)}
    for name in (NONE, TOP_K, LOSS):
        training[name + FEWER] = {"KL": spread(0.3 if (name == TOP_K) == second else 0.8)}
    assert FULL in training
    return control_variate.Numbers(
        variance=variance,
        bias={regime: dict.fromkeys(BASELINES, spread(1e-14 if good else 0.2)) for regime in REGIMES},
        loss_bias=dict.fromkeys(REGIMES, spread(0.4 if good else 0.0)),
        warmed_up={name: spread(lower) for name in BASELINES if name != "top-20"},
        learning_rate=dict.fromkeys(METHODS, 2e-3),
        training=training,
    )


def course(updates: int, last: float, factors: tuple[float, ...] = ()) -> extrapolation.Course:
    """Half of the divergence is gone after `updates`; a validation at every power of two."""
    kl = {0: 1.0, updates: 0.5, 80: last}
    return extrapolation.Course(kl=kl, written=[64 * (step + 1) for step in range(80)], factors=factors)


def jump_numbers(good: bool, second: bool) -> extrapolation.Numbers:
    """`good`: at the better rate; `second`: at the small one."""

    def courses(updates: int, last: float) -> list[extrapolation.Course]:
        return [replace(course(updates, last), factors=(2.0,)) for _ in range(3)]

    runs = {
        "opd": {2e-4: courses(60, 0.3), 2e-3: courses(30, 0.2)},
        "eff_opd": {
            2e-4: courses(6, 0.3) if second else courses(70, 0.45),
            2e-3: courses(10, 0.2) if good else courses(31, 0.4),
        },
    }
    return extrapolation.Numbers(runs=runs, best={"opd": 2e-3, "eff_opd": 2e-3})


NUMBERS: dict[str, tuple[Any, Any]] = {
    "control_variate": (baseline_numbers(True, True), baseline_numbers(False, False)),
    "extrapolation": (jump_numbers(True, True), jump_numbers(False, False)),
}
SECOND: dict[str, tuple[Any, list[int]]] = {
    "control_variate": (replace(baseline_numbers(True, True), training=baseline_numbers(False, True).training), [5, 6]),
    "extrapolation": (jump_numbers(False, True), [0, 1, 2]),
}
