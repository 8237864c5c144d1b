"""`opd train recipes/quickstart.yaml` from start to end: this working tree against an older commit.

    python benchmarks/quickstart.py [--before COMMIT] [--seeds 0 1 2]

Wall time of the whole command, with evaluations and loading of libraries and weights, without the conversion of the
packaged GGUF file. The older sources come from `git archive`; one process at a time, each run in a new folder, with the
same interpreter and libraries. This tree runs every seed; the older one runs only the first seed, right after this
tree's run of it, and these two are compared. Seconds of a step are from the run's own timings, after the first step.

Quality is that of this tree: the share of held-out answers that keep the rule before and after training and with the
teacher, and the closed share of the gap, (after - before) / (teacher - before).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from common import HERE, Record, measured, say, spread
from workload import SMOLLM2

BEFORE = "92f0e36"  # the last commit before the race with the tuned peers
SEEDS = (0, 1, 2)
NOW = HERE.parent
SAMPLING = ("greedy", "sampled")
KL = "eval/reverse_kl"  # exact, nats per token of the sampled held-out responses
PARTS = ("total", "generate", "score", "train")
CONVERT = f"""
from opd.models import gguf
from opd.plugins import packaged
print(gguf.__file__)
gguf.convert_gguf(packaged({SMOLLM2!r}))
"""


def python(source: Path, *arguments: str) -> str:
    """The standard output of an interpreter that imports opd from `source`. Raises RuntimeError if it fails."""
    environment = {**os.environ, "PYTHONPATH": str(source / "src")}
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        tail = "\n".join(done.stderr.strip().splitlines()[-20:])
        raise RuntimeError(f"{' '.join(arguments)} with opd from {source} ended with {done.returncode}:\n{tail}")
    return done.stdout


def archived(commit: str, folder: Path) -> Path:
    """Sources and recipes of a commit, unpacked into `folder`."""
    folder.mkdir()
    archive = ["git", "-C", str(NOW), "archive", commit, "src", "recipes"]
    done = subprocess.run(archive, capture_output=True, check=False)
    if done.returncode:
        raise SystemExit(f"There is no commit {commit} here ({done.stderr.decode().strip()}). Give --before COMMIT.")
    subprocess.run(["tar", "-x", "-C", str(folder)], input=done.stdout, check=True)
    return folder


def prepare(source: Path) -> None:
    """Convert the GGUF file before timing, and check that opd is imported from `source`."""
    imported = Path(python(source, "-c", CONVERT).strip().splitlines()[0])
    assert imported.is_relative_to(source), f"opd comes from {imported}, not from {source}"


def run(source: Path, side: str, seed: int, overrides: list[str]) -> Record:
    """One run: wall seconds of the command, seconds of its steps, rule shares."""
    recipe = str(source / "recipes" / "quickstart.yaml")
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        python(source, "-m", "opd", "train", recipe, f"output_dir={folder}", f"seed={seed}", *overrides)
        seconds = time.perf_counter() - started
        stage = Path(folder) / "distil"
        timings, metrics = (read(stage / name) for name in ("timings.jsonl", "metrics.jsonl"))
    steps = {part: spread([row[part] for row in timings[1:] or timings]) for part in PARTS}
    quality = {name: shares(metrics, name) for name in SAMPLING}
    kl = [row[KL] for row in metrics if KL in row]
    return {"side": side, "seed": seed, "seconds": seconds, "steps": steps, "quality": quality, "kl": kl}


def read(file: Path) -> list[Record]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def shares(metrics: list[Record], sampling: str) -> Record:
    """Rule shares of the untrained student, the teacher and the trained student, and the closed share of the gap."""
    rewards = [row[f"eval/{sampling}/reward"] for row in metrics if f"eval/{sampling}/reward" in row]
    before, after = rewards[0], rewards[-1]
    teacher = next(row[key] for row in metrics if (key := f"eval/teacher/{sampling}/reward") in row)
    gap = (after - before) / (teacher - before) if teacher != before else None
    return {"before": before, "teacher": teacher, "after": after, "gap": gap}


def ratio(result: Record) -> float:
    """Wall time of this tree's run over the older tree's, on the first seed."""
    seconds: dict[Any, float] = {(row["side"], row["seed"]): row["seconds"] for row in result["runs"]}
    seed = result["runs"][0]["seed"]
    return seconds["now", seed] / seconds["before", seed]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", default=BEFORE, metavar="COMMIT")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    parser.add_argument("overrides", nargs="*", help="of the recipe, for both, e.g. steps=1; before the options")
    options = parser.parse_args()
    first, *others = options.seeds
    turns = [("now", first), ("before", first), *(("now", seed) for seed in others)]
    with tempfile.TemporaryDirectory() as place:
        sources = {"now": NOW, "before": archived(options.before, Path(place).resolve() / "before")}
        for source in sources.values():
            prepare(source)
        with measured("quickstart") as result:
            result |= {"before": options.before, "overrides": options.overrides, "runs": []}
            for side, seed in turns:
                row = run(sources[side], side, seed, options.overrides)
                result["runs"].append(row)
                step = row["steps"]["total"]["median"]
                gaps = ", ".join(f"{name} {row['quality'][name]}" for name in SAMPLING)
                say(f"{side}, seed {seed}: {row['seconds']:.1f} s, {step:.2f} s a step; {gaps}")
            say(f"now / before: {ratio(result):.2f}")


if __name__ == "__main__":
    main()
