"""Numbers as the papers claim them, and their opposite, for the studies of masses, costs and weight changes."""

from __future__ import annotations

from typing import Any

from opd_studies.claims import baseline_cost, overlap_mass, weight_change
from opd_studies.claims.overlap_mass import OPPOSITE, OWN, SAME_ROWS, SMALLER, K
from opd_studies.claims.weight_change import EXACT, GRPO, SAMPLED, SFT, VERSIONS
from opd_studies.lab.loss_costs import BASELINE, FULL, FUSED, LOSS, PLAIN
from opd_studies.lab.loss_costs import SAMPLED as TOKEN
from support.study_numbers import spread


def overlap_course(mass: float, ratio: tuple[float, float], shift: float, moves: float = 0.0) -> overlap_mass.Course:
    masses = {1: mass + shift, 10: mass + shift + moves}
    overlap = dict(zip((1, 10), ratio, strict=True))
    return overlap_mass.Course(
        overlap=overlap, student_mass=masses, teacher_mass=masses, before=0.2, after=0.6, teacher=0.9
    )


def mass_numbers(by_k: dict[int, bool]) -> overlap_mass.Numbers:
    """`by_k`: whether the numbers at this k are as claimed."""

    def courses(mass: float, ratio: tuple[float, float], moves: float) -> list[overlap_mass.Course]:
        return [overlap_course(mass, ratio, shift, moves) for shift in (-1e-3, 0.0, 1e-3)]

    numbers: dict[tuple[str, int], list[overlap_mass.Course]] = {}
    for k, good in by_k.items():
        taught = courses(0.98, (0.7, 0.9), 0.01) if good else courses(0.8, (0.7, 0.71), 0.1)
        numbers |= {(OWN, k): taught, (SAME_ROWS, k): taught}
        numbers[OPPOSITE, k] = courses(0.5 if good else 0.99, (0.4, 0.8), 0.1)
    return numbers


def cost_numbers(by_implementation: dict[str, bool]) -> baseline_cost.Numbers:
    def cost(good: bool) -> baseline_cost.Cost:
        means = {TOKEN: 1.0, BASELINE: 1.02 if good else 4.0, LOSS: 1.5, FULL: 2.0}
        each = {name: spread(mean) for name, mean in means.items()}
        return baseline_cost.Cost(seconds=each, mib=each)

    return {name: cost(good) for name, good in by_implementation.items()}


def change(good: bool, seed: int) -> weight_change.Change:
    shift = 1e-3 * seed
    rescued, kept = (0.85, 0.88) if good else (0.35, 0.4)
    versions = dict(zip(VERSIONS, (0.9, 0.4, rescued + shift, kept + shift), strict=True))
    return weight_change.Change(
        concentration=(0.8 if good else 0.3) + shift,
        effective_rank=(0.2 if good else 0.8) - shift,
        cosine={6: (0.7 if good else 0.2) + shift, 60: 1.0},
        base=0.3,
        accuracy=versions,
    )


def weight_numbers(by_method: dict[str, bool]) -> weight_change.Numbers:
    """`by_method`: whether its change is as claimed; those of the comparisons are between both."""
    middle = {"concentration": 0.5, "effective_rank": 0.5}
    others = [
        weight_change.Change(**middle, cosine={6: 0.4, 60: 1.0}, base=0.3, accuracy=dict.fromkeys(VERSIONS, 0.8))
        for _ in range(3)
    ]
    return {name: [change(good, seed) for seed in range(3)] for name, good in by_method.items()} | {
        GRPO: others,
        SFT: others,
    }


NUMBERS: dict[str, tuple[Any, Any]] = {
    "overlap_mass": (mass_numbers({K: True, SMALLER: True}), mass_numbers({K: False, SMALLER: False})),
    "baseline_cost": (cost_numbers({PLAIN: True, FUSED: True}), cost_numbers({PLAIN: False, FUSED: False})),
    "weight_change": (weight_numbers({SAMPLED: True, EXACT: True}), weight_numbers({SAMPLED: False, EXACT: False})),
}
SECOND: dict[str, tuple[Any, list[int]]] = {
    "overlap_mass": (mass_numbers({K: False, SMALLER: True}), [0, 1, 2, 3]),
    "baseline_cost": (cost_numbers({PLAIN: False, FUSED: True}), [0, 1, 2]),
    "weight_change": (weight_numbers({SAMPLED: False, EXACT: True}), [0, 1, 2, 3, 4]),
}
