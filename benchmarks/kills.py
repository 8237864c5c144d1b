"""Stop runs at random moments, and compare what they leave with a run that was never stopped, byte for byte.

python benchmarks/kills.py                              100 SIGKILLs and 30 SIGTERMs
python benchmarks/kills.py --kills 10 --terms 5 --seed 1
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from common import HERE

from opd.stage import checkpoint

sys.path.insert(0, str(HERE.parent / "tests"))
from support.runs import ENVIRONMENT, import_all, left, prepare, run_job, two_stages

TRAIN = ("train", "recipe.yaml")


def started(folder: Path) -> int:
    """Fork a process that trains in `folder`; its id."""
    out, err = folder.with_suffix(".out"), folder.with_suffix(".err")
    for file in (out, err):
        file.write_bytes(b"")
    child = os.fork()
    if child == 0:
        run_job({"folder": str(folder), "arguments": TRAIN, "out": str(out), "err": str(err), "strike": None})
    return child


def where(folder: Path) -> str:
    """What the run was doing, by the files that it has left."""
    stages = [stage for stage in (folder / "run").glob("*") if stage.is_dir() and not (stage / "done.json").exists()]
    if any(any(stage.glob("checkpoints/.writing-*")) for stage in stages):
        return "in a checkpoint"
    if any((stage / "evaluating").exists() for stage in stages):
        return "in an evaluation"
    if any(any(stage.glob(".writing-*")) for stage in stages):
        return "in a file"
    if any((stage / "metrics.jsonl").exists() for stage in stages):
        return "in the steps"
    return "before the first step of a stage"


def compared(folder: Path) -> dict[str, Any]:
    """What the run has left, without the checkpoints before the last of each stage: a stop writes one more of them."""
    last = {checkpoint.latest(stage / "checkpoints") for stage in (folder / "run").iterdir() if stage.is_dir()}
    kept = [path.relative_to(folder / "run").as_posix() for path in last if path is not None]
    return {
        name: content
        for name, content in left(folder / "run").items()
        if "/checkpoints/" not in name or any(name.startswith(f"{path}/") for path in kept)
    }


def stopped(folder: Path, number: signal.Signals, after: float) -> int | None:
    """Send the signal `after` seconds; the exit code, None if the run has ended before."""
    child, until = started(folder), time.monotonic() + after
    ended, status = os.waitpid(child, os.WNOHANG)
    while not ended and time.monotonic() < until:
        time.sleep(0.005)
        ended, status = os.waitpid(child, os.WNOHANG)
    if not ended:
        os.kill(child, number)
        _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    # SIGTERM ends a process at once that has not begun to load a model.
    assert code in (0, -signal.SIGKILL, -signal.SIGTERM, 128 + signal.SIGTERM), folder.with_suffix(".err").read_text()
    return None if code == 0 else code


def main() -> None:
    """Print one line per signal and place, and the number of runs that differ."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--terms", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    os.environ.update(ENVIRONMENT)
    import_all()
    rng = random.Random(given.seed)
    with tempfile.TemporaryDirectory() as place:
        whole = prepare(Path(place) / "whole", two_stages())
        began = time.monotonic()
        assert os.waitstatus_to_exitcode(os.waitpid(started(whole), 0)[1]) == 0, whole.with_suffix(".err").read_text()
        seconds, expected = time.monotonic() - began, compared(whole)
        print(f"an uninterrupted run: {seconds:.1f} s, {len(expected)} files")
        differ = runs = 0
        for number, wanted in ((signal.SIGKILL, given.kills), (signal.SIGTERM, given.terms)):
            places: Counter[str] = Counter()
            while places.total() < wanted:
                runs += 1
                folder = prepare(Path(place) / f"run-{runs}", two_stages())
                while places.total() < wanted and stopped(folder, number, rng.uniform(0.1, seconds)) is not None:
                    places[where(folder)] += 1
                assert stopped(folder, number, 600.0) is None, "a run that does not end"
                found = compared(folder)
                if found != expected:
                    differ += 1
                    names = sorted(name for name in {**found, **expected} if found.get(name) != expected.get(name))
                    print(f"{number.name} {folder.name} differs in {', '.join(names)}", flush=True)
            for name, count in places.most_common():
                print(f"{number.name:8} {count:4}  {name}")
        print(f"{runs} runs, {differ} of them differ from the uninterrupted one")
    sys.exit(differ > 0)


if __name__ == "__main__":
    main()
