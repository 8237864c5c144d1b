"""How a command's threads wait for each other: spinning or asleep, chosen before torch loads. No torch here.

OpenMP's threads meet after every operation, and the first one there spins until the last one comes. That is quickest
while each has a core to itself. Beside another busy process it takes the core from the thread that it waits for, and a
step takes several times as long. Asleep it can be woken beside such a process, and on a quiet machine a step of small
models takes a little longer. OpenMP reads OMP_WAIT_POLICY when torch loads and never again, so what counts is what the
machine does then. benchmarks/waiting.py measures both. All this is about Linux and GNU's OpenMP, which torch brings
there; elsewhere nothing is chosen.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

POLICY = "OMP_WAIT_POLICY"
SET_BY_USERS = (POLICY, "GOMP_SPINCOUNT", "KMP_BLOCKTIME")  # each says how threads wait; the last is Intel's and LLVM's
SPARE = 0.25  # of a core: what others may use of the cores that the threads take
SAMPLE_SECONDS = 0.2
STAT = Path("/proc/stat")


@dataclass(frozen=True, slots=True)
class Load:
    """What other processes use of the cores that this one may run on."""

    used: float  # cores
    cores: int


@dataclass(frozen=True, slots=True)
class Choice:
    """Whether threads sleep while they wait, and the one line that says so."""

    passive: bool
    line: str


def set_waiting(say: Callable[[str], None]) -> None:
    """Choose for this process, and say it in one line, unless that is settled."""
    cores = len(own_cores())
    if "torch" in sys.modules or settled(os.environ, cores):
        return
    choice = choose(measured_load(), threads(os.environ, cores))
    if choice.passive:
        os.environ[POLICY] = "passive"
    say(choice.line)


def choose(load: Load | None, threads: int) -> Choice:
    """For so many threads, on a machine with this load (None: not known)."""
    if load is None:
        return Choice(True, "threads wait asleep: /proc/stat does not say how busy the machine is")
    state = f"{load.used:.1f} of {load.cores} cores in use"
    if load.used + threads > load.cores + SPARE:
        return Choice(True, f"threads wait asleep: the machine is busy ({state})")
    return Choice(False, f"threads wait spinning: the machine is quiet ({state})")


def settled(environment: Mapping[str, str], cores: int) -> bool:
    """Whether there is nothing to choose: the user has, one thread has none to wait for, or it was not measured.

    torchrun's processes have one thread each unless the user says otherwise, and then has thought about it.
    """
    return (
        sys.platform != "linux"
        or any(name in environment for name in SET_BY_USERS)
        or threads(environment, cores) == 1
        or environment.get("WORLD_SIZE", "1") != "1"
    )


def threads(environment: Mapping[str, str], cores: int) -> int:
    """How many threads OpenMP will start: OMP_NUM_THREADS, of a list the first, or one a core."""
    first = environment.get("OMP_NUM_THREADS", "").partition(",")[0].strip()
    return int(first) if first.isdecimal() and int(first) > 0 else cores


# --- how busy the machine is ------------------------------------------------------------------------------------------


def own_cores() -> set[int]:
    """The cores that this process may run on."""
    return os.sched_getaffinity(0) if sys.platform == "linux" else set(range(os.cpu_count() or 1))


def measured_load(seconds: float = SAMPLE_SECONDS) -> Load | None:
    """What is in use while this process sleeps for a moment; None where the system does not say."""
    try:
        before = STAT.read_text()
        time.sleep(seconds)
        return load_between(before, STAT.read_text(), own_cores())
    except OSError:
        return None


def load_between(before: str, after: str, cores: set[int]) -> Load | None:
    """From two texts of /proc/stat; None if they lack one of the cores, or no time has passed on it."""
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
    """(busy, idle) by core. A line is: cpuN user nice system idle iowait irq softirq steal, then guests in user."""
    found: dict[int, tuple[int, int]] = {}
    for line in stat.splitlines():
        name, *counts = line.split()
        if name.startswith("cpu") and name[3:].isdecimal():
            user, nice, system, idle, waiting, *others = map(int, counts[:8])
            found[int(name[3:])] = (user + nice + system + sum(others), idle + waiting)
    return found
