"""The next step's responses in a checkpoint of a stage that writes one step ahead: older weights have drawn them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from opd.parallel import World
from opd.samplers.ahead import Ahead
from opd.stage.kept_responses import rollout_of, row_of
from opd.types import Prompt

KEY = "ahead"  # in a checkpoint's state


def saved(ahead: Ahead, step: int, positions: Sequence[int], world: World, *, waits: bool = True) -> dict[str, Any]:
    """The responses of `step` of all processes, in the order of the prompts; empty if no server gave them.

    `positions`: those of this process's prompts among the step's. `waits`: for those that are still drawn.
    """
    drawn = ahead.responses(step, waits=waits)
    if world.any(drawn is None) or drawn is None:
        return {}
    return {KEY: world.in_order(positions, [row_of(one) for one in drawn])}


def restore(
    ahead: Ahead, step: int, prompts: Sequence[Prompt], positions: Sequence[int], state: Mapping[str, Any]
) -> bool:
    """Take this process's responses to the step's `prompts` from a checkpoint; False if it has none of them."""
    rows = state.get(KEY, ())
    if not rows:
        return False
    each = len(rows) // len(prompts)
    samplers = ahead.samplers
    drawn = [
        rollout_of(row, prompts[i], samplers[None if None in samplers else prompts[i].task].sampling)
        for i in positions
        for row in rows[i * each : (i + 1) * each]
    ]
    ahead.restore(step, [prompts[i] for i in positions], drawn)
    return True
