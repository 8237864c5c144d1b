"""How OpenMP's threads wait, on a quiet machine and beside one busy process: what opd chooses, and what it costs.

    python benchmarks/waiting.py {tiny,small,quickstart} {quiet,busy} [--alone]

A command fills its part of the result. The contestants are runs of `opd train`'s own loop, each a process that stops
after every step until it is its turn; the first step of each is not counted. Evaluations are off.

* `tiny` is the stage `distil` of recipes/gkd.yaml: 0.05M learn from 0.2M;
* `small` are the models and prompts of step.py, of 5M and 26M;
* `quickstart` is recipes/quickstart.yaml, of 135M.

The contestants differ in what is set before torch loads:

* `default`: nothing, as before the command line chose: threads spin for a while and then sleep;
* `passive`: OMP_WAIT_POLICY=passive: threads sleep at once;
* `chosen`: what the command line sets, there and then.

`busy` is one more process, which counts in Python from before the contestants start until they have ended. Beside it a
step of the quickstart whose threads spin takes minutes: there `default` is not raced. `--alone` is the command itself,
its default and one step, ended after a while if it has not made it.

The choice is that of `opd train`, `doctor`, `eval` and `study` on Linux, with GNU's OpenMP, which torch brings there.
OpenMP reads it when torch loads, and what the machine does later changes nothing. Elsewhere, under torchrun, with one
thread, or where OMP_WAIT_POLICY, GOMP_SPINCOUNT or KMP_BLOCKTIME is set, nothing is chosen. Nor is it from Python
(`opd.distill`, a notebook), where torch may be there already: beside other busy processes set OMP_WAIT_POLICY=passive
in the environment, or with `os.environ` before the first import of torch.
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
VARIABLES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME", "OMP_NUM_THREADS")  # none of the user's may act here


# --- A contestant's side: torch comes after the choice ----------------------------------------------------------------


def worker(policy: str, recipe_file: str) -> None:
    """A run that makes one step a request, and answers with its seconds by the clock and of CPU."""
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

        def step(self, stage: str, step: int, metrics: Any) -> None:
            if self.started is None:
                channel.send({"ready": True})
            else:
                wall, cpu = time.perf_counter() - self.started[0], time.process_time() - self.started[1]
                channel.send({"wall": wall, "cpu": cpu, "said": said})
            channel.receive()
            self.started = time.perf_counter(), time.process_time()

    run_recipe(recipe, progress=InTurn(quiet=True))


# --- The benchmark's side ---------------------------------------------------------------------------------------------


def recipe_of(model: str, folder: Path) -> Path:
    """One stage without evaluations, checkpoints and samples, and of more steps than are made."""
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
    """Alone, or while another process counts."""
    other = subprocess.Popen([sys.executable, "-c", COUNTING]) if condition == "busy" else None
    try:
        yield
    finally:
        if other is not None:
            other.kill()
            other.wait()


def race(model: str, condition: str, rounds: int) -> list[Record]:
    """A row of each contestant."""
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
    """A row of the command with one step and nothing chosen, as long as the patience lasts."""
    with tempfile.TemporaryDirectory() as place, beside(condition):
        return [one_step(recipe_of(model, Path(place)), Path(place) / "alone")]


def one_step(recipe: Path, folder: Path) -> Record:
    # A spin count is the user's, so that nothing is chosen; this one is what GNU's OpenMP takes without one.
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
    """`chosen` by the clock: on a quiet machine over `default`, on a busy one over `passive`."""
    wall = {kind(row): row["wall"]["median"] for row in rows if "wall" in row}
    return [
        {"model": model, "condition": condition, "over": over, "ratio": seconds / wall[model, condition, over]}
        for (model, condition, policy), seconds in wall.items()
        if policy == "chosen" and (over := "default" if condition == "quiet" else "passive")
    ]


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
