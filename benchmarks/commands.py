"""CPU seconds of the commands that load no weights: this working tree against an older commit.

    python benchmarks/commands.py [--before COMMIT] [--quick]

`opd check recipes/quickstart.yaml`, `opd methods` and `opd describe opd`, each a process of its own, in turns. The CPU
seconds are those of the process, with the start of Python and all imports. The first round reads files from the disk
and is not counted.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from common import Record, measured, say, spread
from quickstart import BEFORE, NOW, archived, prepare

COMMANDS = {"check": ("check", "recipes/quickstart.yaml"), "methods": ("methods",), "describe": ("describe", "opd")}
ROUNDS = 2


def run(source: Path, arguments: tuple[str, ...]) -> Record:
    """Wall and CPU seconds of one call. Raises RuntimeError with its output if it fails."""
    environment = {**os.environ, "PYTHONPATH": str(source / "src")}
    before, started = os.times(), time.perf_counter()
    command = [sys.executable, "-m", "opd", *arguments]
    done = subprocess.run(command, cwd=source, capture_output=True, text=True, env=environment, check=False)
    wall, after = time.perf_counter() - started, os.times()
    if done.returncode:
        raise RuntimeError(
            f"opd {' '.join(arguments)} of {source} ended with {done.returncode}:\n{done.stderr[-2000:]}"
        )
    cpu = after.children_user - before.children_user + after.children_system - before.children_system
    return {"wall": wall, "cpu": cpu}


def race(sources: dict[str, Path], rounds: int) -> list[Record]:
    """One row per command and side."""
    rows: list[Record] = []
    for name, arguments in COMMANDS.items():
        answers: dict[str, list[Record]] = {side: [] for side in sources}
        for _ in range(rounds + 1):
            for side, source in sources.items():
                answers[side].append(run(source, arguments))
        for side, mine in answers.items():
            seconds = {key: spread([answer[key] for answer in mine[1:]]) for key in ("wall", "cpu")}
            rows.append({"command": name, "side": side, **seconds})
    return rows


def ratio(rows: list[Record], command: str) -> float:
    """CPU seconds of this tree over the older one's."""
    cpu = {row["side"]: row["cpu"]["median"] for row in rows if row["command"] == command}
    return cpu["now"] / cpu["before"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", default=BEFORE, metavar="COMMIT")
    parser.add_argument("--quick", action="store_true", help="one round, to try the code")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as place, measured("commands", options.quick) as result:
        sources = {"now": NOW, "before": archived(options.before, Path(place).resolve() / "before")}
        for source in sources.values():
            prepare(source)
        rows = race(sources, 1 if options.quick else ROUNDS)
        result |= {"before": options.before, "rows": rows}
    for row in rows:
        say(f"{row['command']:10} {row['side']:8} {row['cpu']['median']:.2f} CPU seconds")


if __name__ == "__main__":
    main()
