"""Two published methods in one: what one of them decides is taken from it, what both decide composes or is refused.

Plain on-policy distillation is the middle. A field that a method leaves as it is there is free for the other. Weights
multiply, filters run one after the other, and each keeps the memory that it has. Of every other field one alone may
decide.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

from opd.errors import ConfigError
from opd.method import Method
from opd.methods.coherence import Facts, broken
from opd.pieces import filters, signals, weights

PLAIN = Method(signal=signals.sampled_reverse_kl())


TOGETHER: dict[str, Callable[..., Any]] = {
    "weight": weights.times,
    "filter": filters.in_turn,
}


def combined(first: Method, second: Method, names: tuple[str, str] = ("the first", "the second")) -> Method:
    """One method of two. Raises ConfigError with what keeps them apart."""
    if why := conflict(first, second):
        raise ConfigError(f"Methods {names[0]} and {names[1]} do not go together: {why}.")
    return _together(first, second)[0]


def conflict(first: Method, second: Method) -> str | None:
    """What keeps two methods apart, in words, or None."""
    method, torn = _together(first, second)
    if torn:
        return f"both decide {', '.join(torn)}"
    rule = broken(Facts(method=method))
    return None if rule is None else rule.what


def _together(first: Method, second: Method) -> tuple[Method, list[str]]:
    """The fields of both, and the names of those that both decide, which are the first one's."""
    torn = [f"memory {name!r}" for name in first.memory if name in second.memory]
    chosen: dict[str, Any] = {"memory": {**first.memory, **second.memory}}
    for name in (field.name for field in fields(Method) if field.name != "memory"):
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
