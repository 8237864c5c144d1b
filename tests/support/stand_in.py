"""The stand-in of vLLM's server as a program (tests/engines/stand_in), for `start` sections."""

from __future__ import annotations

import os
import re
import sys
import time
from pathlib import Path
from typing import Any

TESTS = Path(__file__).parents[1]
PATHS = (TESTS / "engines" / "stand_in", TESTS, TESTS.parent / "src")


def start(how: str = "answers", **more: Any) -> dict[str, Any]:
    """A `start` section whose server does what `how` says: answers, scores, ends, hangs."""
    path = os.pathsep.join(map(str, PATHS))
    return {"python": sys.executable, "env": {"STAND_IN": how, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}, **more}


def pids(log: Path) -> list[int]:
    """The server's process and the one that it has started."""
    return [int(pid) for pid in re.findall(r"^pids: (\d+) (\d+)$", log.read_text(), re.MULTILINE)[-1]]


def all_end(processes: list[int], within_s: float = 15.0) -> bool:
    """Whether all of these processes end in time. A zombie has ended."""
    until = time.monotonic() + within_s
    while any(_runs(pid) for pid in processes):
        if time.monotonic() > until:
            return False
        time.sleep(0.1)
    return True


def _runs(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"
