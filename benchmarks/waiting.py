"""How OpenMP's threads wait, on a quiet machine and beside one busy process: opd's choice, and its cost.

    python benchmarks/waiting.py {tiny,small,quickstart} {quiet,busy} [--alone]

Each command fills its part of the result. The contestants are runs of `opd train`'s loop, each a process that waits
after every step for its turn; the first step of each is not counted. Evaluations are off.

* `tiny` is the stage `distil` of recipes/gkd.yaml: 0.05M parameters learn from 0.2M;
* `small` has the models and prompts of step.py, of 5M and 26M;
* `quickstart` is recipes/quickstart.yaml, of 135M.

The contestants differ in the environment before torch loads:

* `default`: nothing is set: threads spin for a while and then sleep;
* `passive`: OMP_WAIT_POLICY=passive: threads sleep at once;
* `chosen`: the setting of the command line at that moment.

`busy` is one more process, which counts in Python from before the contestants start until they have ended. Beside it, a
step of the quickstart with spinning threads takes minutes, so `default` is left out there. `--alone` runs the command
with its default for one step, and ends it after a while if the step has not finished.

`opd train`, `doctor`, `eval` and `study` make this choice on Linux, with GNU's OpenMP, which torch ships there. OpenMP
reads it when torch loads; a later change of the machine's load has no effect. On other systems, under torchrun, with
one thread, or if OMP_WAIT_POLICY, GOMP_SPINCOUNT or KMP_BLOCKTIME is set, nothing is chosen. The same holds in Python
(`opd.distill`, a notebook), where torch may be loaded already: beside other busy processes, set
OMP_WAIT_POLICY=passive in the environment before the first import of torch.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

Record = dict[str, Any]
HERE = Path(__file__).resolve().parent
RECIPES = HERE.parent / "recipes"
ROUNDS = {"tiny": 15, "small": 9, "quickstart": 2}  # counted steps of each contestant
CONDITIONS = ("quiet", "busy")
POLICIES = ("default", "passive", "chosen")
PATIENCE = 200  # seconds for the one step of the quickstart that spins beside a busy process
COUNTING = "import time\nuntil = time.monotonic() + 400\nwhile time.monotonic() < until: pass"
VARIABLES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME", "OMP_NUM_THREADS")  # the user must not set them here


# --- A contestant's side: torch comes after the choice ----------------------------------------------------------------


def worker(policy: str, recipe_file: str) -> None:
    """A run that makes one step per request, and answers with its wall and CPU seconds."""
    from opd.commands.waiting import set_waiting
    from opd.recipe.load import load_recipe
    from opd.stage.progress import Progress

    recipe = load_recipe(recipe_file, [f"output_dir={Path(recipe_file).parent / policy}"])
    said: list[str] = []
    if policy == "passive":
        os.environ["OMP_WAIT_POLICY"] = "passive"
    if policy == "chosen":
        set_waiting(said.append)
    from common import Channel

    from opd.runs.stages import run_recipe

    channel = Channel()

    class InTurn(Progress):
        """Stops the loop after every step."""

        started: tuple[float, float] | None = None

        def step(self, stage: str, step: int, metrics: Any, **more: Any) -> None:
            now = time.perf_counter(), time.process_time()
            if self.started is None:
                channel.send({"ready": True})
            else:
                wall, cpu = (end - start for end, start in zip(now, self.started, strict=True))
                channel.send({"wall": wall, "cpu": cpu, "said": said})
            channel.receive()
            self.started = time.perf_counter(), time.process_time()

    run_recipe(recipe, progress=InTurn(quiet=True))


# --- The benchmark's side ---------------------------------------------------------------------------------------------


def recipe_of(model: str, folder: Path) -> Path:
    """One stage without evaluations, checkpoints and samples, with more steps than needed."""
    if model == "small":
        import scaling

        file = scaling.recipe(folder, 1, "speed")
    else:
        file = RECIPES / f"{'gkd' if model == 'tiny' else model}.yaml"
    tree = yaml.safe_load(file.read_text())
    stage = {**tree.pop("defaults", {}), **tree["stages"][-1]}
    stage |= {"steps": 10_000, "evaluate": None, "checkpoint": {"every": 10_000}, "samples_every": 0}
    made = folder / f"{model}.yaml"
    made.write_text(json.dumps({**tree, "name": model, "stages": [stage]}))  # JSON is YAML
    return made


@contextlib.contextmanager
def beside(condition: str) -> Iterator[None]:
    """A context manager: with another counting process if `condition` is busy."""
    other = subprocess.Popen([sys.executable, "-c", COUNTING]) if condition == "busy" else None
    try:
        yield
    finally:
        if other is not None:
            other.kill()
            other.wait()


def race(model: str, condition: str, rounds: int) -> list[Record]:
    """One row per contestant."""
    from common import spread, take_turns, workers

    rows: list[Record] = []
    names = [name for name in POLICIES if (model, condition, name) != ("quickstart", "busy", "default")]
    with tempfile.TemporaryDirectory() as place, beside(condition):
        recipe = recipe_of(model, Path(place))
        with workers(__file__, names, "--recipe", str(recipe)) as started:
            for name, answers in take_turns(started, {}, rounds).items():
                row = {part: spread([answer[part] for answer in answers]) for part in ("wall", "cpu")}
                rows.append({"policy": name, **row, "said": answers[-1]["said"]})
    return rows


def alone(model: str, condition: str) -> list[Record]:
    """A row of the command with one step and no choice, for at most `PATIENCE` seconds."""
    with tempfile.TemporaryDirectory() as place, beside(condition):
        return [one_step(recipe_of(model, Path(place)), Path(place) / "alone")]


def one_step(recipe: Path, folder: Path) -> Record:
    # A spin count set by the user turns the choice off; this one is the default of GNU's OpenMP.
    from common import spread

    environment = {**os.environ, "GOMP_SPINCOUNT": "300000"}
    command = [sys.executable, "-m", "opd", "train", str(recipe), "steps=1", f"output_dir={folder}"]
    with contextlib.suppress(subprocess.TimeoutExpired):
        subprocess.run(command, env=environment, capture_output=True, timeout=PATIENCE, check=True)
    found = list(folder.rglob("timings.jsonl"))
    if not found:
        return {"policy": "default", "none_in": PATIENCE}
    (timing,) = map(json.loads, found[0].read_text().splitlines())
    return {"policy": "default", "wall": spread([timing["total"]]), "cpu": spread([timing["cpu"]])}


def kind(row: Record) -> tuple[str, str, str]:
    return row["model"], row["condition"], row["policy"]


def ratios(rows: list[Record]) -> list[Record]:
    """Wall time of `chosen`: on a quiet machine over `default`, on a busy one over `passive`."""
    wall = {kind(row): row["wall"]["median"] for row in rows if "wall" in row}
    return [
        {"model": model, "condition": condition, "over": over, "ratio": seconds / wall[model, condition, over]}
        for (model, condition, policy), seconds in wall.items()
        if policy == "chosen" and (over := "default" if condition == "quiet" else "passive")
    ]


def against_default(rows: list[Record], model: str, condition: str, part: str) -> float | None:
    """`part` (wall or cpu) of `chosen` over that of `default`, whose threads spin; None if not measured.

    If `default` made no step in time, the ratio of wall seconds is an upper bound, and that of CPU seconds unknown.
    """
    found = {row["policy"]: row for row in rows if (row["model"], row["condition"]) == (model, condition)}
    if not {"chosen", "default"} <= found.keys():
        return None
    chosen, default = found["chosen"][part]["median"], found["default"]
    if "none_in" in default:
        return chosen / default["none_in"] if part == "wall" else None
    return chosen / default[part]["median"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=ROUNDS, nargs="?")
    parser.add_argument("condition", choices=CONDITIONS, nargs="?")
    parser.add_argument("--rounds", type=int, help="counted steps of each contestant")
    parser.add_argument("--alone", action="store_true", help="the command with one step and nothing chosen")
    parser.add_argument("--worker", choices=POLICIES, help=argparse.SUPPRESS)
    parser.add_argument("--recipe", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        worker(options.worker, options.recipe)
        return
    if options.condition is None:
        parser.error("name a model and a condition")
    if set_already := [name for name in VARIABLES if name in os.environ]:
        parser.error(f"{', '.join(set_already)} of the environment would act on all contestants: unset it.")
    from common import RESULTS, measured, say

    file = RESULTS / "waiting.json"
    before = json.loads(file.read_text())["rows"] if file.exists() else []
    place = {"model": options.model, "condition": options.condition}
    with measured("waiting") as result:
        rows = alone(**place) if options.alone else race(**place, rounds=options.rounds or ROUNDS[options.model])
        rate = result["calibration_gflops"]["before"]
        rows = [{**place, **row, "gflops": rate} for row in rows]
        new = {kind(row) for row in rows}
        result["rows"] = [row for row in before if kind(row) not in new] + rows
    for row in rows:
        say(json.dumps(row))
    for row in ratios(rows):
        say(json.dumps(row))


if __name__ == "__main__":
    main()
