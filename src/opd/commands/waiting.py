"""Choose how OpenMP's threads wait for each other, spinning or asleep, before torch loads. No torch here.

OpenMP's threads synchronise after every operation: the early ones wait for the last one. Spinning is fastest while each
thread has a core of its own. If another process is busy, a spinning thread takes the core from the thread that it waits
for, and a step takes several times as long. Sleeping threads avoid that; on a quiet machine they make a step of small
models a little slower. OpenMP reads OMP_WAIT_POLICY once, when torch loads, so the machine's load at that moment
decides. benchmarks/waiting.py measures both. This applies to Linux and GNU's OpenMP, which torch ships there; on other
systems nothing is chosen.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

POLICY = "OMP_WAIT_POLICY"
SET_BY_USERS = (POLICY, "GOMP_SPINCOUNT", "KMP_BLOCKTIME")  # each sets how threads wait; the last: Intel, LLVM
SPARE = 0.25  # cores of load from other processes that still count as quiet
SAMPLE_SECONDS = 0.2
STAT = Path("/proc/stat")


@dataclass(frozen=True, slots=True)
class Load:
    """Load of other processes on the cores that this process may use."""

    used: float  # cores
    cores: int


@dataclass(frozen=True, slots=True)
class Choice:
    """Whether threads sleep while they wait, and the line to print."""

    passive: bool
    line: str


def set_waiting(say: Callable[[str], None]) -> None:
    """Choose for this process and print one line, unless `settled`."""
    cores = len(own_cores())
    if "torch" in sys.modules or settled(os.environ, cores):
        return
    choice = choose(measured_load(), threads(os.environ, cores))
    if choice.passive:
        os.environ[POLICY] = "passive"
    say(choice.line)


def choose(load: Load | None, threads: int) -> Choice:
    """The choice for `threads` threads at this load (None: unknown)."""
    if load is None:
        return Choice(True, "threads wait asleep: /proc/stat does not say how busy the machine is")
    state = f"{load.used:.1f} of {load.cores} cores in use"
    if load.used + threads > load.cores + SPARE:
        return Choice(True, f"threads wait asleep: the machine is busy ({state})")
    return Choice(False, f"threads wait spinning: the machine is quiet ({state})")


def settled(environment: Mapping[str, str], cores: int) -> bool:
    """Whether to leave the default: the user has chosen, there is one thread, or the system is not Linux.

    torchrun starts processes with one thread each, unless the user sets another number on purpose.
    """
    return (
        sys.platform != "linux"
        or any(name in environment for name in SET_BY_USERS)
        or threads(environment, cores) == 1
        or environment.get("WORLD_SIZE", "1") != "1"
    )


def threads(environment: Mapping[str, str], cores: int) -> int:
    """Number of threads that OpenMP will start: OMP_NUM_THREADS (the first of a list), else one per core."""
    first = environment.get("OMP_NUM_THREADS", "").partition(",")[0].strip()
    return int(first) if first.isdecimal() and int(first) > 0 else cores


# --- how busy the machine is ------------------------------------------------------------------------------------------


def own_cores() -> set[int]:
    """The cores that this process may run on."""
    return os.sched_getaffinity(0) if sys.platform == "linux" else set(range(os.cpu_count() or 1))


def measured_load(seconds: float = SAMPLE_SECONDS) -> Load | None:
    """The load while this process sleeps for `seconds`; None if /proc/stat cannot be read."""
    try:
        before = STAT.read_text()
        time.sleep(seconds)
        return load_between(before, STAT.read_text(), own_cores())
    except OSError:
        return None


def load_between(before: str, after: str, cores: set[int]) -> Load | None:
    """The load between two texts of /proc/stat; None if a core is missing or no time has passed on it."""
    first, last = _ticks(before), _ticks(after)
    used = 0.0
    for core in cores:
        if core not in first or core not in last:
            return None
        busy, idle = (now - then for now, then in zip(last[core], first[core], strict=True))
        if busy + idle <= 0:
            return None
        used += busy / (busy + idle)
    return Load(used, len(cores))


def _ticks(stat: str) -> dict[int, tuple[int, int]]:
    """(busy, idle) ticks by core. A line: cpuN user nice system idle iowait irq softirq steal, then guests in user."""
    found: dict[int, tuple[int, int]] = {}
    for line in stat.splitlines():
        name, *counts = line.split()
        if name.startswith("cpu") and name[3:].isdecimal():
            user, nice, system, idle, waiting, *others = map(int, counts[:8])
            found[int(name[3:])] = (user + nice + system + sum(others), idle + waiting)
    return found
