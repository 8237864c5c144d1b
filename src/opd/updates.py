"""What follows the gradient."""

from __future__ import annotations

from opd.types import Update


def optimizer_step() -> Update:
    """Clip, step, schedule."""
    return lambda optimisation: optimisation.step()
