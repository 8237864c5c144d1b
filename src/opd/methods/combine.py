"""Combines two published methods, field by field.

A method sets a field if it differs from plain on-policy distillation (`PLAIN`). A field that one method sets is taken
from it. If both set it, weights multiply and filters run one after another; any other field is a conflict. Both methods
keep their memories; two of one name are a conflict.
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
    """The combination of two methods. Raises ConfigError with the conflict."""
    if why := conflict(first, second):
        raise ConfigError(f"Methods {names[0]} and {names[1]} cannot be combined: {why}.")
    return _together(first, second)[0]


def conflict(first: Method, second: Method) -> str | None:
    """Why two methods cannot be combined, as a clause; None if they can."""
    method, torn = _together(first, second)
    if torn:
        return f"both set {', '.join(torn)}"
    rule = broken(Facts(method=method))
    return None if rule is None else rule.what


def _together(first: Method, second: Method) -> tuple[Method, list[str]]:
    """The combined method, and the names of conflicting fields, which keep the first method's value."""
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
