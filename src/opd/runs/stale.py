"""Responses of older weights: `ahead`, and importance weights of a policy gradient. Loads nothing, sends nothing."""

from __future__ import annotations

from dataclasses import replace

from opd.errors import ConfigError
from opd.method import Method
from opd.pieces import importance
from opd.pieces.needs import Reads, Trait, needs_of
from opd.pieces.weights import times
from opd.recipe.schema import StageSpec

IMPORTANCE = "importance"  # the name of the memory that measures the weights


def with_importance(spec: StageSpec, method: Method) -> Method:
    """The method with the stage's importance weights. Raises ConfigError for a method that they do not fit."""
    section = spec.importance
    if section is None:
        return method
    where = f"{spec.where(None)}: `importance` weighs a policy gradient, and method {spec.method!r}"
    if Trait.POLICY_GRADIENT not in method.needs:
        raise ConfigError(
            f"{where} has none: its loss is computed with the step's weights at each prefix, and only the prefixes are "
            "older. Remove `importance`."
        )
    if Reads.SAMPLER_LOGP in needs_of(method.signal):
        raise ConfigError(f"{where} has an importance ratio of its own, which would count twice. Remove `importance`.")
    if Trait.OFF_POLICY in method.needs or method.parts:
        raise ConfigError(
            f"{where} also trains on responses that the student does not write, which have no log-prob of a sampler. "
            "Remove `importance`."
        )
    weight = times(method.weight, importance.truncated(section.level, section.cap))
    memory = {**method.memory, IMPORTANCE: importance.weighed(section.level, section.cap)}
    return replace(method, weight=weight, memory=memory)


def check_ahead(spec: StageSpec, method: Method) -> list[str]:
    """Refuse a stage that cannot write one step ahead. Returns lines to show; one names the bias that is left.

    Raises ConfigError.
    """
    if not spec.ahead:
        return []
    where, source = f"{spec.where(None)}: `ahead: 1`", needs_of(method.source)
    if spec.engine is None:
        raise ConfigError(
            f"{where} writes the next step's responses while this one trains, which needs an `engine`: one process "
            "cannot do both. Add `engine`, or remove `ahead`."
        )
    if Trait.OFF_POLICY in source or source.inputs or source.first_look:
        raise ConfigError(
            f"{where}: in method {spec.method!r} not the student alone writes a step's responses in one call, so they "
            "cannot be drawn before the step. Remove `ahead`."
        )
    if Trait.UNBIASED_BASELINE in method.needs:
        raise ConfigError(
            f"{where}: method {spec.method!r} subtracts a baseline, which is unbiased only for tokens drawn from the "
            "weights that train. Remove `ahead`, or use method opd."
        )
    lines = ["each step trains on responses of the weights one update before"]
    weighs = spec.importance is not None or Reads.SAMPLER_LOGP in needs_of(method.signal)
    if Trait.POLICY_GRADIENT in method.needs and not weighs:
        lines.append(
            f"method {spec.method!r} is a policy gradient without importance weights: its gradient is the mean over "
            "responses of the older weights, E_mu instead of E_p, which is biased, and at a large learning rate the "
            "student collapses. `importance: {level: token}` weighs each token by min(cap, p/mu)"
        )
    return lines
