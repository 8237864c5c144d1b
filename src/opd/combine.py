"""Two published methods in one: what one of them decides is taken from it, what both decide composes or is refused.

Plain on-policy distillation is the middle. A field that a method leaves as it is there is free for the other. Weights
multiply, filters run one after the other, what states learn from a step is learned by both. Of every other field one
alone may decide.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

from opd import keep, observers, signals, weights
from opd.errors import ConfigError
from opd.method import Method
from opd.needs import needs_of

PLAIN = Method(signal=signals.sampled_reverse_kl())
TOGETHER: dict[str, Callable[..., Any]] = {
    "weight": weights.times,
    "keep": keep.in_turn,
    "observe": observers.all_of,
}
TEACHERS = frozenset({"teacher", "teacher_logp", "teacher_entropy"})  # needs that only a teacher meets


def combined(first: Method, second: Method, names: tuple[str, str] = ("the first", "the second")) -> Method:
    """One method of two. Raises ConfigError with what keeps them apart."""
    if why := apart(first, second):
        raise ConfigError(f"Methods {names[0]} and {names[1]} do not go together: {why}.")
    return _together(first, second)[0]


def apart(first: Method, second: Method) -> str | None:
    """What keeps two methods apart, in words, or None."""
    method, torn = _together(first, second)
    return f"both decide {', '.join(torn)}" if torn else incoherence(method)


def _together(first: Method, second: Method) -> tuple[Method, list[str]]:
    """The fields of both, and the names of those that both decide, which are the first one's."""
    torn = [f"state {name!r}" for name in first.state.keys() & second.state.keys()]
    chosen: dict[str, Any] = {"state": {**first.state, **second.state}}
    for name in (field.name for field in fields(Method) if field.name != "state"):
        one, other, plain = getattr(first, name), getattr(second, name), getattr(PLAIN, name)
        if other == plain or one == other:
            chosen[name] = one
        elif one == plain:
            chosen[name] = other
        elif name in TOGETHER:
            chosen[name] = TOGETHER[name](one, other)
        else:
            torn.append(name)
    return replace(first, **chosen), torn


def incoherence(method: Method) -> str | None:
    """Why the pieces of a method do not fit together, whatever recipe it stands in; None if they do."""
    needs = method.needs()
    looking = [name for name in ("weight", "keep") if "sampled_token" in needs_of(getattr(method, name))]
    baseline = "unbiased_baseline" in needs
    obstacles = [
        (
            method.teacher.kind == "none" and bool(method.top_k or needs & TEACHERS),
            "a piece reads what the teacher says, and there is no teacher",
        ),
        (
            "off_policy" in needs and bool(needs & {"sampler_logp", "policy_logp"}),
            "a piece reads with which probability the student wrote, and the student does not write",
        ),
        (baseline and "off_policy" in needs, "a baseline is biased for responses that the student did not write"),
        (
            baseline and bool(looking),
            f"the {' and '.join(looking)} looks at the sampled token, which biases a baseline",
        ),
        (
            method.teacher.tokenizer == "any" and (bool(method.top_k) or "teacher" in needs_of(method.update)),
            "a piece compares the models token by token, and the teacher has a tokenizer of its own",
        ),
        (
            {"imitates", "ascends"} <= needs and "sign_conflict" not in needs,
            "one draws the student towards its teacher, the other drives it away",
        ),
        (
            "trusts" in needs and "reward" in needs_of(method.credit),
            "the weight says how far to trust the teacher, and would weigh a reward with it",
        ),
        (
            "judge" in needs and "reward" in needs_of(method.update),
            "the update compares weights by a reward whose yardstick is made anew from the responses it grades",
        ),
    ]
    return next((why for obstructed, why in obstacles if obstructed), None)
