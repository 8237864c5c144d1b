"""Seconds of a step by part."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Mapping

import torch


def peak_bytes(device: torch.device) -> int:
    """Peak memory: of this process on a CPU, of torch's allocations on a GPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # bytes there, KiB elsewhere


class Stopwatch:
    """Starts when created. `lap` adds the seconds since the last lap to a part of the step."""

    def __init__(self) -> None:
        self._started = self._last = time.perf_counter()
        self._worked = time.process_time()
        self.laps: dict[str, float] = {}

    def lap(self, part: str) -> None:
        """Add the time since the last lap to `part`."""
        now = time.perf_counter()
        self.laps[part] = self.laps.get(part, 0.0) + now - self._last
        self._last = now

    @property
    def total(self) -> float:
        """Seconds from the start to the last lap."""
        return self._last - self._started

    def row(self, counts: Mapping[str, float]) -> dict[str, float]:
        """A row of timings: seconds by part, their total, `counts`, and CPU seconds until now."""
        return {**self.laps, "total": self.total, **counts, "cpu": time.process_time() - self._worked}
