"""Answers in the data that nobody looks at: no mistake, but no accuracy comes out, and that is said."""

from __future__ import annotations

from collections.abc import Sequence

from opd.method import Method
from opd.needs import needs_of
from opd.rewards import AnyReward
from opd.types import Prompt


def unread_answers(prompts: Sequence[Prompt], method: Method | None, *rewards: AnyReward | None) -> int:
    """How many prompts have an answer that neither the method nor any of the rewards looks at.

    A function of the user's own that declares no needs may look at everything.
    """
    given = [reward for reward in rewards if reward is not None]
    own = any(":" in getattr(reward, "name", ":") for reward in given)
    if own or "answer" in needs_of(*given) | (frozenset() if method is None else method.needs()):
        return 0
    return sum(prompt.answer is not None for prompt in prompts)


def unread_line(count: int, which: str) -> str:
    """What is said of `count` such rows; `which` is "training" or "held-out"."""
    return (
        f"{count} {which} rows have an `answer`, and nothing reads it: without a reward that does, no accuracy is "
        "measured"
    )
