"""The time left of a stage, from its steps and evaluations so far."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

RECENT = 20  # steps


@dataclass(slots=True)
class Pace:
    """`due`: whether an evaluation follows after so many updates."""

    steps: int
    due: Callable[[int], bool]
    recent: deque[float] = field(default_factory=lambda: deque[float](maxlen=RECENT))
    exam: float = 0.0  # seconds of the last evaluation
    since: float = field(default_factory=time.monotonic)

    def start(self) -> None:
        """A step or an evaluation begins."""
        self.since = time.monotonic()

    def stepped(self) -> None:
        """A step has ended."""
        self.recent.append(time.monotonic() - self.since)

    def examined(self) -> None:
        """An evaluation has ended."""
        self.exam = time.monotonic() - self.since

    def left(self, done: int) -> float:
        """Seconds until the end of the stage, evaluations included, after `done` updates; 0 before the first step."""
        if not self.recent:
            return 0.0
        exams = sum(self.due(step) or step == self.steps for step in range(done + 1, self.steps + 1))
        return (self.steps - done) * sum(self.recent) / len(self.recent) + exams * self.exam


def spoken(seconds: float) -> str:
    """A duration in words: 40 s, 12 min, 3.5 h."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 100 * 60 else f"{seconds / 3600:.1f} h"
