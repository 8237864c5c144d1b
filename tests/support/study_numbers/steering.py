"""Numbers as the papers claim them, and their opposite, for the studies of baselines and of jumps."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from opd_studies.claims import control_variate, extrapolation
from opd_studies.claims.control_variate import FEWER, FULL, LOSS, METHODS, NONE, TOP_K
from opd_studies.lab.ablation import START
from opd_studies.lab.variances import BASELINES, REGIMES
from support.study_numbers import spread


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


def course(updates: int, last: float) -> extrapolation.Course:
    """A tenth of the divergence is gone after `updates`."""
    kl = {0: 1.0, updates: 0.9, 80: last}
    return extrapolation.Course(kl=kl, written=[64 * (step + 1) for step in range(80)], factors=(2.0,))


def jump_numbers(good: bool, second: bool) -> extrapolation.Numbers:
    """`good`: with the sampled token, and less saved at the large rate; `second`: with the exact one, small rate."""

    def courses(updates: int, last: float) -> list[extrapolation.Course]:
        return [course(updates, last)] * 3

    worse = courses(70, 0.75)
    runs = {
        "opd": {5e-5: courses(60, 0.7), 2e-3: courses(30, 0.4)},
        "eff_opd": {5e-5: courses(6, 0.7), 2e-3: courses(10, 0.4) if good else courses(31, 0.6)},
        "reverse_kl": {5e-5: courses(60, 0.6), 2e-3: courses(30, 0.3)},
        "reverse_kl + eff_opd": {
            5e-5: courses(6, 0.5) if second else worse,
            2e-3: courses(20, 0.3) if good else courses(2, 0.3),
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
