"""Numbers as the papers claim them, and their opposite, for the first studies: NUMBERS, and SECOND for setting B."""

from __future__ import annotations

import math
from typing import Any

import torch

from opd_studies.claims import estimators, fixed_points, gamma, prefixes, privileged
from opd_studies.worlds import truncated_forms
from support.study_numbers import spread


def fixed_point_numbers(good: bool, near: bool = True) -> fixed_points.Numbers:
    """`near` False: the crash of the nearer starts alone."""
    q = spread(0.6)
    mass: dict[str, dict[str, torch.Tensor]] = {start.name: {} for start in fixed_points.STARTS}
    far = fixed_points.STARTS[-1].name
    resting = {"raw": 1 / math.e, "renormalised": 0.4} if good else {"renormalised": 1.0}
    for form in truncated_forms.FORMS:
        path = torch.full((200, 3), 1.0, dtype=torch.float64)
        path[-1] = resting.get(form, 1.0 if good else 0.7)
        mass[far][form] = path * torch.tensor(q)
        for i, start in enumerate(fixed_points.STARTS[:-1]):
            path = torch.full((200, 3), 0.99, dtype=torch.float64)
            late = 150 if start.k == 20 else 20
            path[late if good and (near or i >= 2) else 10 :] = 0.37
            mass[start.name][form] = path * torch.tensor(q)
    return fixed_points.Numbers(
        identities={"a": spread(1e-15 if good else 1e-3), "b": spread(1e-16)},
        teacher_mass=dict.fromkeys(mass, q),
        mass=mass,
        shape_error={form: spread(1e-4 if good else 0.3) for form in truncated_forms.FORMS},
    )


def gamma_numbers(good_a: bool, good_b: bool) -> gamma.Numbers:
    def varied(good: bool, ratio: float) -> torch.Tensor:
        powers = torch.tensor(gamma.GAMMAS, dtype=torch.float64)
        row = 0.2 * ratio ** (powers if good else -powers)
        return torch.stack([row * (1 + 0.01 * i) for i in range(3)])

    return gamma.Numbers(
        variance={"A": varied(good_a, 100.0), "B": varied(good_b, 100.0)},
        distance={"A": varied(good_a, 20.0), "B": varied(good_b, 20.0)},
        teacher_distance={"A": torch.ones(3), "B": torch.ones(3)},
        curve={},
        paths={},
    )


def privileged_numbers(good: bool) -> privileged.Numbers:
    small, large = (1e-5, 0.95) if good else (0.95, 1e-5)
    by_design = {"shared": spread(large), "instance": spread(small)}
    return privileged.Numbers(
        to_geometric=spread(small),
        to_arithmetic=spread(large),
        value_error=spread(small),
        disagreement={"shared": spread(small), "instance": spread(large)},
        kept=by_design,
        kept_train=by_design,
        kept_held_out=by_design,
        curve={},
    )


def estimator_numbers(good: bool) -> estimators.Numbers:
    small, large = (1e-7, 0.8) if good else (0.8, 1e-7)
    low = {"raw": 0.5, "renormalised": 0.4, "stop_gradient": 0.1, "tail": 0.05, "released_code": 0.1}
    return estimators.Numbers(
        bias={f: {k: spread(v if good else 0.6 - v) for k in estimators.KS} for f, v in low.items()},
        sampled_bias=spread(small),
        sampled_noise=spread(large),
        differentiated_mean=spread(small),
        differentiated_noise=spread(large),
        student_mass={},
        teacher_mass={},
        tokens=[10] * 3,
    )


def estimators_in_both(good_a: bool, good_b: bool) -> dict[str, estimators.Numbers]:
    return {"A": estimator_numbers(good_a), "B": estimator_numbers(good_b)}


def prefix_numbers(good_a: bool, good_b: bool) -> dict[str, prefixes.Numbers]:
    def one(good: bool) -> prefixes.Numbers:
        shares = (1.0, 0.9, 0.6, 0.3, 0.2) if good else (0.5, 0.5, 0.6, 0.8, 0.9)
        return prefixes.Numbers(
            student=spread(0.1),
            continued={d: spread(v) for d, v in zip(prefixes.DEPTHS, shares, strict=True)},
            right_to_wrong=spread(0.1),
            wrong_to_right=spread(0.1),
        )

    return {"A": one(good_a), "B": one(good_b)}


NUMBERS: dict[str, tuple[Any, Any]] = {
    "fixed_points": (fixed_point_numbers(True), fixed_point_numbers(False)),
    "gamma": (gamma_numbers(True, True), gamma_numbers(False, False)),
    "privileged": (privileged_numbers(True), privileged_numbers(False)),
    "estimators": (estimators_in_both(True, True), estimators_in_both(False, False)),
    "prefixes": (prefix_numbers(True, True), prefix_numbers(False, False)),
}

# Numbers that fail in setting A and are as claimed in B, and the claims (by place) that then hold in B only.
SECOND: dict[str, tuple[Any, list[int]]] = {
    "gamma": (gamma_numbers(False, True), [0, 1]),
    "prefixes": (prefix_numbers(False, True), [0, 1]),
    "estimators": (estimators_in_both(False, True), [0, 1, 2, 3, 4]),
    "fixed_points": (fixed_point_numbers(True, near=False), [4]),
}
