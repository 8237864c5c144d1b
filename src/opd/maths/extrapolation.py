"""Where a distribution between and beyond two others begins to lose its tail. Plain numbers, no torch.

With a teacher q and a base b, pi = q^lambda b^(1 - lambda) / Z is between them for lambda in (0, 1), the teacher at 1,
and beyond it above 1. Take one class of equal tokens, with the mass p under the teacher and b under the base; the other
tokens are its tail.

    pi(tail) / pi(class) = ((1 - p) / p)^lambda ((1 - b) / b)^(1 - lambda)
"""

from __future__ import annotations

import math

from opd.errors import ConfigError


def extrapolated_mass(p: float, b: float, strength: float) -> float:
    """The mass of the class under pi at lambda = `strength`. Raises ConfigError for a mass that is not in (0, 1)."""
    odds = strength * _tail_odds(p, "p, of the teacher") + (1.0 - strength) * _tail_odds(b, "b, of the base")
    return 1.0 / (1.0 + math.exp(odds)) if odds < 0 else math.exp(-odds) / (1.0 + math.exp(-odds))


def largest_strength(p: float, b: float, bound: float) -> float:
    """lambda*: the largest lambda at which the teacher's ratio q/pi on the tail stays within `bound` = c.

    lambda* = [log((1 - p)/(c - 1 + p)) - log((1 - b)/b)] / [log((1 - p)/p) - log((1 - b)/b)]   (arXiv 2605.08737)

    Beyond it pi(tail) < (1 - p)/c, so a weight min(c, q/pi) that restores a lost tail is cut. It is above 1, grows with
    c, and falls to 1 as p -> 1. Infinite for p <= b: extrapolation then adds mass to the tail. Raises ConfigError for
    masses that are not in (0, 1), whose log-odds are infinite, and unless 1 < c < infinity.
    """
    if not 1.0 < bound < math.inf:
        raise ConfigError(f"The bound c of the teacher's ratio must be above 1 and finite, got {bound}.")
    teacher, base = _tail_odds(p, "p, of the teacher"), _tail_odds(b, "b, of the base")
    if p <= b:
        return math.inf
    return (math.log((1.0 - p) / (bound - 1.0 + p)) - base) / (teacher - base)


def _tail_odds(mass: float, whose: str) -> float:
    """log((1 - mass) / mass). Raises ConfigError for a mass that is not in (0, 1)."""
    if not 0.0 < mass < 1.0:
        raise ConfigError(
            f"The mass {whose}, is {mass}, and its log-odds are infinite: lambda* needs a mass between 0 and 1. Leave "
            "this class of tokens out, or compute its mass in float64."
        )
    return math.log1p(-mass) - math.log(mass)
