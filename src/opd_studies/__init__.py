"""Claims of the papers, rerun: one file per study, each with a function `run(lab) -> Outcome`. This is their registry.

A study's file has its claims in `judge`, thresholds as constants, and advice for users in `USE`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import ModuleType

from opd.errors import ConfigError, nearest
from opd_studies.claims import (
    agent_errors,
    alignment,
    anti_sd,
    baseline_cost,
    brts,
    cliff,
    cold_start,
    control_variate,
    copd,
    debate,
    digit_weights,
    estimators,
    extrapolation,
    fixed_points,
    gamma,
    length,
    losses,
    one_token,
    order_margin,
    overlap_mass,
    prefixes,
    privileged,
    prompts,
    prune,
    reverse,
    ropd,
    simct,
    sparse_to_dense,
    special_tokens,
    stale,
    supports,
    teacher_choice,
    top_p,
    two_teachers,
    visd,
    weight_change,
)
from opd_studies.lab.lab import Lab
from opd_studies.page.outcome import Outcome

STUDIES: dict[str, Callable[[Lab], Outcome]] = {
    "fixed_points": fixed_points.run,
    "estimators": estimators.run,
    "gamma": gamma.run,
    "losses": losses.run,
    "one_token": one_token.run,
    "top_p": top_p.run,
    "special_tokens": special_tokens.run,
    "prefixes": prefixes.run,
    "privileged": privileged.run,
    "teacher_choice": teacher_choice.run,
    "reverse": reverse.run,
    "cold_start": cold_start.run,
    "prompts": prompts.run,
    "supports": supports.run,
    "overlap_mass": overlap_mass.run,
    "length": length.run,
    "prune": prune.run,
    "simct": simct.run,
    "two_teachers": two_teachers.run,
    "debate": debate.run,
    "control_variate": control_variate.run,
    "baseline_cost": baseline_cost.run,
    "extrapolation": extrapolation.run,
    "weight_change": weight_change.run,
    "anti_sd": anti_sd.run,
    "visd": visd.run,
    "ropd": ropd.run,
    "order_margin": order_margin.run,
    "cliff": cliff.run,
    "brts": brts.run,
    "alignment": alignment.run,
    "copd": copd.run,
    "sparse_to_dense": sparse_to_dense.run,
    "stale": stale.run,
    "agent_errors": agent_errors.run,
    "digit_weights": digit_weights.run,
}


def study(name: str) -> Callable[[Lab], Outcome]:
    """The study `name`. Raises ConfigError for an unknown one."""
    if name not in STUDIES:
        raise ConfigError(f"There is no study {name!r}.{nearest(name, STUDIES)} Known: {', '.join(STUDIES)}.")
    return STUDIES[name]


def headline(name: str) -> str:
    """The first line of the study file's docstring. Raises ConfigError for an unknown study."""
    return (_file(name).__doc__ or "").splitlines()[0].rstrip(".")


def use(name: str) -> str:
    """The study's advice for users, `USE` of its file. Raises ConfigError for an unknown study."""
    return _file(name).USE


def _file(name: str) -> ModuleType:
    study(name)
    return sys.modules[f"{__name__}.claims.{name}"]
