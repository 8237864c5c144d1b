"""Actions of several conversations at once, in threads: for tools that wait for a process or a server.

A thread cannot be interrupted. An action that still runs after its limit of time is left behind: its conversation ends,
and another thread takes its place.
"""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from opd.environments.acting import Limits, Printed, acted, failed
from opd.environments.protocol import Environment, Observation, Turn
from opd.plugins import contained

LATE_S = 0.5  # after the limit: an action that ends in time to say that it took too long has done so


@dataclass(slots=True)
class _Job:
    """One action."""

    place: int
    state: Any
    turn: Turn
    started: float = 0.0


@dataclass(slots=True, kw_only=True)
class Workers:
    """Acts for conversations, `workers` at once; with 1 in this thread, one after another."""

    environment: Environment
    limits: Limits
    workers: int = 1
    left_behind: int = field(default=0, init=False)  # threads that still run an action

    def __call__(self, actions: Sequence[tuple[Any, Turn]]) -> list[tuple[Observation, bool]]:
        """(the observation, whether the action still runs) for each (state, turn), in order."""
        if self.workers == 1 or len(actions) < 2:
            return [(acted(self.environment, state, turn, self.limits), False) for state, turn in actions]
        with contained(), Printed() as printed:
            return self._together([_Job(i, state, turn) for i, (state, turn) in enumerate(actions)], printed)

    def _together(self, jobs: list[_Job], printed: Printed) -> list[tuple[Observation, bool]]:
        waiting: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        done: queue.SimpleQueue[tuple[_Job, Observation | BaseException]] = queue.SimpleQueue()
        running: dict[int, _Job] = {}

        def work() -> None:
            while (job := waiting.get()) is not None:
                job.started = time.monotonic()
                running[job.place] = job
                try:
                    done.put((job, acted(self.environment, job.state, job.turn, self.limits, printed)))
                except BaseException as error:  # a stop of the run, which this thread's owner raises
                    done.put((job, error))
                    return

        def start() -> None:
            threading.Thread(target=work, name="opd-environment", daemon=True).start()

        for job in jobs:
            waiting.put(job)
        for _ in range(min(self.workers, len(jobs))):
            start()
        try:
            return self._gathered(len(jobs), running, done, start)
        finally:
            for _ in range(self.workers + self.left_behind):
                waiting.put(None)

    def _gathered(
        self,
        count: int,
        running: dict[int, _Job],
        done: queue.SimpleQueue[tuple[_Job, Observation | BaseException]],
        start: Callable[[], None],
    ) -> list[tuple[Observation, bool]]:
        """The results in order. Raises what stops the run."""
        found: dict[int, tuple[Observation, bool]] = {}
        while len(found) < count:
            with contextlib.suppress(queue.Empty):
                job, result = done.get(timeout=0.05)
                running.pop(job.place, None)
                if isinstance(result, BaseException):
                    raise result
                found.setdefault(job.place, (result, False))
            now = time.monotonic()
            for job in [one for one in list(running.values()) if now - one.started > self.limits.timeout_s + LATE_S]:
                del running[job.place]
                why = f"it took longer than {self.limits.timeout_s:g} s"
                found.setdefault(job.place, (failed(job.turn, why, "timeouts", self.limits), True))
                self.left_behind += 1
                start()
        return [found[i] for i in range(count)]
