"""How a command's threads wait for each other: spinning or asleep, chosen before torch loads. No torch here.

OpenMP's threads meet after every operation, and the first one there spins until the last one comes. That is quickest
while each has a core to itself. Beside another busy process it takes the core from the thread that it waits for, and a
step takes several times as long. OpenMP reads OMP_WAIT_POLICY when torch loads and never again, and what the machine
will do later is not known then: so threads spin only where sleeping costs something, which is with small models.
docs/performance.md has the numbers. They are of Linux with GNU's OpenMP, which torch brings there; elsewhere nothing is
chosen.
"""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from opd.errors import OPDError
from opd.models.paths import resolved_path
from opd.recipe.schema import Characters, ModelSpec

POLICY = "OMP_WAIT_POLICY"
SET_BY_USERS = (POLICY, "GOMP_SPINCOUNT", "KMP_BLOCKTIME")  # each says how threads wait; the last is Intel's and LLVM's
LARGE = 100_000_000  # parameters: with more, sleeping costs nothing that can be measured
SPARE = 0.25  # of a core: what others may use of the cores that the threads take
SAMPLE_SECONDS = 0.2
GGUF_BITS = 5  # a weight, about: such files are quantised
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


def set_waiting(say: Callable[[str], None], models: Iterable[ModelSpec] = ()) -> None:
    """Choose for this process, and say it, unless that is settled; `models` are those that a command loads.

    Without `models` they count as small.
    """
    if "torch" in sys.modules or settled(os.environ, cores := len(own_cores())):
        return
    parameters = largest(models)
    load = None if parameters >= LARGE else measured_load()
    choice = choose(parameters, load, threads(os.environ, cores))
    if choice.passive:
        os.environ[POLICY] = "passive"
    say(choice.line)


def choose(parameters: float, load: Load | None, threads: int) -> Choice:
    """For a largest model of so many parameters, on a machine with this load (None: not known)."""
    if parameters >= LARGE:
        return Choice(True, "threads wait asleep: with a large model that costs nothing, also if the machine gets busy")
    if load is None:
        return Choice(True, "threads wait asleep: /proc/stat does not say how busy the machine is")
    state = f"{load.used:.1f} of {load.cores} cores in use"
    if load.used + threads > load.cores + SPARE:
        return Choice(True, f"threads wait asleep: the machine is busy ({state})")
    return Choice(False, f"threads wait spinning: the machine is quiet ({state}) and the models are small")


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


# --- how large the models are -----------------------------------------------------------------------------------------


def largest(models: Iterable[ModelSpec]) -> float:
    """Parameters of the largest one, which takes most of the time; 0 where there is none."""
    return max((parameters_of(model) for model in models), default=0.0)


def parameters_of(model: ModelSpec) -> float:
    """About how many, by the config or the files' sizes; infinite for a hub id, 0 for what a stage made of another.

    Nothing is raised for a path that is wrong: the command does that itself, where it is its turn.
    """
    if model.init is not None:
        return _of_config(model.init, model.tokenizer)
    if model.path is None:
        return 0.0
    try:
        path = resolved_path(model, "model")
        if isinstance(path, str):
            return math.inf
        if path.suffix == ".gguf":
            return path.stat().st_size * 8 / GGUF_BITS
        config = json.loads((path / "config.json").read_text())
        width = 2 if "16" in str(config.get("dtype") or config.get("torch_dtype")) else 4  # bytes
        return sum(file.stat().st_size for file in path.glob("*.safetensors")) / width
    except (OPDError, OSError):
        return 0.0


def _of_config(init: Mapping[str, Any], tokenizer: str | Characters | None) -> float:
    """Embedding and layers of a transformer. What a config leaves out is as in published models, so large."""
    hidden = next((init[key] for key in ("hidden_size", "n_embd", "d_model") if key in init), math.inf)
    layers = next((init[key] for key in ("num_hidden_layers", "n_layer", "num_layers") if key in init), math.inf)
    vocabulary = init.get("vocab_size", len(tokenizer.characters) if isinstance(tokenizer, Characters) else 50_000)
    try:
        return float(vocabulary * hidden + 12 * layers * hidden**2)
    except (TypeError, OverflowError):  # no numbers: the command says so
        return 0.0
